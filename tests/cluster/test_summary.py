"""summary.json: means over the first and the last steps, and how the run ended."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config
from cluster.recipe import resolve
from cluster.run_dir import RunDir
from cluster.summary import WINDOW, write_summary

CONFIG: Config = resolve({"run": {"name": "mine"}, "data": {}, "policy": {"model": "m"}}, "test")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def summary(run: RunDir, stopped: str | None = None, committed: int = 0) -> dict[str, Any]:
    write_summary(run, CONFIG, stopped, committed, 12.5, {"committed": 3, "failed": 1})
    return json.loads(run.summary.read_text(encoding="utf-8"))


def test_the_first_and_the_last_steps_are_means(run: RunDir) -> None:
    steps = 2 * WINDOW + 5
    for step in range(steps):
        figures: dict[str, Any] = {"reward/mean": float(step), "incarnation": 1, "note": "text"}
        if step % WINDOW == 3:
            figures["evaluation/greedy/reward"] = step / 2
        run.write_metrics(step, figures)
    found = summary(run, committed=steps)
    assert found["steps"] == found["committed_steps"] == steps
    assert found["first"] == {"reward/mean": (WINDOW - 1) / 2, "incarnation": 1.0, "evaluation/greedy/reward": 1.5}
    # A figure that not every step has is a mean over those that have it.
    last = range(steps - WINDOW, steps)
    assert found["last"]["reward/mean"] == sum(last) / WINDOW
    assert found["last"]["evaluation/greedy/reward"] == sum(s / 2 for s in last if s % WINDOW == 3)


def test_how_it_ended_and_how_often_it_was_started(run: RunDir) -> None:
    run.event("start", incarnation=1)
    run.event("committed", step=2)
    run.event("start", incarnation=2)
    run.write_metrics(0, {"a": 1})
    found = summary(run, stopped="SIGTERM", committed=1)
    assert {key: found[key] for key in ("name", "ended", "signal", "starts", "seconds_this_start", "ledger")} == {
        "name": "mine",
        "ended": "stopped",
        "signal": "SIGTERM",
        "starts": 2,
        "seconds_this_start": 12.5,
        "ledger": {"committed": 3, "failed": 1},
    }
    assert found["first"] == found["last"] == {"a": 1.0}
    assert summary(run)["ended"] == "finished"


def test_a_run_without_a_step_has_a_summary(run: RunDir) -> None:
    found = summary(run, stopped="SIGINT")
    assert (found["steps"], found["starts"], found["first"], found["last"]) == (0, 0, {}, {})
