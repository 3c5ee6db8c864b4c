"""Several nodes: the learner's ranks spread strictly over them, and one node lost in mid-run."""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from learner.commit import latest_committed

PROGRAM = Path(__file__).with_name("nodes_program.py")
SPREAD = {"learner_placement": "strict_spread", "learner_cpus": 1}


def on_two_nodes(recipe: Path, run: Path, *, add_back: bool) -> dict[str, Any]:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(recipe), str(run), str(int(add_back))],
        env={**os.environ, **token, "RAY_ADDRESS": ""},
        capture_output=True,
        text=True,
        timeout=2400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def events_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow  # three raylets, and a learner that comes up twice: two minutes each on a quiet machine
@pytest.mark.timeout(2500)
@pytest.mark.parametrize("least", [2, 1])
def test_a_lost_node_is_waited_for_or_done_without(recipe: Callable[..., Path], tmp_path: Path, least: int) -> None:
    """With `min_ranks` 2 the run waits for a node and says so; with 1 it goes on on the one that is left."""
    run = tmp_path / "shared" / "run"
    path = recipe(
        run={"epochs": 3},
        learner={"ranks": 2, "min_ranks": least},
        rollout={"actors": 2, "min_actors": 1},
        cluster={**SPREAD, "start_s": 600, "batch_s": 600, "step_s": 600},
    )
    told = on_two_nodes(path, run, add_back=least == 2)
    assert told["code"] == 0, told["said"]
    assert sorted(told["ranks"]) == sorted(told["nodes"])  # one on each, none on the head
    assert set(told["rollouts"]) <= set(told["nodes"])
    events = events_of(run)
    kinds = [event["event"] for event in events]
    assert "learner_died" in kinds
    assert ("waiting_for_room" in kinds) == (least == 2)
    assert ("fewer_ranks" in kinds) == (least == 1)
    starts = [event["incarnation"] for event in events if event["event"] == "start"]
    assert starts == list(range(1, len(starts) + 1))
    assert len(starts) >= 2  # more where the machine was so busy that the ranks did not meet at once

    # Nothing was lost with the node, and nothing was trained twice.
    commit = latest_committed(run).commit
    assert commit is not None
    groups = [group for step in commit.manifest["steps"].values() for group in step]
    prompts = json.loads((run / "salience.json").read_text(encoding="utf-8"))["n"]
    assert len(groups) == len(set(groups)) == 3 * prompts - len(commit.manifest["failed"])
