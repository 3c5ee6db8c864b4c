"""A value function that starts from a reward model, against transformers' own classifier on each prefix, in float64."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from learner.microbatch import Tokens, collate
from learner.policy import PolicyWithValue, parameter_groups
from learner.value_model import load_value_model
from services.errors import UserError
from services.models_config import PolicySection
from services.scoring_format import ScorerFormat, StepRule, write_format

VOCABULARY = 40
SAMPLES = [Tokens((5, 6, 7, 8), (9, 10, 11)), Tokens((12, 13), (14, 15, 16, 17, 18)), Tokens((20, 21, 22), (26,))]


def save_tokenizer(directory: Path, words: int = VOCABULARY) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w2").save_pretrained(directory)


def config_of(width: int, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, initializer_range=0.3, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A `policy`, and a reward model `scorer` of another width, with other weights."""
    root = tmp_path_factory.mktemp("value-models")
    torch.manual_seed(4)
    LlamaForCausalLM(config_of(16)).save_pretrained(root / "policy")
    LlamaForSequenceClassification(config_of(24, num_labels=1)).save_pretrained(root / "scorer")
    for name in ("policy", "scorer"):
        save_tokenizer(root / name)
    write_format(root / "scorer", ScorerFormat(kind="preference", input_template="{prompt} {response}"))
    return {name: root / name for name in ("policy", "scorer")}


def start(dirs: dict[str, Path]) -> tuple[Any, PolicyWithValue]:
    policy = PolicySection(model=str(dirs["policy"]))
    value = load_value_model(str(dirs["scorer"]), policy, dtype=torch.float64)
    lm = LlamaForCausalLM.from_pretrained(dirs["policy"]).double()
    return lm, PolicyWithValue(lm, value="from_reward_model", value_lm=value.lm, value_score=value.score).double()


def test_values_are_what_the_reward_model_scores_each_prefix_with(dirs: dict[str, Path]) -> None:
    _, policy = start(dirs)
    out = policy(collate(SAMPLES, family="decoder", pad_id=0, decoder_start_id=None), chunks=2)
    loader: Any = AutoModelForSequenceClassification
    scorer = loader.from_pretrained(dirs["scorer"]).double().eval()
    seen: list[float] = []
    for i, sample in enumerate(SAMPLES):
        n = len(sample.response_ids)
        for t in range(n + 1):
            prefix = [*sample.prompt_ids, *sample.response_ids[:t]]
            expected = scorer(input_ids=torch.tensor([prefix])).logits[0, 0].item()
            found = out.next_values[i] if t == n else out.values[i, t]
            assert found.item() == pytest.approx(expected, abs=1e-10)
            seen.append(expected)
        assert not out.values[i, n:].any()
    assert max(seen) - min(seen) > 0.1


def test_trunk_and_head_are_trained_and_the_policy_is_left_alone(dirs: dict[str, Path]) -> None:
    lm, policy = start(dirs)
    out = policy(collate(SAMPLES, family="decoder", pad_id=0, decoder_start_id=None))
    (out.values**2).sum().backward()
    assert all(p.grad is None for p in lm.parameters())
    groups = parameter_groups(policy)
    assert {name.split(".")[0] for name, _ in groups["policy"]} == {"lm"}
    names = [name for name, _ in groups["value"]]
    assert "value_head.score.weight" in names
    assert not [name for name, p in groups["value"] if p.grad is None]
    assert len(names) == len(list(LlamaForSequenceClassification(config_of(24, num_labels=1)).parameters()))


def broken(dirs: dict[str, Path], root: Path, what: str) -> Path:
    path = shutil.copytree(dirs["scorer"], root / what)
    weights = path / "model.safetensors"
    tensors = load_file(weights)
    match what:
        case "no scorer.json":
            (path / "scorer.json").unlink()
        case "principle":
            write_format(path, ScorerFormat(kind="principle", input_template="{prompt} {response}"))
        case "process":
            write_format(path, ScorerFormat(kind="process", step_rule=StepRule()))
        case "headless":
            save_file({k: v for k, v in tensors.items() if k != "score.weight"}, weights, metadata={"format": "pt"})
        case "width":
            save_file({**tensors, "score.weight": torch.ones(1, 16)}, weights, metadata={"format": "pt"})
        case "two labels":
            two = LlamaForSequenceClassification(config_of(24, num_labels=2))
            two.save_pretrained(path)
        case "tokenizer":
            save_tokenizer(path, VOCABULARY - 1)
        case "positions":
            config = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8}))
        case _:
            shutil.rmtree(path)
    return path


@pytest.mark.parametrize(("what", "said"), [
    ("no scorer.json", "no scorer.json"), ("nothing", "no scorer.json"), ("principle", "kind principle"),
    ("process", "kind process"), ("headless", r"lacks 1 .* score\.weight"), ("width", "cannot be loaded"),
    ("two labels", "no linear score head with one output"), ("tokenizer", "another tokenizer"),
    ("positions", "positions 8, the policy .* 32"),
])  # fmt: skip
def test_what_no_value_can_start_from_is_refused(dirs: dict[str, Path], tmp_path: Path, what: str, said: str) -> None:
    path = broken(dirs, tmp_path, what)
    with pytest.raises(UserError, match=rf"learner\.value_model: .*{said}"):
        load_value_model(str(path), PolicySection(model=str(dirs["policy"])), dtype=torch.float32)


def test_an_encoder_decoder_is_refused(dirs: dict[str, Path], tmp_path: Path) -> None:
    T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    save_tokenizer(tmp_path / "t5")
    with pytest.raises(UserError, match="t5 is an encoder-decoder"):
        load_value_model(str(dirs["scorer"]), PolicySection(model=str(tmp_path / "t5")), dtype=torch.float32)
