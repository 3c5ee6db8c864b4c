"""A Redis that comes back empty, or without its last writes, while driver, learner and actors live."""

import threading
import time
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any
from uuid import uuid4

import pytest
import redis

from services.records import PolicyVersion
from services.stream.connect import connect
from services.stream.errors import LedgerError, LedgerLost, StreamLost
from services.stream.ledger import Ledger, Wait

V1 = PolicyVersion(1, 1)
STEP = 2


class Driver:
    """What a driver knows of a run of ten groups: one step committed, one trained, one batch in hand, one failed."""

    def __init__(self, desk: Any) -> None:
        self.desk, self.ledger = desk, desk.ledger
        self.ids: list[str] = desk.fill(10)
        desk.make_scored(5)
        assert self.ledger.take(0, STEP) == self.ids[:2]
        self.ledger.open_gate(PolicyVersion(0, 1), "w1", 10)
        self.committed = {0: self.ids[:2]}
        self.ledger.commit(self.committed)
        assert self.ledger.take(1, STEP) == self.ids[2:4]
        self.trained = {1: self.ids[2:4]}
        desk.lease("w", PolicyVersion(0, 1))
        failing = desk.lease("w", PolicyVersion(0, 1))
        self.ledger.fail(failing.group_id, failing.attempt, desk.DATA, 0)
        self.failed = {failing.group_id: desk.DATA}
        self.ledger.open_gate(V1, "w2", 10)
        self.batch: tuple[int, Sequence[Any]] | None = None

    def make_anew(self) -> None:
        gate = self.ledger.opened
        self.ledger.forget()
        self.ledger.claim()
        self.ledger.opened = gate
        self.ledger.register(0, [(group_id, n) for n, group_id in enumerate(self.ids)])
        self.ledger.rebuild(self.committed, self.failed, self.trained, self.batch)
        self.attach()
        assert gate is not None
        self.ledger.open_gate(gate.version, gate.weights, gate.limit)

    def attach(self) -> None:
        missing = self.ledger.missing_payload(10)
        self.ledger.attach({group_id: self.desk.prompt_of(group_id) for group_id in missing})

    def states(self) -> list[str]:
        found = {i: state for state in self.ledger.counts() for i in self.ledger.ids(state)}
        return [found[i] for i in self.ids]


@pytest.fixture
def driver(client: redis.Redis, new_desk: Any) -> Iterator[Driver]:
    made = Driver(new_desk(Ledger(client, f"anew-{uuid4().hex[:8]}")))
    yield made
    made.ledger.flush()


def empty(driver: Driver, client: redis.Redis) -> None:
    """As a FLUSHALL does, or a Redis that keeps nothing and is restarted."""
    for key in client.scan_iter(match=driver.ledger._prefix + "*"):
        client.delete(key)


def test_every_write_of_the_driver_notices_an_empty_redis(driver: Driver, client: redis.Redis) -> None:
    """Above all the take at the end: to it, nothing left would look like all done."""
    empty(driver, client)
    ledger = driver.ledger
    for call in (
        lambda: ledger.take(2, STEP, final=True),
        lambda: ledger.open_gate(PolicyVersion(1, 2), "w3", 12),
        lambda: ledger.commit(driver.trained),
        lambda: ledger.register(1, [("1:p0", 10)]),
    ):
        with pytest.raises(LedgerLost, match=r"127\.0\.0\.1.*not where its driver left it"):
            call()
    assert not client.keys(ledger._prefix + "*")
    assert ledger.lease("actor", V1, 9) == Wait("gate")


def test_a_ledger_made_anew_is_what_the_driver_knows(driver: Driver, client: redis.Redis) -> None:
    assert driver.states() == ["committed"] * 2 + ["consumed"] * 2 + ["scored", "leased", "failed"] + ["pending"] * 3
    driver.ledger.on_lost = driver.make_anew
    empty(driver, client)
    assert driver.ledger.take(2, STEP) is None  # noticed, made anew, asked again
    assert driver.states() == ["committed"] * 2 + ["consumed"] * 2 + ["pending"] * 2 + ["failed"] + ["pending"] * 3
    driver.desk.make_scored(5, V1)
    assert driver.ledger.take(2, STEP) == driver.ids[4:6]
    driver.ledger.commit({**driver.trained, 2: driver.ids[4:6]})
    assert driver.states() == ["committed"] * 6 + ["failed"] + ["scored"] * 3
    assert {row.step for row in driver.ledger.list("committed")} == {0, 1, 2}


def test_answers_to_leases_of_before_are_late_and_the_counters_stay(driver: Driver) -> None:
    lease = driver.desk.lease("slow", V1)
    driver.desk.generate(1, V1)
    ((entry, group),) = driver.ledger.read_generated("scorer", 9, 1, 60_000)
    counters = driver.ledger.counters()
    assert counters == {"failures_data": 1}
    driver.make_anew()
    assert driver.ledger.counters() == counters
    assert not driver.ledger.put_scored(entry, driver.desk.scored(group))
    assert not driver.ledger.put_generated(driver.desk.group_of(lease, V1))
    assert driver.ledger.read_generated("scorer", 9, 1, 60_000) == []
    assert driver.ledger.counters() == {**counters, "late": 1, "late_scores": 1}


@pytest.mark.parametrize("torn", ["in no state", "in two", "in another"])
def test_a_ledger_that_is_torn_is_noticed_by_its_registration(driver: Driver, client: redis.Redis, torn: str) -> None:
    """What a script wrote in part: it writes hash and sets in one, so they never differ otherwise."""
    group, prefix = driver.ids[4], driver.ledger._prefix
    if torn != "in two":
        client.zrem(f"{prefix}state:scored", group)
    if torn != "in no state":
        client.zadd(f"{prefix}state:pending", {group: 4})
    again = [(group_id, n) for n, group_id in enumerate(driver.ids)]
    with pytest.raises(LedgerLost, match=rf"group {group} is not in the one state"):
        driver.ledger.register(0, again)
    driver.ledger.on_lost = driver.make_anew
    driver.ledger.register(0, again)
    assert driver.states() == ["committed"] * 2 + ["consumed"] * 2 + ["pending"] * 2 + ["failed"] + ["pending"] * 3


def test_the_batch_in_hand_goes_back_onto_the_stream(driver: Driver, client: redis.Redis) -> None:
    driver.desk.ledger.release("w")
    driver.desk.make_scored(1, V1)
    batch = driver.ledger.take(2, STEP)
    assert batch == driver.ids[4:6]
    groups = driver.ledger.fetch(batch)
    driver.batch = (2, groups)
    empty(driver, client)
    with pytest.raises(LedgerError, match="unknown"):
        driver.ledger.fetch(batch)
    driver.make_anew()
    assert driver.ledger.fetch(batch) == groups
    assert driver.ledger.take(2, STEP) == batch
    driver.ledger.rebuild(driver.committed, driver.failed, driver.trained, driver.batch)  # nothing is put back twice
    assert client.xlen(f"{driver.ledger._prefix}stream:scored") == 2
    # The driver dies after all: the batch is taken again, in the same step and order.
    driver.ledger.reconcile(driver.committed, driver.failed)
    driver.attach()
    driver.ledger.open_gate(PolicyVersion(2, 1), "w", 10)
    driver.desk.make_scored(2, PolicyVersion(2, 1))  # those that were trained, whose samples are lost
    assert driver.ledger.take(1, STEP) == driver.ids[2:4]
    assert driver.ledger.take(2, STEP) == batch


@pytest.mark.parametrize("lost", range(1, 9))
def test_a_tail_that_was_lost_is_noticed_before_anything_is_trained_twice(
    desk: Any, client: redis.Redis, lost: int
) -> None:
    """The state of `lost` events ago: every key as it was then, as after a power cut with appendfsync everysec."""
    ledger: Ledger = desk.ledger
    prefix = ledger._prefix
    past: list[dict[bytes, Any]] = []

    def note() -> None:
        past.append({key: client.dump(key) for key in client.scan_iter(match=prefix + "*")})

    ids = desk.fill(6)
    desk.make_scored(4)
    events = (
        lambda: ledger.take(0, 2),
        lambda: ledger.open_gate(PolicyVersion(0, 1), "w1", 6),
        lambda: ledger.commit({0: ids[:2]}),
        lambda: ledger.take(1, 2),
        lambda: ledger.open_gate(PolicyVersion(0, 2), "w2", 6),
    )
    note()
    for event in events:
        event()
        note()
    for key in client.scan_iter(match=prefix + "*"):
        client.delete(key)
    for key, value in past[max(0, len(events) - lost)].items():
        client.restore(key, 0, value)

    def make_anew() -> None:
        ledger.forget()
        ledger.claim()
        ledger.register(0, [(group_id, n) for n, group_id in enumerate(ids)])
        ledger.rebuild({0: ids[:2]}, {}, {1: ids[2:4]}, None)
        ledger.attach({group_id: desk.prompt_of(group_id) for group_id in ledger.missing_payload(9)})
        ledger.open_gate(PolicyVersion(0, 2), "w2", 6)

    ledger.on_lost = make_anew
    assert ledger.take(2, 2, final=True) is None  # the last two are not yet generated
    assert [row.step for row in ledger.list("consumed")] == [1, 1]
    desk.make_scored(2, PolicyVersion(0, 2))
    assert ledger.take(2, 2, final=True) == ids[4:]


def test_an_earlier_driver_is_refused(desk: Any, client: redis.Redis) -> None:
    """Two drivers never write one ledger: the one that came later has claimed it."""
    ids = desk.fill(4)
    desk.make_scored(2)
    run_id = desk.ledger._prefix.removeprefix("attune:{").removesuffix("}:")
    later = Ledger(client, run_id)
    with pytest.raises(LedgerLost):
        later.open_gate(V1, "w", 4)  # before it has made sure where the ledger is
    later.reconcile({}, {})
    with pytest.raises(LedgerLost):
        desk.ledger.take(0, 2)
    later.open_gate(V1, "w", 4)
    assert later.take(0, 2) == ids[:2]


def test_an_earlier_driver_that_comes_back_with_an_older_copy_has_taken_nothing(
    driver: Driver, client: redis.Redis
) -> None:
    """It had claimed the ledger often; the later one found an empty Redis, so that nothing told it how often."""
    for _ in range(5):
        driver.ledger.claim()
    older = {key: client.dump(key) or b"" for key in client.scan_iter(match=driver.ledger._prefix + "*")}
    empty(driver, client)
    later = copy(driver)
    later.ledger = Ledger(client, driver.ledger._prefix.removeprefix("attune:{").removesuffix("}:"))
    later.ledger.claim()
    later.ledger.open_gate(V1, "w2", 10)
    later.ledger.on_lost = later.make_anew
    empty(driver, client)
    for key, value in older.items():
        client.restore(key, 0, value)
    later.ledger.commit(later.committed)
    assert later.states() == ["committed"] * 2 + ["consumed"] * 2 + ["pending"] * 2 + ["failed"] + ["pending"] * 3


def test_a_ledger_that_is_lost_again_and_again_is_given_up(driver: Driver, client: redis.Redis) -> None:
    rebuilt = 0

    def make_anew() -> None:
        nonlocal rebuilt
        rebuilt += 1
        driver.make_anew()
        empty(driver, client)

    driver.ledger.on_lost = make_anew
    empty(driver, client)
    with pytest.raises(LedgerLost):
        driver.ledger.take(2, STEP)
    assert rebuilt == 3


def test_groups_that_are_put_back_are_waited_for(driver: Driver) -> None:
    with pytest.raises(LedgerError, match="0:p9"):
        driver.ledger.fetch(["0:p9"], wait_s=0.3)


def test_a_scorer_that_waits_while_the_ledger_is_made_anew_reads_on(driver: Driver, server: Any) -> None:
    reader = Ledger(connect(server.url), driver.ledger._prefix.removeprefix("attune:{").removesuffix("}:"))
    found: list[Any] = []
    failed: list[BaseException] = []

    def read() -> None:
        try:
            while not found:
                found.extend(reader.read_generated("scorer", 9, 2_000, 60_000))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(3):
        time.sleep(0.1)
        driver.make_anew()
    driver.desk.generate(1, V1)
    thread.join(10)
    assert not failed
    assert [group.group_id for _, group in found] == [driver.ids[4]]


def test_an_actor_at_work_while_the_ledger_is_made_anew_leaves_nothing_torn(desk: Any, client: redis.Redis) -> None:
    """What it leases, answers or fails between two commands of `forget` would be a half of a group ever after."""
    driver = Driver(desk)
    actor = Ledger(client, driver.ledger._prefix.removeprefix("attune:{").removesuffix("}:"), patience_s=20)
    end = threading.Event()
    torn: list[BaseException] = []

    def work() -> None:
        try:
            while not end.is_set():
                answer = actor.lease("actor", V1, 60)
                if not isinstance(answer, Wait):
                    actor.put_generated(desk.group_of(answer, V1))
        except BaseException as error:
            torn.append(error)

    at_work = threading.Thread(target=work)
    at_work.start()
    try:
        for _ in range(40):
            driver.make_anew()
            driver.ledger.expire_leases()
            driver.ledger.register(0, [(group_id, n) for n, group_id in enumerate(driver.ids)])  # looks at every group
    finally:
        end.set()
        at_work.join()
    assert not torn
    assert sum(driver.ledger.counts().values()) == 10


def test_a_driver_that_died_while_it_removed_the_keys_is_cleaned_up_after(desk: Any, client: redis.Redis) -> None:
    desk.fill(4)
    ledger: Ledger = desk.ledger
    client.set(ledger._prefix + "forgetting", 1)
    actor = Ledger(client, ledger._prefix.removeprefix("attune:{").removesuffix("}:"), patience_s=0.3)
    with pytest.raises(StreamLost, match="being made anew"):
        actor.lease("actor", desk.V0, 60)
    ledger.on_lost = lambda: None  # as a driver has it; what it does is looked at above
    with pytest.raises(LedgerLost):
        ledger.expire_leases()
    ledger.claim()
    assert sum(ledger.counts().values()) == 0
    assert actor.lease("actor", desk.V0, 60) == Wait("gate")
