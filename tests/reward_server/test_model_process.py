"""Models in processes of a server alone: the scores of a local model; what dies is made up for, and comes back."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from reward_server.config import RewardSection
from reward_server.local_model import LocalModel
from reward_server.model_process import ModelFailed, ModelProcess, model_processes, visible_gpus
from reward_server.placement import share_gpus
from reward_server.replicas import ReplicaAway, ReplicaLost, ReplicaRunner
from reward_server.runner import ModelFacts, ModelSpec, Output, Row
from services.errors import Deadline, UserError

ROWS = [Row(tuple(range(7, 7 + n))) for n in (3, 9, 30)]
FACTS = ModelFacts("sequence", "1", None, ("score",))


def spec_of(model: Any, task: Any = "sequence") -> ModelSpec:
    return ModelSpec(str(model), None, task, "float32", "cpu", "reward.sources.s")


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def test_a_process_scores_like_a_local_model_dies_and_comes_back(scoring_models: dict[str, Path]) -> None:
    spec = spec_of(scoring_models["sequence"])
    here = LocalModel(spec)
    expected = here.run(ROWS)
    process = ModelProcess(spec, threads=1, run_s=3.0)
    runner = ReplicaRunner("s", [process], restarts=1)
    try:
        assert runner.facts == here.facts
        assert runner.run(ROWS) == expected  # bit for bit
        with pytest.raises(ModelFailed, match=r"^IndexError at ") as failure:
            runner.run([Row((10**6,))])
        assert "1000000" not in str(failure.value)
        assert runner.living() == 1
        # More than a socket holds is sent to one that does not read, and the wait ends.
        first = process.pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        with pytest.raises(ReplicaLost, match="did not answer within 3 s"):
            runner.run([Row(tuple(range(7)) * 50_000)])
        with pytest.raises(ReplicaLost, match="no replica of s lives"):
            runner.run(ROWS)
        until(lambda: runner.living() == 1)
        assert runner.run(ROWS) == expected
        assert process.pid != first
    finally:
        runner.close()
    with pytest.raises(ReplicaLost):
        runner.run(ROWS)
    assert process.pid is not None
    assert not psutil.pid_exists(process.pid)


def test_what_cannot_be_loaded_is_said_and_every_wait_ends() -> None:
    section = RewardSection.model_validate({"sources": {"s": {"kind": "preference", "model": "/nowhere"}}})
    with pytest.raises(UserError, match=r"reward\.sources\.s\.model: /nowhere .*no such directory"):
        model_processes(section)
    slow = ModelProcess(spec_of("/nowhere"), threads=1, load_s=0.01)
    with pytest.raises(Deadline, match=r"a model to load: reward\.sources\.s"):
        slow.start()
    assert not psutil.pid_exists(slow.pid)


def test_a_process_ends_with_the_server_however_that_ends() -> None:
    program = """
from reward_server.model_process import ModelProcess
from reward_server.runner import ModelSpec
process = ModelProcess(ModelSpec("/nowhere", None, "sequence", "float32", "cpu", "s"), threads=1)
process._spawn()
print(process.pid, flush=True)
input()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, text=True) as server:
        assert server.stdout is not None
        child = psutil.Process(int(server.stdout.readline()))
        time.sleep(1)  # it waits for its model's name
        child.send_signal(signal.SIGTERM)
        assert child.is_running()
        server.kill()
        child.wait(20)


def test_a_signal_ends_a_server_whose_models_are_still_loading() -> None:
    program = """
from reward_server.config import RewardSection
from reward_server.serve import run
run(RewardSection.model_validate({"sources": {"s": {"kind": "preference", "model": "/nowhere"}}}), port=0)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=-1) as server:
        until(lambda: bool(psutil.Process(server.pid).children()))
        (child,) = psutil.Process(server.pid).children()
        server.terminate()
        assert server.wait(20) == -signal.SIGTERM
        child.wait(20)


class Scripted:
    """A replica in this process that does what it is told: a number is an output, an exception is raised."""

    def __init__(self, *acts: float | Exception, facts: Sequence[ModelFacts | Exception] = (FACTS,)) -> None:
        self.acts = list(acts)
        self.facts = list(facts)
        self.stopped = False
        self.runs = 0
        self.starts = 0

    def start(self) -> ModelFacts:
        self.starts += 1
        facts = self.facts.pop(0) if len(self.facts) > 1 else self.facts[0]
        if isinstance(facts, Exception):
            raise facts
        return facts

    def run(self, rows: Sequence[Row]) -> list[Output]:
        self.runs += 1
        act = self.acts.pop(0) if self.acts else 1.0
        if isinstance(act, Exception):
            raise act
        return [[[act]] for _ in rows]

    def stop(self) -> None:
        self.stopped = True


def test_a_models_own_error_is_tried_elsewhere_once_and_costs_no_replica() -> None:
    first, second = Scripted(RuntimeError("first")), Scripted(RuntimeError("second"), 2.0)
    runner = ReplicaRunner("s", [first, second], restarts=0)
    with pytest.raises(RuntimeError, match="second"):
        runner.run(ROWS)
    assert (first.runs, second.runs, runner.living()) == (1, 1, 2)
    assert runner.run(ROWS) in ([[[1.0]]] * 3, [[[2.0]]] * 3)


def test_a_replica_is_started_again_as_often_as_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward_server.replicas.BACKOFF_S", 0.01)
    lost = ReplicaLost("gone")
    mortal = Scripted(lost, 1.0, lost, lost)
    runner = ReplicaRunner("s", [mortal, lasting := Scripted()], restarts=2)
    for _ in range(12):
        assert runner.run(ROWS) == [[[1.0]]] * 3  # the other takes what was in flight
        until(lambda: runner.living() == 2 or mortal.starts == 3)
    until(lambda: runner.living() == 1)
    assert (mortal.starts, mortal.runs) == (3, 4)
    runner.close()
    assert lasting.stopped


def test_a_replica_that_has_lived_for_long_has_its_restarts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward_server.replicas.BACKOFF_S", 0.01)
    monkeypatch.setattr("reward_server.replicas.STEADY_S", 0.0)
    mortal = Scripted(*[ReplicaLost("gone")] * 5)
    runner = ReplicaRunner("s", [mortal], restarts=1)
    for _ in range(4):
        with pytest.raises(ReplicaLost):
            runner.run(ROWS)
        until(lambda: runner.living() == 1)
    monkeypatch.setattr("reward_server.replicas.STEADY_S", 1e9)
    with pytest.raises(ReplicaLost):
        runner.run(ROWS)
    until(lambda: not any(thread.name == "restarts-s" for thread in threading.enumerate()))
    assert (runner.living(), mortal.starts) == (0, 5)
    runner.close()


def test_a_replica_that_comes_back_with_another_model_is_not_used() -> None:
    changed = Scripted(ReplicaLost("gone"), facts=(FACTS, ModelFacts("sequence", "2", None, ("score",))))
    runner = ReplicaRunner("s", [changed], restarts=5)
    with pytest.raises(ReplicaLost, match="gone"):
        runner.run(ROWS)
    until(lambda: changed.stopped)
    with pytest.raises(ReplicaLost, match="no replica of s lives"):
        runner.run(ROWS)
    assert changed.runs == 1


GONE = ReplicaLost("Ray does not start it again")
LATE = Deadline(waited_for="a model to load", who="a model's actor", seconds=1)


def test_a_server_begins_with_the_replicas_that_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward_server.replicas.BACKOFF_S", 0.01)
    gone, late = Scripted(facts=(GONE,)), Scripted(facts=(LATE, FACTS))
    runner = ReplicaRunner("s", [gone, Scripted(), late], restarts=2, needs_all=False)
    assert runner.facts == FACTS
    assert runner.run(ROWS) == [[[1.0]]] * 3
    until(lambda: runner.living() == 2 and gone.starts == 3)  # one comes, the other has its restarts and no more
    assert (gone.runs, late.starts) == (0, 2)
    for _ in range(4):
        assert runner.run(ROWS) == [[[1.0]]] * 3
    assert late.runs > 0
    runner.close()


def test_a_server_does_not_wait_for_a_replica_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward_server.replicas.LATE_S", 0.05)
    comes = threading.Event()

    class Slow(Scripted):
        def start(self) -> ModelFacts:
            assert comes.wait(60)
            return super().start()

    runner = ReplicaRunner("s", [Scripted(), slow := Slow()], restarts=1, needs_all=False)
    assert (runner.living(), runner.run(ROWS)) == (1, [[[1.0]]] * 3)
    comes.set()
    until(lambda: runner.living() == 2)
    for _ in range(4):
        assert runner.run(ROWS) == [[[1.0]]] * 3
    assert (slow.starts, slow.runs) == (1, 2)
    runner.close()


def test_waiting_for_a_place_uses_up_no_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward_server.replicas.BACKOFF_S", 0.01)
    away = ReplicaAway(waited_for="a place", who="a model's actor", seconds=1)
    mortal = Scripted(ReplicaLost("gone"), facts=(FACTS, away, away, away, FACTS))
    runner = ReplicaRunner("s", [mortal], restarts=1)
    with pytest.raises(ReplicaLost, match="gone"):
        runner.run(ROWS)
    until(lambda: runner.living() == 1)
    assert (mortal.starts, runner.run(ROWS)) == (5, [[[1.0]]] * 3)
    runner.close()


@pytest.mark.parametrize(("needs_all", "other", "error"), [
    (True, FACTS, GONE), (False, LATE, GONE), (False, UserError("no such model"), UserError("no such model")),
])  # fmt: skip
def test_a_server_does_not_begin_without_any_replica_or_with_a_model_that_cannot_be_loaded(
    needs_all: bool, other: ModelFacts | Exception, error: Exception
) -> None:
    replicas = [Scripted(facts=(GONE,)), Scripted(facts=(other,)), Scripted(facts=(other,))]
    with pytest.raises(type(error), match=str(error)):
        ReplicaRunner("s", replicas, restarts=2, needs_all=needs_all)
    assert all(replica.stopped and replica.starts == 1 for replica in replicas)


def test_replicas_are_of_one_model() -> None:
    other = Scripted(facts=[ModelFacts("sequence", "2", None, ("score",))])
    with pytest.raises(ValueError, match="2 replicas of 2 models"):
        ReplicaRunner("s", [Scripted(), other], restarts=0)
    assert other.stopped


def test_gpus_are_shared_out() -> None:
    asked = {"none": (2, 0.0), "half": (2, 0.5), "whole": (1, 1.0), "two": (1, 2.0)}
    assert share_gpus(asked, ["0", "1", "4", "5"]) == {
        "none": [None, None],
        "two": ["0,1"],
        "whole": ["4"],
        "half": ["5", "5"],
    }
    with pytest.raises(UserError, match=r"reward\.sources\.half\.gpus: 0\.5 for each of 3 replicas.*sees, 3, too few"):
        share_gpus({"half": (3, 0.5)}, ["3"])
    with pytest.raises(UserError, match="none, too few"):
        share_gpus({"whole": (1, 1.0)}, [])


def test_the_gpus_that_are_seen_are_those_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", " 3,GPU-5 ")
    assert visible_gpus() == ("3", "GPU-5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == ()
