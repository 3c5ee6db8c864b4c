"""What tests of several rooms share: a tiny policy and its prompts, and one Ray cluster for the whole session."""

import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray reads these when it is first imported, which a test's own import may be.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

CITIES = ("Paris", "Rome", "Oslo", "Bern", "Cairo", "Lima", "Quito", "Delhi", "Tokyo", "Seoul", "Accra", "Dakar")
PHRASES = ("Where is {} on the map?", "Tell me about the old town of {}.", "Which river runs through {}?")


def questions() -> list[dict[str, str]]:
    """36 prompts with references, all different."""
    return [
        {"prompt": phrase.format(city), "response": f"{city} is a city, and {city} is large."}
        for phrase in PHRASES
        for city in CITIES
    ]


LONGEST = ("system", "learner_engine", "rollout", "reward_server")
"""Folders whose files take minutes: begun first, so that no process is left alone with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(root).parts[0]
        return LONGEST.index(folder) if folder in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.fixture(scope="session")
def questions_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in questions()), encoding="utf-8")
    return path


def _tiny_policy(directory: Path, family: Any) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    from services.text.tokenizer import train_tokenizer

    texts = [text for row in questions() for text in row.values()]
    tokenizer = train_tokenizer(texts, 320, family)
    torch.manual_seed(7)
    special = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if family == "decoder":
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=32,  # the narrowest that vLLM's CPU kernel knows
                max_position_embeddings=96,
                bos_token_id=tokenizer.bos_token_id,
                tie_word_embeddings=True,
                **special,
            )
        )
    else:
        model = T5ForConditionalGeneration(
            T5Config(
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                decoder_start_token_id=tokenizer.pad_token_id,
                **special,
            )
        )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _tiny_policy(tmp_path_factory.mktemp("tiny-decoder"), "decoder")


@pytest.fixture(scope="session")
def tiny_encoder_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _tiny_policy(tmp_path_factory.mktemp("tiny-encoder-decoder"), "encoder-decoder")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[str]:
    """The address of the session's Ray cluster; token authentication is on, as in a run of its own."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    os.environ["RAY_metrics_report_interval_ms"] = "1000"  # noqa: SIM112 - Ray's; 10 s is longer than many runs here
    import ray

    context: Any = ray.init(
        address="local", num_cpus=4, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False
    )
    yield str(context.address_info["address"])
    ray.shutdown()


@pytest.fixture(scope="session")
def scoring_models(tiny_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny random models: `sequence` and `other` (one label), `two` (two labels), `trunk` (a causal model with
    `v_head.*` beside it), `token` (steps), `causal`. With 700 positions, and the tokenizer of the tiny decoder."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import (
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        LlamaForTokenClassification,
    )

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_decoder)
    root = tmp_path_factory.mktemp("scoring-models")

    def save(name: str, kind: Any, seed: int, **more: Any) -> None:
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=700, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, initializer_range=0.3, **more,
        )  # fmt: skip
        kind(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)

    save("sequence", LlamaForSequenceClassification, 1, num_labels=1)
    save("other", LlamaForSequenceClassification, 2, num_labels=1)
    save("two", LlamaForSequenceClassification, 3, num_labels=2)
    labels = {0: "incorrect", 1: "neutral", 2: "correct"}
    save("token", LlamaForTokenClassification, 4, id2label=labels, label2id={v: k for k, v in labels.items()})
    save("causal", LlamaForCausalLM, 5, head_dim=32)  # the narrowest that vLLM's CPU kernel knows
    save("trunk", LlamaForCausalLM, 6)
    tensors = load_file(root / "trunk" / "model.safetensors")
    head = {"v_head.weight": torch.randn(1, 32), "v_head.bias": torch.randn(1)}
    save_file({**tensors, **head}, root / "trunk" / "model.safetensors", metadata={"format": "pt"})
    return {path.name: path for path in root.iterdir()}
