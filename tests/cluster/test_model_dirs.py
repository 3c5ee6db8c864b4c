"""policy/ and policy-best/: whole, marked with what they hold, and what the last commit names, whatever was killed."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.config import Config
from cluster.driver import is_finished
from cluster.evaluator import Evaluation
from cluster.files import read_jsonl
from cluster.history import History, open_history
from cluster.model_dirs import best_mark, is_marked, partial_of, policy_mark, put_in_place, seal, settle_best
from cluster.recipe import resolve
from cluster.run_dir import RunDir
from cluster.training import Training
from learner.commit import Written, written

PROMPTS = 40

MEASURE = "the max of greedy/reward over 64 prompts of validation"


def recipe(steps: int, keep: int = 2) -> Config:
    return resolve(
        {
            "run": {"groups_per_step": 1, "steps": steps},
            "data": {"source": "p.jsonl"},
            "policy": {"model": "m"},
            "checkpoint": {"keep": keep},
        },
        "test",
    )


class Learners:
    """Writes files that say after how many steps they were written."""

    parameters = 1
    ranks = (SimpleNamespace(name="learner-0"),)

    def __init__(self, history: History) -> None:
        self.history = history
        self.killed_in: str | None = None

    def call(self, method: str, directory: str, **_: Any) -> None:
        path = Path(directory)
        path.mkdir(exist_ok=True)
        (path / "model.safetensors").write_text(f"after {self.history.steps_done}")
        if method == self.killed_in:
            raise KeyboardInterrupt

    def answers(self, method: str, directory: str, **_: Any) -> list[Written]:
        self.call(method, directory)
        return [written(directory)]


class Driver:
    """`Training` on a run directory, with a learner that only writes: one incarnation, from its last commit."""

    def __init__(self, run: RunDir, steps: int) -> None:
        self.config = recipe(steps)
        self.run = run
        self.history = open_history(run, self.config, "auto", "abc")
        run.config.write_text(json.dumps(self.config.model_dump(mode="json")))
        run.event("start", run_id="abc", incarnation=self.history.incarnation)
        self.finished = is_finished(self.config, run, self.history, PROMPTS)
        training = Training.__new__(Training)
        training.config, training.run, training.history = self.config, run, self.history
        training.learners = cast(Any, Learners(self.history))
        training.batches = cast(Any, SimpleNamespace(note_failures=lambda: None, commit=lambda _: None))
        training.supervisor = cast(Any, SimpleNamespace(budget=SimpleNamespace(committed=lambda: None)))
        training.progress = cast(Any, SimpleNamespace(phase=lambda _: None))
        training.rounds = None
        self.training = training
        self.learners = cast(Learners, training.learners)

    def settle(self) -> None:
        settle_best(self.run, self.history, 60.0, lambda: None)

    def step(self, value: float | None = None) -> None:
        """One step; with a value, an evaluation after it."""
        number = self.history.steps_done
        self.history.steps[number] = [f"0:p{number}"]
        if value is not None:
            self.evaluate(Evaluation({}, value, larger=True))

    def evaluate(self, found: Evaluation) -> dict[str, float]:
        self.training.evaluator = cast(Any, SimpleNamespace(evaluate=lambda _: found))
        return self.training._evaluate(self.history.steps_done - 1)

    def commit(self) -> None:
        self.training._commit()

    def finish(self) -> None:
        self.training._finish()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    return run


def held(directory: Path) -> str | None:
    file = directory / "model.safetensors"
    return file.read_text() if file.exists() else None


def finished_run(run: RunDir, steps: int) -> None:
    driver = Driver(run, steps)
    for _ in range(steps):
        driver.step()
    driver.finish()


# ---- policy/


def test_a_finished_run_is_finished_until_it_is_extended(run: RunDir) -> None:
    finished_run(run, 2)
    assert held(run.policy) == "after 2"
    mark = json.loads((run.policy / "attune.json").read_text())
    assert mark == {"schema_version": 1, "run_id": "abc", "incarnation": 1, "step": 2}
    assert Driver(run, 2).finished
    assert not Driver(run, 3).finished


def test_a_run_killed_between_its_last_commit_and_its_policy_is_not_finished(run: RunDir) -> None:
    finished_run(run, 2)
    driver = Driver(run, 3)
    driver.step()
    driver.learners.killed_in = "export"
    with pytest.raises(KeyboardInterrupt):
        driver.finish()
    assert held(run.policy) == "after 2"  # of the earlier end: whole, and not what the last commit holds
    again = Driver(run, 3)
    assert (again.history.committed_steps, again.finished) == (3, False)
    again.finish()
    assert held(run.policy) == "after 3"
    assert Driver(run, 3).finished


def test_the_same_step_of_another_incarnation_is_another_model(run: RunDir) -> None:
    finished_run(run, 2)
    shutil.rmtree(run.checkpoints / "step_2")
    driver = Driver(run, 2)
    for _ in range(2):
        driver.step()
    driver.commit()
    assert not Driver(run, 2).finished


@pytest.mark.parametrize("harm", ["no mark", "torn mark", "no model"])
def test_a_policy_without_its_whole_mark_does_not_count(run: RunDir, harm: str) -> None:
    finished_run(run, 1)
    mark = run.policy / "attune.json"
    if harm == "no mark":  # written by an earlier version, or not to its end
        mark.unlink()
    elif harm == "torn mark":
        mark.write_bytes(mark.read_bytes()[:-9] + b"\0" * 9)
    else:
        shutil.rmtree(run.policy)
    assert not Driver(run, 1).finished


def test_the_mark_comes_after_all_that_it_vouches_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    (model / "tokenizer").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "tokenizer/vocab.json"):
        (model / name).write_text("x")
    synced: list[tuple[str, bool]] = []

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((path.relative_to(tmp_path).as_posix(), (model / "attune.json").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    seal(model, {"step": 1})
    assert {path for path, marked in synced if not marked} == {
        "model",
        "model/model.safetensors",
        "model/config.json",
        "model/tokenizer",
        "model/tokenizer/vocab.json",
    }
    assert [path for path, marked in synced if marked] == ["model/attune.json", "model"]
    assert is_marked(model, {"step": 1})
    assert not is_marked(model, {"step": 2})


def test_a_swap_leaves_one_whole_model_and_nothing_beside_it(tmp_path: Path) -> None:
    place = tmp_path / "policy"
    for text in ("first", "second"):
        partial_of(place).mkdir()
        (partial_of(place) / f"{text}.txt").write_text(text)
        put_in_place(place)
        assert [file.name for file in place.iterdir()] == [f"{text}.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


# ---- policy-best/


def test_the_best_is_in_place_with_the_commit_that_names_it(run: RunDir) -> None:
    driver = Driver(run, 9)
    driver.step(value=0.5)
    assert not run.policy_best.exists()
    driver.step(value=0.25)
    driver.commit()
    assert held(run.policy_best) == "after 1"
    driver.step(value=0.75)
    assert held(run.policy_best) == "after 1"
    driver.commit()
    assert held(run.policy_best) == "after 3"
    assert json.loads((run.policy_best / "attune.json").read_text())["step"] == 3


@pytest.mark.parametrize("larger", [True, False])
def test_an_evaluation_without_its_figure_leaves_the_best_and_the_run_goes_on(run: RunDir, larger: bool) -> None:
    """A policy that answers nothing at one moment has no reward to be chosen by."""
    driver = Driver(run, 9)
    nothing = Evaluation({"evaluation/greedy/failed": 4.0}, None, larger=larger)
    driver.step()
    assert driver.evaluate(nothing)["evaluation/greedy/failed"] == 4.0
    driver.commit()
    assert Driver(run, 9).history.best == {}
    driver.step()
    driver.evaluate(Evaluation({}, 0.5, larger=larger))
    driver.step()
    driver.evaluate(nothing)
    driver.commit()
    assert held(run.policy_best) == "after 2"
    again = Driver(run, 9)
    again.settle()
    assert again.history.best == {"value": 0.5, "step": 1, "measure": MEASURE}
    assert held(run.policy_best) == "after 2"
    without = [event for event in read_jsonl(run.events) if event["event"] == "evaluation_without_figure"]
    assert [(event["step"], event["figure"]) for event in without] == [(0, "greedy/reward"), (2, "greedy/reward")]


def test_a_best_that_was_not_committed_is_forgotten(run: RunDir) -> None:
    driver = Driver(run, 9)
    driver.step(value=0.5)
    driver.commit()
    driver.step(value=0.75)  # killed here
    again = Driver(run, 9)
    again.settle()
    assert again.history.best == {"value": 0.5, "step": 0, "measure": MEASURE}
    assert held(run.policy_best) == "after 1"
    assert not partial_of(run.policy_best).exists()


@pytest.mark.parametrize("at", ["before the swap", "in mid-swap"])
def test_a_best_that_was_committed_comes_to_its_place_after_a_kill(
    run: RunDir, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(run, 9)
    driver.step(value=0.5)
    driver.commit()
    driver.step(value=0.75)
    monkeypatch.setattr("cluster.commits.take_best", lambda *_: None)
    driver.commit()
    if at == "in mid-swap":
        run.policy_best.rename(run.path / "policy-best.replaced")
    again = Driver(run, 9)
    again.settle()
    assert held(run.policy_best) == "after 2"
    assert is_marked(run.policy_best, best_mark(again.history))
    assert {path.name for path in run.path.glob("policy-best*")} == {"policy-best"}


@pytest.fixture
def exporter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of `attune export`, which takes torch and a checkpoint that a learner wrote: a program of two lines."""
    program = tmp_path / "python"
    program.write_text(
        """#!/bin/sh
        [ "$1 $2 $3" = "-m cluster export" ] || exit 2
        mkdir "$5" && basename "$4" > "$5/model.safetensors"
        """
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return program


@pytest.mark.parametrize("kept", ["kept", "not kept", "not exported"])
def test_a_best_of_steps_that_are_gone_is_put_right(run: RunDir, kept: str, exporter: Path) -> None:
    """The newest commit is lost: policy-best/ holds what that one named, the one before names another."""
    driver = Driver(run, 9)
    driver.step(value=0.5)
    if kept != "not kept":
        driver.commit()
    driver.step()
    driver.commit()
    driver.step(value=0.75)
    driver.training.config = recipe(9, keep=3)  # else the commit of the earlier best goes with this one
    driver.commit()
    shutil.rmtree(run.checkpoints / "step_3")
    if kept == "not exported":
        exporter.write_text("#!/bin/sh\necho no room left >&2\nexit 1\n")
    again = Driver(run, 9)
    assert again.history.best == {"value": 0.5, "step": 0, "measure": MEASURE}
    again.settle()
    assert held(run.path / "policy-best.aside") == "after 3"
    events = {event["event"]: event for event in read_jsonl(run.events)}
    assert "policy_best_set_aside" in events
    if kept == "kept":
        assert held(run.policy_best) == "step_1\n"
        assert is_marked(run.policy_best, best_mark(again.history))
        assert again.history.best == {"value": 0.5, "step": 0, "measure": MEASURE}
    else:
        assert not run.policy_best.exists()
        assert again.history.best == {}
        assert ("no room left" if kept == "not exported" else "step_1 is not") in events["best_forgotten"]["why"]
    # What is right stays as it is.
    before = {path: path.stat().st_mtime_ns for path in run.policy_best.rglob("*")}
    again.settle()
    assert {path: path.stat().st_mtime_ns for path in run.policy_best.rglob("*")} == before


def test_the_mark_is_of_the_commit_that_is_there(run: RunDir) -> None:
    """Exported by a later incarnation than the one that committed: the commit's is what the next start compares."""
    finished_run(run, 1)
    shutil.rmtree(run.policy)
    second = Driver(run, 1)
    assert not second.finished
    second.finish()
    assert policy_mark(run, second.history)["incarnation"] == 1
    assert second.history.incarnation == 2
    assert Driver(run, 1).finished
