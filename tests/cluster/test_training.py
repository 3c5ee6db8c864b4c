"""How a run ends that cannot go on: with what it lacks, and not with who waited for it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cluster.files import read_jsonl
from cluster.history import History
from cluster.plan import Part
from cluster.recipe import resolve
from cluster.restarts import RestartBudget
from cluster.run_dir import RunDir
from cluster.running import Kept
from cluster.supervise import Supervisor
from cluster.training import Training, remove_older
from cluster.training_data import TrainingData
from services.errors import PlanError
from services.records import Failure, Lease, PolicyVersion
from services.stream.connect import connect
from services.stream.embedded import EmbeddedRedis
from services.stream.errors import StreamUnavailable
from services.stream.ledger import Ledger
from services.text.sources import load_prompts


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path / "redis") as server:
        yield server


def training_on(server: EmbeddedRedis, path: Path, ray: Any = None) -> Training:
    """A run that has not begun, without actors."""
    source = path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(4)), "utf-8")
    data = {"source": str(source), "validation_fraction": 0.0, "test_fraction": 0.0}
    cluster = {"start_s": 1.0, "batch_s": 60.0}
    config = resolve({"run": {"groups_per_step": 2}, "data": data, "policy": {"model": "m"}, "cluster": cluster}, "t")
    run, ledger = RunDir(path), Ledger(connect(server.url), "run", patience_s=0.2)
    supervisor = Supervisor(ray, "run", run, ledger, RestartBudget(3, 0.0), progress_s=600.0)
    anything: Any = SimpleNamespace(close=lambda _: None, check=lambda: None, signal_name=None)
    prompts = TrainingData(load_prompts(config.data), None)
    history = History("run", incarnation=1)
    return Training(
        config, run, history, prompts, ledger, supervisor, anything, path, server.url, anything, Console(quiet=True)
    )


def test_a_redis_that_was_given_up_is_the_reason_that_is_said(server: EmbeddedRedis, tmp_path: Path) -> None:
    training = training_on(server, tmp_path)
    server.kill()

    def given_up() -> None:
        raise StreamUnavailable("the run's Redis died 4 times")

    training.supervisor.watch = given_up
    with pytest.raises(StreamUnavailable, match="died 4 times"):
        training.run_to_the_end()


def test_what_the_driver_before_left_is_gone_on_with_while_its_best_policy_is_written_again(
    server: EmbeddedRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export of an old commit takes long enough for Redis to be looked at."""
    before = training_on(server, tmp_path)
    before.batches.reconcile()
    before.batches.give_prompts(0)
    before.ledger.open_gate(PolicyVersion(1, 0), "weights.json", 2)
    lease = before.ledger.lease("actor", PolicyVersion(1, 0), 60.0)
    assert isinstance(lease, Lease)
    failure = Failure(kind="data", code="too_long", message="longer than the model takes")
    assert before.ledger.fail(lease.group_id, lease.attempt, failure, 0) == "failed"
    training = training_on(server, tmp_path)

    def export(*_: Any) -> None:
        monkeypatch.setattr("cluster.recovery.LOOK_S", 0.0)
        training._tick()

    def no_room() -> dict[str, Part]:
        raise PlanError("far enough")

    monkeypatch.setattr("cluster.training.settle_best", export)
    monkeypatch.setattr(training, "_plan", no_room)
    with pytest.raises(PlanError, match="far enough"):
        training.run_to_the_end()
    assert "ledger_rebuilt" not in [event["event"] for event in read_jsonl(training.run.events)]
    assert training.ledger.ids("failed") == [lease.group_id]


def test_the_weights_that_stay_are_the_newest_whatever_the_clock_says(tmp_path: Path) -> None:
    names = ["v1_9", "v1_10", "v2_4", "v10_0"]
    for age, name in enumerate(names):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    remove_older(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"v2_4", "v10_0"}


@pytest.mark.timeout(120)
def test_a_run_whose_rollout_actors_find_no_room_does_not_wait_for_ever(
    server: EmbeddedRedis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_full = SimpleNamespace(available_resources_per_node=lambda: {"node": {}})
    ray: Any = SimpleNamespace(_private=SimpleNamespace(state=one_full))
    training = training_on(server, tmp_path, ray)
    never: Any = None
    training.supervisor.keep(Kept("rollout", Part("rollout", 1, 1.0), never), missing=True)
    monkeypatch.setattr(training, "_begin", training.batches.reconcile)
    with pytest.raises(PlanError, match=r"for 1 s \(cluster\.start_s\) the cluster had no room for another"):
        training.run_to_the_end()
