"""A run whose Redis dies under it: it goes on by itself, every prompt is trained once, and it says what happened."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from learner.commit import latest_committed
from services.stream.connect import connect
from services.stream.embedded import EmbeddedRedis, address_in

Start = Callable[..., subprocess.Popen[str]]
Recipe = Callable[..., Path]

EPOCHS = 4


def events_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def at_each_step(process: subprocess.Popen[str], run: Path, strike: Callable[[], None], strikes: int) -> str:
    """Strikes once after each of the first `strikes` steps; the run's output, once it has ended."""
    metrics, struck, end = run / "metrics.jsonl", 0, time.monotonic() + 200
    while struck < strikes and time.monotonic() < end and process.poll() is None:
        if metrics.exists() and len(metrics.read_text(encoding="utf-8").splitlines()) > struck:
            strike()
            struck += 1
        time.sleep(0.02)
    output, _ = process.communicate(timeout=200)
    assert struck == strikes, output
    assert process.returncode == 0, output
    return output


def assert_every_prompt_was_trained_once(run: Path) -> None:
    commit = latest_committed(run).commit
    assert commit is not None
    groups = [group for step in commit.manifest["steps"].values() for group in step]
    prompts = json.loads((run / "salience.json").read_text(encoding="utf-8"))["n"] * EPOCHS
    assert len(groups) == len(set(groups)) == prompts
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["ledger"] == {**dict.fromkeys(summary["ledger"], 0), "committed": prompts}
    # What was trained is what is in the log: each sample once.
    samples = [
        json.loads(line)["sample_id"]
        for shard in sorted((run / "samples").glob("step_*.jsonl"))
        for line in shard.read_text(encoding="utf-8").splitlines()
    ]
    assert len(samples) == len(set(samples)) == 2 * prompts


@pytest.mark.slow  # the same at the level of ledger and driver: tests/cluster/test_recovery.py
@pytest.mark.parametrize("staleness", [0, 1])
def test_the_embedded_redis_is_killed(start: Start, recipe: Recipe, tmp_path: Path, staleness: int) -> None:
    run = tmp_path / "run"
    # Steps enough for the third kill, which may come two seconds after the first.
    path = recipe(run={"seed": 3, "max_staleness": staleness, "epochs": EPOCHS})
    process = start("train", str(path), "--run-dir", str(run))

    def looks() -> int:
        return sum(event["event"] in ("ledger_kept", "ledger_rebuilt") for event in events_of(run))

    kills = count()

    def kill() -> None:
        before, end = next(kills), time.monotonic() + 60
        while looks() < before and process.poll() is None:  # once a second: two restarts within it would be one look
            assert time.monotonic() < end
            time.sleep(0.02)
        address = json.loads((run / "redis" / "address.json").read_text(encoding="utf-8"))
        os.kill(address["pid"], signal.SIGKILL)

    at_each_step(process, run, kill, 3)
    assert_every_prompt_was_trained_once(run)
    said = [event["event"] for event in events_of(run)]
    assert said.count("redis_restarted") == 3
    # Which of the two depends on what the log had of the last answers: a busy disk is written to after them.
    assert said.count("ledger_kept") + said.count("ledger_rebuilt") >= 2
    assert address_in(run / "redis") is None


@pytest.mark.slow
def test_a_redis_of_ones_own_comes_back_empty(
    start: Start, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with EmbeddedRedis(tmp_path / "elsewhere") as server:
        password, place = server.url.removeprefix("redis://:").split("@")
        monkeypatch.setenv("ATTUNE_TEST_REDIS", password)
        path = recipe(
            run={"seed": 3, "max_staleness": 1, "epochs": EPOCHS},
            stream={"url": f"redis://{place}", "password_env": "ATTUNE_TEST_REDIS"},
        )
        process = start("train", str(path), "--run-dir", str(run))

        def empty() -> None:
            (server.directory / "appendonly.aof").unlink()
            server.kill()
            time.sleep(0.5)
            server.start()

        at_each_step(process, run, empty, 3)
        left = connect(server.url).keys("*")
    assert all(key.startswith(b"attune:{") for key in left)
    assert_every_prompt_was_trained_once(run)
    events = events_of(run)
    assert sum(event["event"] == "ledger_rebuilt" for event in events) >= 2
    assert not [event for event in events if event["event"] == "redis_restarted"]  # not ours to restart
    assert password not in (run / "events.jsonl").read_text(encoding="utf-8")
