"""A run's ledger through restarts of its Redis, by the driver's own moves: nothing lost, nothing trained twice."""

import os
import signal
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import redis

from cluster.feed import Feed
from cluster.files import read_jsonl
from cluster.history import History
from cluster.recovery import Recovery
from cluster.run_dir import RunDir
from services.records import Group, PolicyVersion, Prompt, epoch_of
from services.stream.connect import connect
from services.stream.embedded import EmbeddedRedis
from services.stream.errors import LedgerTaken
from services.stream.keeper import KeptRedis
from services.stream.ledger import Ledger, Wait
from tests.cluster.actors import Actors

SIZE, STALENESS = 3, 1


class Run:
    """A driver without a learner: trains by noting which groups it was given, commits every second step."""

    def __init__(self, path: Path, url: str, prompts: int) -> None:
        self.dir = RunDir(path / "run")
        self.dir.path.mkdir(exist_ok=True)
        made = [Prompt(prompt_id=f"p{i}", source="tests", text=f"prompt {i}") for i in range(prompts)]
        self.feed = Feed(made, seed=5, epochs=2, steps=None, groups_per_step=SIZE)
        self.history = History(run_id="run", incarnation=1)
        self.url = url
        self.ledger = Ledger(connect(url), "run", patience_s=20)
        self.window = (STALENESS + 3) * SIZE
        self.recovery = Recovery(self.ledger, self.feed, self.history, self.dir, window=self.window, lease_s=5.0)
        self.trained: list[str] = []
        self.ledger.claim()
        self.feed_prompts()
        self.ledger.reconcile({}, {})
        self.open_gate(0)

    def feed_prompts(self) -> None:
        self.feed.register(self.ledger, len(self.trained) + self.window)
        self.feed.top_up(self.ledger, self.window)

    def open_gate(self, step: int) -> None:
        self.feed_prompts()
        version = PolicyVersion(1, step)
        self.ledger.open_gate(version, f"w{step}", self.feed.admission_limit(step, STALENESS))

    def batch(self, step: int) -> list[str] | None:
        groups = self.ledger.take(step, SIZE, final=self.feed.all_registered, oldest_step=step - STALENESS)
        return groups if groups is not None and self.recovery.hold(step, groups) else None

    def step(self, disturb: Any = None) -> bool:
        step = self.history.steps_done
        groups = None
        while groups is None:
            groups = self.batch(step)
            self.ledger.expire_leases()
            self.ledger.wait_scored(20)
        if disturb is not None:
            disturb()
        if not groups:
            return False
        # As the learner's ranks do: a process of its own, which waits for what is put back.
        fetched: list[Group] = []
        ranks = Ledger(connect(self.url), "run", patience_s=20)
        learner = threading.Thread(target=lambda: fetched.extend(ranks.fetch(groups, wait_s=10)))
        learner.start()
        while learner.is_alive():
            self.recovery._looked = 0.0
            self.recovery.look()
            learner.join(0.05)
        assert [group.group_id for group in fetched] == groups
        self.trained += groups
        self.history.steps[step] = groups
        self.open_gate(step + 1)
        if (step + 1) % 2 == 0:
            self.commit()
        return True

    def commit(self) -> None:
        done, since = self.history.steps_done, range(self.history.committed_steps, self.history.steps_done)
        self.history.committed_steps = done  # the manifest is on the disk
        self.ledger.commit({step: self.history.steps[step] for step in since})

    def events(self) -> list[str]:
        return [event["event"] for event in read_jsonl(self.dir.events)]


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[KeptRedis]:
    with KeptRedis(EmbeddedRedis(tmp_path / "redis", "always"), restarts=50, told=lambda *_, **__: None) as server:
        yield server


def forget(url: str, _: KeptRedis) -> None:
    connect(url).execute_command("FLUSHALL")


def kill(_: str, kept: KeptRedis) -> None:
    os.kill(kept.server.pid, signal.SIGKILL)


def lose_the_log(_: str, kept: KeptRedis) -> None:
    """A server without persistence that is restarted: everybody's connection breaks, and it comes back empty."""
    (kept.server.directory / "appendonly.aof").unlink()
    kill(_, kept)


def lose_the_tail(_: str, kept: KeptRedis) -> None:
    """A power cut with appendfsync everysec: the log ends earlier, perhaps in mid-command."""
    os.kill(kept.server.pid, signal.SIGSTOP)  # what it wrote after the cut would stand behind a hole
    log = kept.server.directory / "appendonly.aof"
    os.truncate(log, log.stat().st_size * 2 // 3)
    kill(_, kept)


@pytest.mark.parametrize("disaster", [forget, kill, lose_the_log, lose_the_tail])
def test_every_group_is_trained_once_and_in_order_whatever_redis_does(
    tmp_path: Path, kept: KeptRedis, disaster: Any
) -> None:
    """Between any two steps and in the middle of some: the disaster strikes at every second one."""
    url = kept.server.url
    run = Run(tmp_path, url, prompts=11)
    actors = Actors(url)
    try:
        step = 0
        while run.step((lambda: disaster(url, kept)) if step % 2 else None):
            step += 1
            if step % 3 == 0:
                disaster(url, kept)
        run.commit()
    finally:
        actors.stop()
    undisturbed = [f"{epoch}:p{i}" for epoch in range(2) for i in epoch_order_of(run, epoch)]
    assert run.trained == undisturbed
    assert run.ledger.counts() == {
        "pending": 0, "leased": 0, "generated": 0, "scored": 0, "consumed": 0, "committed": 22, "failed": 0,
    }  # fmt: skip
    settled = run.ledger.settled()
    assert settled == run.history.settled(settled.epochs)
    assert {row.step for row in run.ledger.list("committed")} == {
        step for step, groups in run.history.steps.items() if epoch_of(groups[-1]) >= settled.epochs
    }
    said = run.events()
    assert said.count("ledger_rebuilt") + said.count("ledger_kept") >= 4
    assert (said.count("ledger_rebuilt") >= 4) >= (disaster in (forget, lose_the_log))


def epoch_order_of(run: Run, epoch: int) -> Any:
    from services.text.order import epoch_order

    return epoch_order(11, run.feed._seed, epoch)


def test_a_restart_without_loss_is_said_and_changes_nothing(tmp_path: Path, kept: KeptRedis) -> None:
    run = Run(tmp_path, kept.server.url, prompts=7)
    actors = Actors(kept.server.url)
    try:
        assert run.step()
        assert run.step()
        assert run.step()
        before = {state: run.ledger.ids(state) for state in ("consumed", "committed")}
        kill("", kept)
        run.recovery._looked = 0.0
        run.recovery.look()
    finally:
        actors.stop()
    assert run.events() == ["ledger_kept"]
    assert {state: run.ledger.ids(state) for state in ("consumed", "committed")} == before


def test_scored_samples_that_vanish_are_generated_again(tmp_path: Path, kept: KeptRedis) -> None:
    """Somebody trims the stream of a Redis that is shared: nothing was restarted, and the batch cannot be had."""
    run = Run(tmp_path, kept.server.url, prompts=7)
    client: redis.Redis = connect(kept.server.url)
    actors = Actors(kept.server.url)
    try:
        assert run.step()
        groups = None
        while groups is None:
            groups = run.ledger.take(1, SIZE)
        client.execute_command("XTRIM", "attune:{run}:stream:scored", "MAXLEN", "0")
        assert not run.recovery.hold(1, groups)
        assert run.step()
        assert run.history.steps[1] == groups
    finally:
        actors.stop()


def test_a_gate_that_was_shut_stays_shut_when_the_ledger_is_made_anew(tmp_path: Path, kept: KeptRedis) -> None:
    """The learner starts again, and the run goes back: nothing is leased under weights of the incarnation before."""
    run = Run(tmp_path, kept.server.url, prompts=7)
    for shut in (run.ledger.close_gate, run.ledger.claim):
        run.open_gate(0)
        shut()
        forget(kept.server.url, kept)
        run.recovery._looked = 0.0
        run.recovery.look()
        assert run.ledger.lease("actor", PolicyVersion(1, 0), 5.0) == Wait("gate")
    assert run.events() == ["ledger_rebuilt"] * 2


@pytest.mark.parametrize("at", [4, 8, 12])
def test_the_gate_is_opened_again_where_redis_loses_something_in_the_middle_of_a_rebuilding(
    tmp_path: Path, kept: KeptRedis, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    run = Run(tmp_path, kept.server.url, prompts=7)
    execute, calls = run.ledger._calls._execute, count(1)

    def lose_something(*args: Any) -> Any:
        if next(calls) == at:
            forget(kept.server.url, kept)
        return execute(*args)

    forget(kept.server.url, kept)
    monkeypatch.setattr(run.ledger._calls, "_execute", lose_something)
    run.feed.register_again(run.ledger)
    monkeypatch.undo()
    gate = run.ledger.gate()
    assert gate is not None
    assert gate.version == PolicyVersion(1, 0)
    assert run.ledger.counts()["pending"] == 14


def two_drivers(path: Path, url: str) -> tuple[Run, Run]:
    """Of one ledger: the second comes when the first is at work, from a copy of its directory."""
    runs: list[Run] = []
    for name in ("first", "second"):
        (path / name).mkdir()
        runs.append(Run(path / name, url, prompts=7))
    return runs[0], runs[1]


@pytest.mark.parametrize(
    "call",
    [
        lambda run: run.ledger.take(0, SIZE),
        lambda run: run.open_gate(1),
        lambda run: run.recovery.look(),
        lambda run: run.recovery.rebuild("samples are lost"),
        lambda run: run.ledger.close_gate(),
        lambda run: run.ledger.claim(),
    ],
)
def test_of_two_drivers_the_earlier_ends_and_the_later_is_not_disturbed(
    tmp_path: Path, kept: KeptRedis, call: Any
) -> None:
    first, second = two_drivers(tmp_path, kept.server.url)
    for _ in range(2):
        first.recovery._looked = 0.0
        with pytest.raises(LedgerTaken, match="taken by another driver"):
            call(first)
    gate = second.ledger.gate()
    assert gate is not None
    assert gate.limit > 0
    actors = Actors(kept.server.url)
    try:
        while second.step():
            pass
    finally:
        actors.stop()
    assert len(second.trained) == 14
    assert first.events() + second.events() == []


@pytest.mark.parametrize("emptied", [False, True])
def test_a_redis_that_lost_the_claim_of_the_later_driver_is_still_the_later_ones(
    tmp_path: Path, kept: KeptRedis, emptied: bool
) -> None:
    """It names the earlier one as its owner, or nobody."""
    (tmp_path / "first").mkdir()
    first = Run(tmp_path / "first", kept.server.url, prompts=7)
    log = kept.server.directory / "appendonly.aof"
    before = log.stat().st_size
    (tmp_path / "second").mkdir()
    second = Run(tmp_path / "second", kept.server.url, prompts=7)
    os.kill(kept.server.pid, signal.SIGSTOP)
    os.truncate(log, 0 if emptied else before)
    kill("", kept)
    second.recovery._looked = 0.0
    second.recovery.look()
    assert second.events() == ["ledger_rebuilt"]
    with pytest.raises(LedgerTaken):
        first.ledger.take(0, SIZE)
    assert second.ledger.take(0, SIZE) is None
    assert second.events() == ["ledger_rebuilt"]
