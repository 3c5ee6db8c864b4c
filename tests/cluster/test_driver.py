"""What a driver finds when it starts, and leaves when it is stopped before it has begun."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.cli import run_command
from cluster.config import Config
from cluster.driver import say_finished, shared_weights, train
from cluster.files import read_jsonl
from cluster.history import History, Steps
from cluster.janitor import began_at
from cluster.recipe import resolve, save_resolved
from cluster.run_dir import RunDir
from services.errors import UserError


def recipe(**cluster: Any) -> Config:
    tree = {"run": {"name": "mine"}, "data": {}, "policy": {"model": "m"}, "cluster": cluster}
    return resolve(tree, "test")


def test_weights_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    """A copied run directory has the run's id: whoever goes on with the copy must not take the original's weights."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as living:
        kept = tmp_path / f"attune-abc-{living.pid}.{began_at(living.pid)}"
        reused = tmp_path / f"attune-abc-{living.pid}.1"
        others = [tmp_path / f"attune-abc-{name}" for name in ("999999999.5", "999999999", "nonsense")]
        elsewhere = tmp_path / "attune-abd-999999999.5"
        for directory in (kept, reused, *others, elsewhere):
            (directory / "v1_0").mkdir(parents=True)
        with shared_weights(recipe(weights_dir=str(tmp_path)), "abc") as own:
            assert set(tmp_path.iterdir()) == {kept, elsewhere, own}
        assert set(tmp_path.iterdir()) == {kept, elsewhere}
        assert living.stdin is not None
        living.stdin.close()


def test_a_recipe_that_cannot_be_written_leaves_the_one_that_is_there(tmp_path: Path) -> None:
    """Else the run could not be resumed: the next start compares with what stands there."""
    path = tmp_path / "config.yaml"
    save_resolved(recipe(), path)
    before = path.read_text(encoding="utf-8")
    (tmp_path / "config.yaml.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        save_resolved(recipe(restarts=7), path)
    assert path.read_text(encoding="utf-8") == before


def test_a_run_killed_before_its_last_word_says_it_at_the_next_start(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    history = History("abc", 2, steps=Steps({0: ["0:a", "0:b"], 1: ["0:c"]}), committed_steps=2)
    run.summary.write_text(json.dumps({"ended": "finished", "committed_steps": 1}))  # before it was extended
    for _ in range(2):
        say_finished(recipe(), run, history)
        assert [event["event"] for event in read_jsonl(run.events)] == ["finished"]
        summary = json.loads(run.summary.read_text(encoding="utf-8"))
        assert (summary["ended"], summary["committed_steps"]) == ("finished", 2)
        assert {state: count for state, count in summary["ledger"].items() if count} == {"committed": 3}
        assert json.loads(run.status.read_text(encoding="utf-8"))["phase"] == "finished"


def test_a_run_directory_is_absolute_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks work in other directories than the driver, most of all in a Ray cluster that was joined."""
    found: list[Path] = []

    def stop_here(_: Config, run: RunDir) -> None:
        found.append(run.path)
        raise UserError("far enough")

    monkeypatch.setattr("cluster.driver.load_training_data", stop_here)
    monkeypatch.setattr("cluster.driver.check_engine", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="far enough"):
        train(recipe(), Path("runs/mine"), resume="auto", console=Console())
    assert found == [tmp_path / "runs" / "mine"]


def test_a_signal_while_ray_comes_up_stops_the_run(
    tiny_decoder: Path, questions_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Ray takes SIGTERM for itself meanwhile, and ends the process."""

    @contextmanager
    def coming_up(_: object) -> Iterator[None]:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        os.kill(os.getpid(), signal.SIGTERM)
        yield

    monkeypatch.setattr("cluster.driver.ray_cluster", coming_up)
    before = signal.getsignal(signal.SIGTERM)
    path, run = tmp_path / "recipe.yaml", RunDir(tmp_path / "run")
    tree = {"data": {"source": str(questions_file)}, "policy": {"model": str(tiny_decoder)}}
    path.write_text(json.dumps({**tree, "rollout": {"engine": "transformers"}}), encoding="utf-8")
    assert run_command(["train", str(path), "--run-dir", str(run.path)]) == 1  # 4 is for those with a commit
    assert "Stopped by SIGTERM after 0 steps" in capfd.readouterr().out
    assert [event["event"] for event in read_jsonl(run.events)] == ["stopped"]
    assert json.loads(run.summary.read_text(encoding="utf-8"))["signal"] == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) == before
