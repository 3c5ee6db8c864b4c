"""Apps and items for the tests of the reward server."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from reward_server.app import create_app
from reward_server.config import RewardSection

TOKEN = "correct horse"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def client() -> Iterator[TestClient]:
    """The default recipe, behind a token that the client sends."""
    with TestClient(create_app(RewardSection(), token=TOKEN), headers=HEADERS, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def serving() -> Iterator[Callable[..., TestClient]]:
    """Starts a client of the app of a recipe's `reward` section, given as plain values."""
    clients: list[TestClient] = []

    def serve(scorers: Any = None, **section: Any) -> TestClient:
        app = create_app(RewardSection.model_validate(section), token=TOKEN, scorers=scorers)
        client = TestClient(app, headers=HEADERS, raise_server_exceptions=False)
        client.__enter__()
        clients.append(client)
        return client

    yield serve
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture
def item() -> dict[str, Any]:
    """An item with statistics of two tokens that every source of the recipe can score."""
    return {
        "id": "a",
        "prompt": "the sky is",
        "response": "blue blue",
        "response_ids": [5, 6, 2],
        "eos_ids": [2],
        "reference": "Blue blue!",
        "attention": {
            "mass": [0.5, 0.6, 0.4],
            "salient_mass": [0.2, 0.3, 0.1],
            "neg_entropy_sum": [-0.9, -0.8, -0.7],
            "peak": [0.2, 0.3, 0.2],
            "salient_count": 2,
            "content_count": 4,
            "flags": [],
        },
    }


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
    save("causal", LlamaForCausalLM, 5)
    save("trunk", LlamaForCausalLM, 6)
    tensors = load_file(root / "trunk" / "model.safetensors")
    head = {"v_head.weight": torch.randn(1, 32), "v_head.bias": torch.randn(1)}
    save_file({**tensors, **head}, root / "trunk" / "model.safetensors", metadata={"format": "pt"})
    return {path.name: path for path in root.iterdir()}
