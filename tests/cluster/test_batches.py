"""Batches from commit to commit: epochs that are done leave the ledger, and a run goes on from any of its commits."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import redis

from cluster.batches import Batches
from cluster.feed import groups_of_epoch
from cluster.files import read_jsonl
from cluster.history import History, Steps
from cluster.recipe import resolve
from cluster.run_dir import RunDir
from cluster.training_data import TrainingData
from services.records import Failure, Lease, PolicyVersion
from services.stream.connect import connect
from services.stream.embedded import EmbeddedRedis
from services.stream.errors import LedgerTaken
from services.stream.ledger import Ledger, Settled
from services.text.sources import load_prompts
from tests.cluster.actors import Actors

PROMPTS, SIZE, EPOCHS = 6, 2, 4


class Driver:
    """The driver's part of a run without a learner; a commit after every step."""

    def __init__(
        self,
        path: Path,
        url: str,
        manifest: dict[str, Any] | None = None,
        *,
        prompts: int = PROMPTS,
        size: int = SIZE,
        epochs: int = EPOCHS,
    ) -> None:
        source = path / "prompts.jsonl"
        source.write_text("".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(prompts)), "utf-8")
        data = {"source": str(source), "validation_fraction": 0.0, "test_fraction": 0.0}
        run = {"groups_per_step": size, "seed": 4, "epochs": epochs, "max_staleness": 0}
        config = resolve({"run": run, "data": data, "policy": {"model": "m"}}, "test")
        manifest = manifest or {"incarnation": 0, "steps": {}}
        self.history = History("run", incarnation=manifest["incarnation"] + 1)
        self.history.steps = Steps({int(step): groups for step, groups in manifest["steps"].items()})
        self.history.committed_steps = self.history.steps_done
        self.dir = RunDir(path)
        self.ledger = Ledger(connect(url), "run", patience_s=20)
        splits = TrainingData(load_prompts(config.data), None)
        self.prompts = splits.splits.train
        self.batches = Batches(config, self.dir, self.history, splits, self.ledger)
        self.batches.reconcile()
        self.open_gate()

    def open_gate(self) -> None:
        step = self.history.steps_done
        self.batches.give_prompts(step)
        self.ledger.open_gate(PolicyVersion(self.history.incarnation, step), f"w{step}", self.batches.limit(step))

    def step(self) -> None:
        step = self.history.steps_done
        self.history.steps[step] = self.batches.wait(step, lambda: False, lambda _: None)
        self.open_gate()
        self.history.committed_steps = step + 1
        self.manifest = cast(dict[str, Any], json.loads(json.dumps(self.history.manifest(), default=dict)))
        self.batches.commit({step: self.history.steps[step]})

    def to_the_end(self) -> None:
        while self.history.steps_done < self.batches.feed.total_steps:
            self.step()

    def sizes(self) -> list[int]:
        return [len(groups) for groups in self.history.steps.values()]

    def events(self) -> list[str]:
        return [event["event"] for event in read_jsonl(self.dir.events)]


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with EmbeddedRedis(tmp_path / "redis") as server:
        actors = Actors(server.url)
        try:
            yield server.url
        finally:
            actors.stop()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """One that nobody works at, and that keeps what it has answered."""
    with EmbeddedRedis(tmp_path / "redis", "always") as server:
        yield server


def log_of(server: EmbeddedRedis) -> Path:
    return server.directory / "appendonly.aof"


def start_again(server: EmbeddedRedis, kept: int) -> None:
    """A server that comes back with the first `kept` bytes of its log."""
    os.kill(server.pid, signal.SIGSTOP)
    os.truncate(log_of(server), kept)
    server.kill()
    server.start()


def lease_of(driver: Driver, ttl_s: float = 60.0) -> Lease:
    found = driver.ledger.lease("actor", PolicyVersion(driver.history.incarnation, driver.history.steps_done), ttl_s)
    assert isinstance(found, Lease), found
    return found


def look(driver: Driver) -> None:
    driver.batches._recovery._looked = 0.0
    driver.batches.look()


def groups_of(driver: Driver) -> list[str]:
    return [group for groups in driver.history.steps.values() for group in groups]


def held(url: str) -> int:
    return sum(1 for _ in cast(redis.Redis, connect(url)).scan_iter(match="attune:{run}:group:*", count=1000))


def test_a_run_holds_three_epochs_however_long_it_is(tmp_path: Path, url: str) -> None:
    driver = Driver(tmp_path, url)
    most = 0
    while driver.history.steps_done < driver.batches.feed.total_steps:
        driver.step()
        counts = driver.ledger.counts()
        assert counts["committed"] == len(groups_of(driver))
        most = max(most, held(url))
    assert driver.batches.feed.total_steps == EPOCHS * PROMPTS // SIZE
    assert most <= 3 * PROMPTS  # the one under way, the next, and the last until the commit after it
    assert driver.ledger.settled() == Settled(EPOCHS - 1, (EPOCHS - 1) * PROMPTS, 0)
    assert len(set(groups_of(driver))) == EPOCHS * PROMPTS


@pytest.mark.parametrize("back", [1, 2, 5, 7])
def test_a_run_goes_on_from_an_earlier_commit_with_the_same_batches(tmp_path: Path, url: str, back: int) -> None:
    """The newest commits are damaged: what was settled after them is no longer so."""
    driver = Driver(tmp_path, url)
    manifests = [driver.history.manifest()]
    for _ in range(8):
        driver.step()
        manifests.append(driver.manifest)
    assert driver.ledger.settled().epochs == 2
    resumed = Driver(tmp_path, url, manifests[8 - back])
    assert ("ledger_forgotten" in resumed.events()) == (8 - back < 2 * PROMPTS // SIZE)
    assert resumed.ledger.counts()["committed"] == (8 - back) * SIZE
    for _ in range(back):
        resumed.step()
    assert groups_of(resumed) == groups_of(driver)


@pytest.mark.parametrize("lost", [False, True])
def test_a_restart_begins_where_the_ledger_was_settled(tmp_path: Path, url: str, lost: bool) -> None:
    """Also where its Redis has lost everything: the epochs that are done come back as numbers."""
    driver = Driver(tmp_path, url)
    for _ in range(8):
        driver.step()
    if lost:
        connect(url).execute_command("FLUSHALL")
    resumed = Driver(tmp_path, url, driver.manifest)
    assert resumed.ledger.settled() == Settled(2, 2 * PROMPTS, 0)
    assert held(url) <= 2 * PROMPTS
    for _ in range(4):
        resumed.step()
    assert resumed.ledger.counts()["committed"] == EPOCHS * PROMPTS
    assert len(set(groups_of(resumed))) == EPOCHS * PROMPTS
    assert "ledger_forgotten" not in resumed.events()


def test_a_failure_that_redis_loses_after_it_was_noted_is_a_failure_all_the_same(
    tmp_path: Path, server: EmbeddedRedis
) -> None:
    """Else the group would be trained on, and stand in the manifest twice."""
    driver = Driver(tmp_path, server.url)
    lease = lease_of(driver)
    before = log_of(server).stat().st_size
    failure = Failure(kind="data", code="empty_response", message="nothing")
    assert driver.ledger.fail(lease.group_id, lease.attempt, failure, 0) == "failed"
    driver.batches.note_failures()
    assert driver.history.failed == {lease.group_id: failure}
    start_again(server, before)
    look(driver)
    assert driver.ledger.ids("failed") == [lease.group_id]
    assert driver.events()[-1] == "ledger_rebuilt"


def test_failures_that_are_noted_already_cost_no_call(tmp_path: Path, server: EmbeddedRedis) -> None:
    driver = Driver(tmp_path, server.url)
    lease = lease_of(driver)
    driver.ledger.fail(lease.group_id, lease.attempt, Failure(kind="data", code="empty", message="nothing"), 0)
    driver.batches.note_failures()
    before = log_of(server).stat().st_size
    driver.batches.note_failures()
    assert log_of(server).stat().st_size == before
    assert driver.events().count("group_failed") == 1


class Killed(BaseException):
    """The driver's process is gone."""


def test_a_settling_that_was_cut_off_is_finished_and_nothing_is_forgotten(
    tmp_path: Path, server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a call for every 500 groups: a kill after the first leaves numbers that no manifest has."""
    prompts = 601
    driver = Driver(tmp_path, server.url, prompts=prompts, size=prompts + 1)
    in_order = [group for epoch in range(2) for group, _, _ in groups_of_epoch(driver.prompts, 4, epoch)]
    steps = {"0": in_order[: prompts + 1]}
    resumed = Driver(tmp_path, server.url, {"incarnation": 1, "steps": steps}, prompts=prompts, size=prompts + 1)
    execute = resumed.ledger._calls.script

    def killed_after_it(name: str, *args: Any) -> Any:
        reply = execute(name, *args)
        if name == "settle":
            raise Killed
        return reply

    monkeypatch.setattr(resumed.ledger._calls, "script", killed_after_it)
    with pytest.raises(Killed):
        resumed.batches.feed.settle(resumed.ledger, resumed.history.settled(1))
    assert resumed.ledger.settled() == Settled(1, 500, 0)
    again = Driver(tmp_path, server.url, {"incarnation": 2, "steps": steps}, prompts=prompts, size=prompts + 1)
    assert again.ledger.settled() == Settled(1, prompts, 0)
    assert again.ledger.counts()["committed"] == prompts + 1
    assert "ledger_forgotten" not in again.events()


def test_more_epochs_after_a_short_last_batch_leave_no_prompt_out(tmp_path: Path, url: str) -> None:
    first = Driver(tmp_path, url, size=4, epochs=1)
    first.to_the_end()
    assert first.sizes() == [4, 2]
    resumed = Driver(tmp_path, url, first.manifest, size=4, epochs=2)
    resumed.to_the_end()
    assert resumed.sizes() == [4, 2, 4, 2]
    assert len(set(groups_of(resumed))) == 2 * PROMPTS
    assert "regenerated" not in resumed.ledger.counters()  # nothing was leased a step too early


def test_fewer_epochs_leave_none_of_the_later_ones_to_fill_the_last_batch(tmp_path: Path, url: str) -> None:
    first = Driver(tmp_path, url, size=4, epochs=3)
    first.step()
    assert first.ledger.counts()["pending"] + 4 > PROMPTS  # of the second epoch, too
    resumed = Driver(tmp_path, url, first.manifest, size=4, epochs=1)
    assert "ledger_forgotten" in resumed.events()
    resumed.to_the_end()
    assert resumed.sizes() == [4, 2]
    assert len(set(groups_of(resumed))) == PROMPTS
    again = Driver(tmp_path, url, resumed.manifest, size=4, epochs=1)
    assert again.events().count("ledger_forgotten") == 1
    assert again.batches.feed.total_steps == again.history.steps_done


def test_fewer_epochs_than_were_trained_are_no_fault(tmp_path: Path, url: str) -> None:
    first = Driver(tmp_path, url, size=4, epochs=3)
    for _ in range(2):
        first.step()
    resumed = Driver(tmp_path, url, first.manifest, size=4, epochs=1)
    assert resumed.batches.feed.total_steps == resumed.history.steps_done == 2
    assert resumed.ledger.counts()["committed"] == 8


def test_a_commit_to_a_ledger_that_another_driver_took_ends_the_run(tmp_path: Path, server: EmbeddedRedis) -> None:
    """Going back to it would take the ledger from the other, which would take it back."""
    driver = Driver(tmp_path, server.url)
    Driver(tmp_path, server.url)
    with pytest.raises(LedgerTaken):
        driver.batches.commit({0: driver.ledger.ids("pending")[:SIZE]})
    with pytest.raises(LedgerTaken):
        driver.batches.reconcile()


def test_a_lease_that_ended_while_redis_was_away_is_its_owners_still(tmp_path: Path, server: EmbeddedRedis) -> None:
    """The owner could not renew it meanwhile: it gets the time to do so before the lease is taken from it."""
    driver = Driver(tmp_path, server.url)
    lease = lease_of(driver, ttl_s=0.05)
    start_again(server, log_of(server).stat().st_size)
    time.sleep(0.1)
    rounds = 0

    def between() -> bool:
        nonlocal rounds
        look(driver)
        rounds += 1
        if rounds == 2:
            raise Killed
        return False

    with pytest.raises(Killed):
        driver.batches.wait(0, between, lambda _: None)
    assert driver.events()[-1] == "ledger_kept"
    assert driver.ledger.renew("actor", lease.group_id, lease.attempt, 60.0)
    assert driver.ledger.counters() == {}
