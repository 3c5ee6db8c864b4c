"""The ledger on a real Redis against a model in Python, in any order of events, with crashes between any two of them.

The model is what the design says, in dictionaries: one state a group, lease order, attempts, the admission limit. After
every event the two agree on every group, and the streams hold exactly what the states say.

Who crashes: the driver, between two events and between any two commands of its commits, its start and its rebuilding of
the ledger; the learner alone; Redis, by SIGKILL, restarted from its log, or from one that lacks its end, or from none.
"""

import os
import signal
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from services.records import Failure, Group, Lease, PolicyVersion, epoch_of
from services.stream.connect import connect
from services.stream.embedded import EmbeddedRedis
from services.stream.ledger import STATES, Ledger, LoadWeights, Settled, Wait
from tests.stream.append_only import end_without

SIZE = 2
KILLS = 3
"""Restarts of Redis in one example: each takes a tenth of a second and more."""
DATA_BUDGET, INFRA_BUDGET = 1, 2
LOSSES = 1
PROMPTS_AN_EPOCH, EPOCHS = 7, 3


@dataclass
class Known:
    """What the model knows of one group."""

    order: int
    state: str = "pending"
    attempt: int = 0
    owner: str | None = None
    expired: bool = False
    payload: bool = False
    entry: bool = False
    step: int | None = None
    version: PolicyVersion | None = None
    failures: dict[str, int] = field(default_factory=lambda: {"infra": 0, "data": 0})
    losses: int = 0

    @property
    def alone(self) -> bool:
        """It is at its last chance."""
        return self.losses == LOSSES and self.state in ("pending", "leased")


class DriverDied(BaseException):
    """The driver's process is gone, between two of its commands."""


def machine(server: EmbeddedRedis, client: redis.Redis, desk_type: Any) -> type[RuleBasedStateMachine]:
    infra, data = desk_type.INFRA, desk_type.DATA

    class LedgerMachine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.run_id = f"model-{uuid4().hex[:12]}"
            self.kills = 0
            client.script_flush()  # one that is not known takes a command more, and would depend on earlier examples
            self.log_began = (server.directory / "appendonly.aof").stat().st_size
            self.new_driver()
            self.groups: dict[str, Known] = {}
            self.version: PolicyVersion | None = None
            self.incarnation, self.step, self.limit, self.epochs = 0, 0, 0, 0
            self.leases: list[tuple[Lease, PolicyVersion]] = []  # ever given: any may be answered, at any time
            self.read: list[tuple[str, Group]] = []  # ever read by a scorer: any may be scored, at any time
            self.manifest: dict[int, list[str]] = {}  # on the disk
            self.failed_in_manifest: dict[str, Failure] = {}
            self.trained: dict[int, list[str]] = {}  # in the learner's memory
            self.batch: tuple[int, list[Group]] | None = None  # the last one that the driver fetched
            self.settled = 0  # epochs that the ledger holds as numbers alone
            self.past: dict[str, set[tuple[str, int]]] = {}  # states and attempts that a group ever had

        def new_driver(self) -> None:
            self.ledger = Ledger(client, self.run_id, lease_losses=LOSSES)
            self.ledger.on_lost = self.rebuild
            self.desk = desk_type(self.ledger)

        def teardown(self) -> None:
            self.ledger.flush()

        # the model

        def among(self, *states: str) -> list[str]:
            return sorted((i for i, g in self.groups.items() if g.state in states), key=lambda i: self.groups[i].order)

        def place_of(self, group_id: str) -> int:
            """A group's place in lease order among those that have not failed: it is trained in step place // SIZE."""
            return len(
                [i for i, g in self.groups.items() if g.state != "failed" and g.order < self.groups[group_id].order]
            )

        def held(self, *states: str) -> list[str]:
            """Those of them that the ledger knows one by one."""
            return [i for i in self.among(*states) if epoch_of(i) >= self.settled]

        def done_in(self, epochs: int) -> Settled:
            """What the manifest has of the first epochs."""
            committed = [i for groups in self.manifest.values() for i in groups if epoch_of(i) < epochs]
            failed = [i for i in self.failed_in_manifest if epoch_of(i) < epochs]
            return Settled(epochs, len(committed), len(failed))

        def epochs_done(self) -> int:
            done = [self.done_in(epochs) for epochs in range(1, self.epochs + 1)]
            return sum(some.committed + some.failed == some.epochs * PROMPTS_AN_EPOCH for some in done)

        def to(self, group_id: str, state: str) -> None:
            group = self.groups[group_id]
            group.state, group.owner, group.expired = state, None, False
            if state in ("pending", "committed", "failed"):
                group.entry = False
            if state in ("pending", "scored", "failed"):
                group.step = None
            if state in ("committed", "failed"):
                group.payload = False
            if state in ("generated", "committed"):
                group.losses = 0
            self.note(group_id)

        def lose(self, group_id: str) -> None:
            self.groups[group_id].losses += 1
            self.to(group_id, "failed" if self.groups[group_id].losses > LOSSES else "pending")

        def note(self, group_id: str) -> None:
            group = self.groups[group_id]
            self.past.setdefault(group_id, set()).add((group.state, group.attempt))

        # events

        @initialize()
        def first_epoch(self) -> None:
            self.register_epoch()
            self.start_learner()

        def register_all(self) -> None:
            for epoch in range(self.epochs):
                base = epoch * PROMPTS_AN_EPOCH
                self.ledger.register(epoch, [(f"{epoch}:p{n}", base + n) for n in range(PROMPTS_AN_EPOCH)])

        @precondition(lambda self: self.epochs < EPOCHS)
        @rule()
        def register_epoch(self) -> None:
            base = self.epochs * PROMPTS_AN_EPOCH
            for n in range(PROMPTS_AN_EPOCH):
                self.groups[f"{self.epochs}:p{n}"] = Known(order=base + n)
            self.epochs += 1
            self.register_all()

        @rule(count=st.integers(1, 6))
        def attach(self, count: int) -> None:
            missing = self.ledger.missing_payload(count)
            assert missing == [i for i in self.among("pending") if not self.groups[i].payload][:count]
            self.ledger.attach({group_id: self.desk.prompt_of(group_id) for group_id in missing})
            for group_id in missing:
                self.groups[group_id].payload = True

        def start_learner(self) -> None:
            self.step = len(self.manifest)
            self.trained = {}
            self.open_gate()

        def open_gate(self) -> None:
            self.version = PolicyVersion(self.incarnation, self.step)
            self.limit = (1 + self.step + 1) * SIZE
            self.ledger.open_gate(self.version, f"w{self.step}", self.limit)

        @rule(owner=st.sampled_from("abc"), current=st.sampled_from([True, True, True, False]), lives=st.booleans())
        def lease(self, owner: str, current: bool, lives: bool) -> None:
            assert self.version is not None
            loaded = self.version if current else PolicyVersion(self.incarnation, self.step - 1)
            answer = self.ledger.lease(owner, loaded, 3600 if lives else 0)
            pending = self.among("pending")
            if not current:
                assert answer == LoadWeights(self.version, f"w{self.step}")
            elif not pending:
                assert answer == Wait("empty")
            elif self.place_of(pending[0]) >= self.limit:
                assert answer == Wait("gate")
            elif not self.groups[pending[0]].payload:
                assert answer == Wait("no_payload")
            elif any(g.alone or self.groups[pending[0]].alone for g in self.groups.values() if g.owner == owner):
                assert answer == Wait("alone")
            else:
                group = self.groups[pending[0]]
                self.to(pending[0], "leased")
                group.attempt += 1
                self.note(pending[0])
                group.owner, group.expired, group.version = owner, not lives, self.version
                assert isinstance(answer, Lease)
                assert (answer.group_id, answer.attempt, answer.order) == (pending[0], group.attempt, group.order)
                self.leases.append((answer, self.version))

        @rule(unanswered=st.sets(st.integers(0, 3)), unscored=st.sets(st.integers(0, 3)), owner=st.sampled_from("abc"))
        def work(self, unanswered: set[int], unscored: set[int], owner: str) -> None:
            """What mostly happens, so that batches come about: an actor leases, answers and has scored, all or some."""
            known_before = len(self.leases)
            for _ in range(4):
                self.attach(4)
                self.lease(owner, True, True)
            given = range(known_before, len(self.leases))
            for index in given:
                if index - known_before not in unanswered:
                    self.answer_nth(index)
            read = self.ledger.read_generated("reader", 9, 1, 3_600_000)
            self.read += read
            for n, (entry, group) in enumerate(read):
                if n not in unscored:
                    self.score_one(entry, group)

        @rule(other=st.sampled_from("abc"), first=st.booleans())
        def slow_actor(self, other: str, first: bool) -> None:
            """An actor loses its lease to another; then both answer, in either order."""
            known_before = len(self.leases)
            self.attach(1)
            self.lease("a", True, False)
            self.expire()
            self.lease(other, True, True)
            answers = list(range(known_before, len(self.leases)))
            for index in answers if first else reversed(answers):
                self.answer_nth(index)

        @rule(dies_again=st.booleans())
        def dead_actor(self, dies_again: bool) -> None:
            """What it held is at its last chance: another that is at work waits, an idle one takes it."""
            self.attach(3)
            self.lease("a", True, True)
            self.lease("b", True, True)
            self.release("a")
            for owner in "bac":
                self.lease(owner, True, True)
            if dies_again:
                self.release("a")

        @rule(staleness=st.sampled_from([1, 1, 0]), then=st.sampled_from(["go on", "commit", "cut off", "crash"]))
        def good_step(self, staleness: int, then: str) -> None:
            """All goes well up to a batch; what comes after it is the question."""
            self.work(set(), set(), "c")
            self.train(True, staleness)
            if then == "crash":
                self.crash(False)
            elif then != "go on" and self.trained:
                self.commit(3 if then == "commit" else 1)

        @rule(emptied=st.booleans())
        def crash_at_work(self, emptied: bool) -> None:
            """And those who were at work do not know of it: their answers come after the new ones were leased."""
            self.work({1, 2}, {0}, "b")
            old = range(max(0, len(self.leases) - 4), len(self.leases))
            self.crash(emptied)
            self.attach(4)
            self.lease("a", True, True)
            self.lease("b", True, True)
            for index in (*old, *range(old.stop, len(self.leases))):
                self.answer_nth(index)
            for entry, group in self.read[-6:]:
                self.score_one(entry, group)

        @rule(stays=st.sampled_from(["leased", "generated", "pending"]))
        def slow_group(self, stays: str) -> None:
            """One group is behind those that come after it: a batch must wait for it."""
            self.attach(1)
            before = len(self.leases)
            self.lease("a", True, True)
            if len(self.leases) > before and stays == "generated":
                self.answer_nth(before)
                self.read += self.ledger.read_generated("slow", 9, 1, 3_600_000)
            self.work(set(), set(), "c")
            if stays == "pending":
                self.release("a")
            self.train(False, None)

        @precondition(lambda self: self.leases)
        @rule(data=st.data())
        def answer(self, data: st.DataObject) -> None:
            self.answer_nth(data.draw(st.integers(max(0, len(self.leases) - 6), len(self.leases) - 1)))

        def answer_nth(self, index: int) -> None:
            lease, version = self.leases[index]
            group = self.groups[lease.group_id]
            assert group.version is not None or group.state != "leased"
            due = group.state == "leased" and group.attempt == lease.attempt and version >= (group.version or version)
            assert self.ledger.put_generated(self.desk.group_of(lease, version)) == due
            if due:
                self.to(lease.group_id, "generated")
                group.entry, group.version = True, version

        @rule(count=st.integers(1, 3), dead=st.booleans())
        def read_some(self, count: int, dead: bool) -> None:
            """A scorer reads, and (for now) does nothing with it; with `dead`, it takes over what others held."""
            self.read += self.ledger.read_generated("reader", count, 1, 0 if dead else 3_600_000)

        @precondition(lambda self: self.read)
        @rule(data=st.data())
        def score(self, data: st.DataObject) -> None:
            self.score_one(*data.draw(st.sampled_from(self.read[-6:])))

        def score_one(self, entry: str, group: Group) -> None:
            known = self.groups[group.group_id]
            due = known.state == "generated" and known.attempt == group.attempt and known.version == group.version
            assert self.ledger.put_scored(entry, self.desk.scored(group)) == due
            if due:
                self.to(group.group_id, "scored")
                known.entry = True

        @precondition(lambda self: self.leases)
        @rule(data=st.data(), failure=st.sampled_from([infra, data]))
        def fail(self, data: st.DataObject, failure: Failure) -> None:
            lease, _ = data.draw(st.sampled_from(self.leases[-6:]))
            budget = DATA_BUDGET if failure.kind == "data" else INFRA_BUDGET
            group = self.groups[lease.group_id]
            said = self.ledger.fail(lease.group_id, lease.attempt, failure, budget)
            if group.state not in ("leased", "generated") or group.attempt != lease.attempt:
                assert said == "late"
                return
            group.failures[failure.kind] += 1
            assert said == ("failed" if group.failures[failure.kind] > budget else "pending")
            self.to(lease.group_id, said)

        @rule()
        def expire(self) -> None:
            due = {i for i in self.among("leased") if self.groups[i].expired}
            assert set(self.ledger.expire_leases()) == due
            for group_id in due:
                self.lose(group_id)

        @rule(owner=st.sampled_from("abc"))
        def release(self, owner: str) -> None:
            held = [i for i in self.among("leased") if self.groups[i].owner == owner]
            assert self.ledger.release(owner) == held
            for group_id in held:
                self.lose(group_id)

        @rule(final=st.booleans(), staleness=st.sampled_from([None, 1, 1, 0]))
        def train(self, final: bool, staleness: int | None) -> None:
            """The learner asks for its batch. One step ahead no group is ever too old; with `staleness` 0 some are."""
            oldest = None if staleness is None else self.step - staleness
            final = final and self.epochs == EPOCHS  # a short batch is the last one
            got = self.ledger.take(self.step, SIZE, final=final, oldest_step=oldest)
            batch = self.among("scored")[:SIZE]
            old = [i for i in batch if oldest is not None and self.groups[i].version[1] < oldest]  # pyright: ignore[reportOptionalSubscript]
            unscored = self.among("pending", "leased", "generated")
            last = self.groups[batch[-1]].order if len(batch) == SIZE else None
            blocked = any(last is None or self.groups[i].order < last for i in unscored)
            assert not old or staleness == 0
            if old:
                assert got is None
                for group_id in old:
                    self.to(group_id, "pending")
            elif blocked or (last is None and not final):
                assert got is None
            else:
                assert got == batch
                if not batch:
                    return
                for group_id in batch:
                    self.to(group_id, "consumed")
                    self.groups[group_id].step = self.step
                assert self.ledger.take(self.step, SIZE) == batch
                self.batch = (self.step, self.ledger.fetch(batch))
                assert [group.group_id for group in self.batch[1]] == batch
                self.trained[self.step] = batch
                self.step += 1
                self.open_gate()

        def write_manifest(self) -> None:
            self.manifest |= self.trained
            why = Failure(kind="data", code="noted", message="in the manifest")
            noted = dict.fromkeys((i for i in self.among("failed") if i not in self.failed_in_manifest), why)
            self.ledger.mark_failed(noted)
            self.failed_in_manifest |= noted

        @precondition(lambda self: self.trained)
        @rule(marked=st.integers(0, 3))
        def commit(self, marked: int) -> None:
            """With `marked` 3 to the end; else the driver dies after it has marked so many groups in the ledger."""
            self.write_manifest()
            if marked == 3:
                for _ in range(2):
                    self.ledger.commit(self.manifest)
                for groups in self.manifest.values():
                    for group_id in groups:
                        step = self.groups[group_id].step
                        self.to(group_id, "committed")
                        self.groups[group_id].step = step
                self.trained = {}
            else:
                some = [(step, i) for step, groups in self.manifest.items() for i in groups][-marked:] if marked else []
                for step, group_id in some:
                    self.ledger.commit({step: [group_id]})
                self.crash(False)

        @rule(emptied=st.sampled_from([False, False, True]))
        def crash(self, emptied: bool) -> None:
            """Everything but the disk is gone; with `emptied`, Redis too. The run starts again from the manifest."""
            if emptied:
                self.ledger.flush()
                self.all_forgotten()
            self.new_driver()
            self.start_driver()
            self.after_start()

        @rule()
        def learner_dies(self) -> None:
            """The driver lives, and goes back to the last commit with the ledger that it has claimed."""
            self.ledger.close_gate()
            self.start_driver()
            self.after_start()

        @precondition(lambda self: self.epochs_done() > self.settled and not self.trained)
        @rule(crashes=st.sampled_from([None, None, False, True]))
        def settle(self, crashes: bool | None) -> None:
            """An epoch is done. Said twice: the second time changes nothing."""
            self.settled = self.epochs_done()
            for _ in range(2):
                self.ledger.settle(self.done_in(self.settled), self.settled * PROMPTS_AN_EPOCH)
            self.agree()
            if crashes is not None:
                self.crash(crashes)

        def all_forgotten(self) -> None:
            self.settled = 0
            for group in self.groups.values():
                group.__dict__.update(Known(group.order).__dict__)

        def start_driver(self) -> None:
            self.trained, self.batch = {}, None
            self.ledger.claim()
            assert self.ledger.settled() == self.done_in(self.ledger.settled().epochs)
            if not any(self.ledger.counts().values()):
                self.settle_anew()
            self.register_all()
            self.ledger.reconcile(self.manifest, self.failed_in_manifest)

        def settle_anew(self) -> None:
            """In a ledger that knows nothing: as much of the manifest as there are whole epochs in it."""
            self.ledger.settle(self.done_in(self.epochs_done()), self.epochs_done() * PROMPTS_AN_EPOCH)

        def after_start(self) -> None:
            self.settled = self.ledger.settled().epochs
            for group_id in self.among("consumed"):  # trained, and its samples lost since: to be made again
                self.to(group_id, "scored" if self.groups[group_id].entry else "pending")
            for group_id in self.among("leased"):
                self.to(group_id, "pending")
            for step, groups in self.manifest.items():
                for group_id in groups:
                    self.to(group_id, "committed")
                    self.groups[group_id].step = step
            for group_id in self.failed_in_manifest:
                self.to(group_id, "failed")
            self.incarnation += 1
            self.start_learner()

        # a driver that dies between two of its commands

        @contextmanager
        def dies_after(self, commands: int, *, done: bool) -> Any:
            """The driver dies at its command number `commands`: before Redis has it, or (`done`) before its reply."""
            execute, number = self.ledger._calls._execute, count(1)

            def until_then(*args: Any) -> Any:
                if (dies := next(number) >= commands) and not done:
                    raise DriverDied
                reply = execute(*args)
                if dies:
                    raise DriverDied
                return reply

            self.ledger._calls._execute = until_then  # pyright: ignore[reportAttributeAccessIssue]
            try:
                yield
            except DriverDied:
                pass
            finally:
                del self.ledger._calls._execute  # the class's own again

        @rule(commands=st.integers(1, 30), done=st.booleans(), again=st.integers(1, 30))
        def driver_dies_while_it_starts(self, commands: int, done: bool, again: int) -> None:
            for number in (commands, again):
                self.new_driver()
                with self.dies_after(number, done=done):
                    self.start_driver()
            self.crash(False)

        @precondition(lambda self: self.trained)
        @rule(commands=st.integers(1, 4), done=st.booleans())
        def driver_dies_while_it_commits(self, commands: int, done: bool) -> None:
            self.write_manifest()
            with self.dies_after(commands, done=done):
                self.ledger.commit(self.trained)
            self.crash(False)

        @rule(commands=st.integers(1, 14), done=st.booleans(), lives=st.booleans())
        def driver_dies_while_it_makes_the_ledger_anew(self, commands: int, done: bool, lives: bool) -> None:
            """Or (`lives`) it is Redis that goes away in the middle, and the driver begins again."""
            with self.dies_after(commands, done=done):
                self.make_anew()
            if lives:
                self.rebuild()
            else:
                self.ledger.forget()  # what is left is a part of what was: not for a model to say
                self.crash(True)

        # a Redis that dies

        def make_anew(self) -> None:
            self.ledger.forget()
            self.ledger.claim()
            self.settle_anew()
            self.register_all()
            self.ledger.rebuild(self.manifest, self.failed_in_manifest, self.since_the_commit(), self.in_hand())
            assert self.version is not None
            self.ledger.open_gate(self.version, f"w{self.step}", self.limit)

        def since_the_commit(self) -> dict[int, list[str]]:
            return {step: groups for step, groups in self.trained.items() if step not in self.manifest}

        def in_hand(self) -> tuple[int, list[Group]] | None:
            return None if self.batch is None or self.batch[0] in self.manifest else self.batch

        def rebuild(self) -> None:
            """What the driver does when Redis has lost something; the model knows it exactly."""
            self.make_anew()
            self.all_forgotten()
            self.settled = self.epochs_done()
            for step, groups in self.manifest.items():
                for group_id in groups:
                    self.to(group_id, "committed")
                    self.groups[group_id].step = step
            for group_id in self.failed_in_manifest:
                self.to(group_id, "failed")
            for step, groups in self.since_the_commit().items():
                for group_id in groups:
                    self.to(group_id, "consumed")
                    self.groups[group_id].step = step
            step, samples = self.in_hand() or (0, [])
            for group in samples:
                self.to(group.group_id, "consumed")
                known = self.groups[group.group_id]
                known.step, known.entry, known.attempt, known.version = step, True, group.attempt, group.version
            for entry, group in self.read[-3:]:  # a scorer that lived through it holds what is no longer there
                assert not self.ledger.put_scored(entry, self.desk.scored(group))
            self.read = []

        @precondition(lambda self: self.kills < KILLS)
        @rule(noticed=st.sampled_from(["look", "take", "commit", "register"]))
        def redis_comes_back_empty(self, noticed: str) -> None:
            self.restart_redis(lambda log: log.unlink())
            self.goes_on(noticed)

        @precondition(lambda self: self.kills < KILLS)
        @rule(
            lost=st.just(0) | st.integers(1, 60),
            torn=st.booleans(),
            noticed=st.sampled_from(["look", "take", "commit", "register"]),
        )
        def redis_is_killed(self, lost: int, torn: bool, noticed: str) -> None:
            """And may lose the end of its log, to the middle of a command: as in a power cut with appendfsync everysec.

            Some of it without that, too: while the disk is busy, it answers before it writes.
            """
            self.restart_redis(lambda log: os.truncate(log, end_without(log, self.log_began, lost, torn)))
            _, holds = self.ledger.look()
            if holds:  # nothing of the driver's is lost: what others wrote last is undone, and done again by them
                self.adopt()
            else:
                self.goes_on(noticed)

        def restart_redis(self, to_its_log: Callable[[Any], None]) -> None:
            self.kills += 1
            os.kill(server.pid, signal.SIGSTOP)
            to_its_log(server.directory / "appendonly.aof")
            server.kill()
            server.start()
            self.log_began = (server.directory / "appendonly.aof").stat().st_size
            client.connection_pool.disconnect()

        def goes_on(self, noticed: str) -> None:
            """Whatever the driver asks first, it is told, and the ledger is made anew before it is answered."""
            if noticed == "take":
                self.train(True, None)
            elif noticed == "commit" and self.trained:
                self.commit(3)
            elif noticed == "register" or noticed == "commit":
                self.register_all()
            else:
                _, holds = self.ledger.look()
                assert not holds
                self.rebuild()

        def adopt(self) -> None:
            prefix = self.ledger._prefix
            assert self.ledger.settled().epochs == self.settled
            self.register_all()  # looks at every group: none is torn
            self.read = []
            for state, ids in self.ledger.states().items():
                for row in self.ledger.rows(state, ids):
                    known = self.groups[row.group_id]
                    assert (state, row.attempt) in self.past[row.group_id]
                    if known.state in ("consumed", "committed"):  # the driver's doing, of which nothing is lost
                        assert (state, row.step) == (known.state, known.step)
                    names = ("prompt", "entry", "failures_infra", "failures_data")
                    known.losses = row.losses
                    prompt, entry, *failures = client.hmget(f"{prefix}group:{row.group_id}", *names)
                    known.state, known.attempt, known.owner, known.step = state, row.attempt, row.owner, row.step
                    known.expired = row.expires_at is not None and row.expires_at <= self.ledger.now() + 60
                    known.version, known.payload, known.entry = row.version, prompt is not None, entry is not None
                    known.failures = dict(zip(("infra", "data"), (int(n or 0) for n in failures), strict=True))

        # what must hold after every event

        @invariant()
        def agree(self) -> None:
            counts = self.ledger.counts()
            assert sum(counts.values()) == len(self.groups)
            for state, number in counts.items():
                rows = list(self.ledger.list(state))  # pyright: ignore[reportArgumentType]
                assert [row.group_id for row in rows] == self.held(state)
                assert number == len(self.among(state))
                for row in rows:
                    known = self.groups[row.group_id]
                    assert (row.order, row.attempt, row.owner) == (known.order, known.attempt, known.owner)
                    assert (row.step, row.losses) == (known.step, known.losses)
                    assert (row.failure is not None) >= (state == "failed")
                    self.note(row.group_id)

        @invariant()
        def streams_hold_what_the_states_say(self) -> None:
            prefix = self.ledger._prefix
            assert client.xlen(f"{prefix}stream:generated") == len(self.among("generated"))
            assert client.xlen(f"{prefix}stream:scored") == len(
                [i for i in self.among("scored", "consumed") if self.groups[i].entry]  # trained, and lost since
            )
            hashes = [key.decode() for key in client.scan_iter(match=prefix + "group:*", count=1000)]
            assert len(hashes) == len(self.held(*STATES))
            for key in hashes:
                known = self.groups[key.removeprefix(prefix + "group:")]
                fields = client.hmget(key, "state", "entry", "prompt")
                assert fields[0] == known.state.encode()
                assert (fields[1] is not None, fields[2] is not None) == (known.entry, known.payload)

        @invariant()
        def nobody_holds_a_last_chance_and_another_group(self) -> None:
            marked = {group_id.decode() for group_id in client.smembers(f"{self.ledger._prefix}alone")}
            assert marked == {i for i, group in self.groups.items() if group.alone}
            leased = [self.groups[i] for i in self.among("leased")]
            for owner in (group.owner for group in leased if group.alone):
                assert len([group for group in leased if group.owner == owner]) == 1

        @invariant()
        def once_and_in_order(self) -> None:
            all_of_it = [i for groups in (self.manifest | self.trained).values() for i in groups]
            assert len(all_of_it) == len(set(all_of_it))
            assert self.failed_in_manifest.keys().isdisjoint(all_of_it)
            orders = [self.groups[i].order for groups in self.manifest.values() for i in groups]
            assert orders == sorted(orders)  # batches are taken in lease order, crashes or not

    return LedgerMachine


def check(tmp_path: Path, desk_type: Any, examples: int, steps: int) -> None:
    """On a server of its own: it is killed."""
    with EmbeddedRedis(tmp_path / "redis", "always") as server:
        client = connect(server.url, socket_timeout_s=120.0)  # asked twice, where a disk is busy, is another example
        run_state_machine_as_test(
            machine(server, client, desk_type),
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                database=None,
                print_blob=True,
                phases=[Phase.generate],  # a failure is shown as it was found: shrinking takes minutes here
                suppress_health_check=list(HealthCheck),
            ),
        )
        client.close()


def test_the_ledger_is_its_model(tmp_path: Path, new_desk: Any) -> None:
    check(tmp_path, new_desk, 20, 40)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_ledger_is_its_model_for_long(tmp_path: Path, new_desk: Any) -> None:
    check(tmp_path, new_desk, 200, 80)
