"""Invariant 5: the same run twice, and a run that was stopped or killed and resumed, give the same weights bit for bit
and the same metrics; one step ahead, every group is accounted for after the same.
"""

import hashlib
import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from learner.commit import latest_committed
from services.vocabulary import NONDETERMINISTIC

Attune = Callable[..., tuple[int, str]]
Start = Callable[..., subprocess.Popen[str]]
Recipe = Callable[..., Path]


def reproducible(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in NONDETERMINISTIC} for line in lines]


def weights(run: Path) -> str:
    return hashlib.sha256((run / "policy" / "model.safetensors").read_bytes()).hexdigest()


def interrupt(start: Start, recipe: Path, run: Path, at_step: int, number: signal.Signals) -> tuple[int, str]:
    """Starts a run and sends it a signal soon after `at_step` lines of metrics; (exit code, output)."""
    process = start("train", str(recipe), "--run-dir", str(run))
    end = time.monotonic() + 200
    metrics = run / "metrics.jsonl"
    while time.monotonic() < end and process.poll() is None:
        if metrics.exists() and len(metrics.read_text(encoding="utf-8").splitlines()) >= at_step:
            break
        time.sleep(0.02)
    time.sleep(random.random() * 0.3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


TWO = {"rollout": {"actors": 2}, "learner": {"ranks": 2}}
"""Two of each: what is reproducible must not hang on which actor had which prompt, nor on the ranks' timing."""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("uninterrupted") / "run"


@pytest.fixture
def uninterrupted(attune: Attune, recipe: Recipe, kept: Path, tmp_path: Path) -> Path:
    """A copy of a run that nothing disturbed; it is made once."""
    if not (kept / "summary.json").exists():
        code, output = attune("train", str(recipe(**TWO)), "--run-dir", str(kept))
        assert code == 0, output
    return Path(shutil.copytree(kept, tmp_path / "uninterrupted"))


def test_a_run_that_is_stopped_then_killed_goes_on_bit_for_bit(
    uninterrupted: Path, start: Start, attune: Attune, recipe: Recipe, tmp_path: Path
) -> None:
    path = recipe(**{**TWO, "rollout": {"actors": 1}})  # the uninterrupted run has two: it must not matter
    run = tmp_path / "interrupted"
    # From the third step on there is a commit wherever the signal falls: a step under way cannot be committed.
    code, output = interrupt(start, path, run, random.randint(3, 4), signal.SIGTERM)
    assert code == 4, output
    commit = latest_committed(run).commit
    assert commit is not None
    assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["signal"] == "SIGTERM"

    code, output = interrupt(start, path, run, random.randint(5, 6), signal.SIGKILL)  # goes on, and is killed
    assert code == -signal.SIGKILL, output

    code, output = attune("train", str(path), "--run-dir", str(run), "--resume", "auto")
    assert code == 0, output
    assert reproducible(run) == reproducible(uninterrupted)
    assert weights(run) == weights(uninterrupted)
    starts = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [event["incarnation"] for event in starts if event["event"] == "start"] == [1, 2, 3]


def kill_actor(actor: str) -> None:
    """Kills one actor by its class's name; the session's Ray is a child of this process, and so are its actors."""
    found = [child for child in psutil.Process().children(recursive=True) if actor in " ".join(child.cmdline())]
    assert found
    random.choice(found).send_signal(signal.SIGKILL)


@pytest.mark.slow  # in the suite a rank dies in test_chaos.py, and a driver bit for bit above
def test_a_learner_that_lost_a_rank_goes_on_inside_the_run_bit_for_bit(
    uninterrupted: Path, start: Start, recipe: Recipe, tmp_path: Path
) -> None:
    run = tmp_path / "bereft"
    process = start("train", str(recipe(**TWO)), "--run-dir", str(run))
    metrics, at_step = run / "metrics.jsonl", random.randint(3, 5)
    end = time.monotonic() + 200
    while time.monotonic() < end and process.poll() is None:
        if metrics.exists() and len(metrics.read_text(encoding="utf-8").splitlines()) >= at_step:
            break
        time.sleep(0.02)
    time.sleep(random.random() * 0.3)
    kill_actor("LearnerWorker")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [event["error"] for event in events if event["event"] == "learner_died"]
    assert [event["incarnation"] for event in events if event["event"] == "start"] == [1, 2]
    assert reproducible(run) == reproducible(uninterrupted)
    assert weights(run) == weights(uninterrupted)


@pytest.mark.slow
def test_one_step_ahead_accounts_for_every_group_after_a_kill(
    start: Start, attune: Attune, recipe: Recipe, tmp_path: Path
) -> None:
    run = tmp_path / "ahead"
    path = recipe(run={"max_staleness": 1})
    code, output = interrupt(start, path, run, 3, signal.SIGKILL)
    assert code == -signal.SIGKILL, output
    code, output = attune("train", str(path), "--run-dir", str(run), "--resume", "auto")
    assert code == 0, output
    commit = latest_committed(run).commit
    assert commit is not None
    groups = [group for step in commit.manifest["steps"].values() for group in step]
    prompts = json.loads((run / "salience.json").read_text(encoding="utf-8"))["n"]
    assert len(groups) == len(set(groups)) == prompts
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["ledger"] == {**dict.fromkeys(summary["ledger"], 0), "committed": prompts}
    staleness = [row["staleness/max"] for row in reproducible(run)]
    assert max(staleness) == 1.0


@pytest.mark.slow  # the same way back as past a damaged commit, from a path
def test_an_older_commit_can_be_gone_back_to(uninterrupted: Path, attune: Attune, recipe: Recipe) -> None:
    expected, before = reproducible(uninterrupted), weights(uninterrupted)
    checkpoint = uninterrupted / "checkpoints" / "step_2"
    code, output = attune("train", str(recipe(**TWO)), "--run-dir", str(uninterrupted), "--resume", str(checkpoint))
    assert code == 0, output
    assert reproducible(uninterrupted) == expected
    assert weights(uninterrupted) == before


@pytest.mark.slow  # that it is passed over is tests/learner_engine/test_commit.py's; here, that the run goes on
def test_a_damaged_commit_is_passed_over(uninterrupted: Path, attune: Attune, recipe: Recipe) -> None:
    before = weights(uninterrupted)
    latest = latest_committed(uninterrupted).commit
    assert latest is not None
    (latest.path / "learner.json").write_text("{}", encoding="utf-8")
    code, output = attune("train", str(recipe(**TWO)), "--run-dir", str(uninterrupted), "--resume", "auto")
    assert code == 0, output
    events = (uninterrupted / "events.jsonl").read_text(encoding="utf-8")
    assert "checkpoint_refused" in events
    assert weights(uninterrupted) == before
