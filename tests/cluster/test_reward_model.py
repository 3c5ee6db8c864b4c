"""What `attune reward-model` goes on from: the last checkpoint of the same training, and of no other."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.reward_model import Prepared, begin_or_go_on, started
from learner.commit import begin_checkpoint, commit_checkpoint
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
