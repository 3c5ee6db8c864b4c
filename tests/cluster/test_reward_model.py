"""What `attune reward-model` goes on from: the last checkpoint of the same training, and of no other."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.reward_model import Prepared, begin_or_go_on, prepare, started
from learner.commit import begin_checkpoint, commit_checkpoint, prune_checkpoints
from learner.reward_examples import Example
from learner.reward_training import Data
from services.errors import UserError
from services.scoring_format import ScorerFormat

CONSOLE = Console(quiet=True)
THIS = {"run.seed": 0, "reward_model.lr": 0.1}


def commit(work: Path, updates: int) -> Path:
    directory = begin_checkpoint(work, updates)
    (directory / "weights").write_bytes(b"1234")
    return commit_checkpoint(directory, {"progress": {}})


def begin(work: Path, this: dict[str, Any] = THIS, resume: Any = "auto") -> str | None:
    return begin_or_go_on(work, this, resume, CONSOLE)


def test_it_goes_on_from_the_newest_checkpoint_that_is_whole(tmp_path: Path) -> None:
    work = tmp_path / "out.training"
    assert begin(work) is None
    assert begin(work) is None  # nothing was committed yet
    first = commit(work, 4)
    assert begin(work) == str(first)
    second = commit(work, 8)
    assert begin(work) == str(second)
    (second / "weights").write_bytes(b"12")
    assert begin(work) == str(first)
    # What was damaged is out of the way of what follows: left there, pruning kept it, and removed that.
    assert prune_checkpoints(work, keep=1) == []
    assert commit(work, 8) == second
    assert begin(work) == str(second)


def test_damage_everywhere_is_no_beginning(tmp_path: Path) -> None:
    work = tmp_path / "out.training"
    begin(work)
    weights = commit(work, 4) / "weights"
    weights.write_bytes(b"12")
    with pytest.raises(UserError, match="step_4 is damaged"):
        begin(work)
    assert weights.exists()
    assert begin(work, resume="never") is None


def test_another_recipe_is_refused_and_never_begins_anew(tmp_path: Path) -> None:
    work = tmp_path / "out.training"
    begin(work)
    commit(work, 4)
    changed = {**THIS, "reward_model.lr": 0.2}
    with pytest.raises(UserError, match=r"another reward_model\.lr \(0\.1, now 0\.2\); --resume never begins anew"):
        begin(work, changed)
    assert begin(work, changed, "never") is None
    assert not (work / "checkpoints").exists()
    commit(work, 2)
    assert begin(work, changed) is not None


def test_other_data_and_another_policy_are_another_training(tmp_path: Path) -> None:
    from cluster.recipe import resolve

    (tmp_path / "model.safetensors").write_bytes(b"1")
    config = resolve({"data": {}, "policy": {"model": str(tmp_path)}}, "x")

    def of(**more: Any) -> dict[str, Any]:
        example = Example(((1, 2), (1, 3)), (0.0, 1.0), (1.0,), **more)
        return started(config, Prepared(Data([example], [], [], []), ScorerFormat(kind="preference"), 0))

    before = of()
    assert of() == before
    assert [key for key, value in of(probability=0.9).items() if value != before[key]] == ["the labelled data"]
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert [key for key, value in of().items() if value != before[key]] == ["policy.model's files"]


def test_paraphrases_are_rated_by_their_likeness_and_language(tiny_decoder: Path, tmp_path: Path) -> None:
    """From the file to the targets: cosines of the mean last hidden states, where the data names none."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cluster.recipe import resolve

    response, others = "Rome is a city.", ("Rome is large.", "Rome, a city.", "A city is Rome.")
    paraphrases = [
        {"text": others[0], "language": "en"},
        {"text": others[1], "language": "it"},
        {"text": others[2], "language": "en", "similarity": 0.5},
    ]
    row = {"prompt": "Where is Rome?", "response": response, "rating": 4, "language": "en", "paraphrases": paraphrases}
    (tmp_path / "rated.jsonl").write_text(json.dumps(row), encoding="utf-8")
    section = {
        "kind": "absolute", "source": str(tmp_path / "rated.jsonl"), "label_range": [1, 5], "held_out": 0,
        "other_language": 0.25,
    }  # fmt: skip
    config = resolve({"data": {}, "policy": {"model": str(tiny_decoder)}, "reward_model": section}, "x")
    found = [example.targets[0] for example in prepare(config).data.train]

    loader: Any = AutoModelForCausalLM
    model, tokenizer = loader.from_pretrained(tiny_decoder).eval(), AutoTokenizer.from_pretrained(tiny_decoder)

    @torch.no_grad()
    def embedding(text: str) -> torch.Tensor:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        return model(ids, output_hidden_states=True).hidden_states[-1][0].mean(0)

    near = [float(torch.cosine_similarity(embedding(response), embedding(text), dim=0)) for text in others[:2]]
    assert all(0 < each < 0.999 for each in near)
    rating = 0.75
    assert found == pytest.approx([rating, rating * near[0], rating * near[1] * 0.25, rating * 0.5], abs=1e-5)
