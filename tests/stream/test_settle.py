"""Epochs that are done leave the ledger as numbers: it does not grow with a run, and forgets nothing that counts."""

from typing import Any

import pytest
import redis

from services.records import PolicyVersion
from services.stream.errors import LedgerError
from services.stream.ledger import Ledger, Settled, Wait

EPOCH = 6


def register(ledger: Ledger, epoch: int) -> list[str]:
    ids = [f"{epoch}:p{n}" for n in range(EPOCH)]
    ledger.register(epoch, [(group_id, epoch * EPOCH + n) for n, group_id in enumerate(ids)])
    return ids


def train_epoch(desk: Any, epoch: int, *, failing: int = 0) -> tuple[list[str], list[str]]:
    """All of an epoch, committed in one step but for the first `failing`; (committed, failed)."""
    ledger: Ledger = desk.ledger
    ids = register(ledger, epoch)
    ledger.attach({group_id: desk.prompt_of(group_id) for group_id in ids})
    version = PolicyVersion(0, epoch)
    ledger.open_gate(version, "w", EPOCH * (epoch + 1))
    for _ in range(failing):
        lease = desk.lease(version=version)
        assert ledger.fail(lease.group_id, lease.attempt, desk.DATA, 0) == "failed"
    desk.make_scored(EPOCH - failing, version)
    taken = ledger.take(epoch, EPOCH - failing)
    assert taken == ids[failing:]
    ledger.commit({epoch: taken})
    return taken, ids[:failing]


def keys(client: redis.Redis, ledger: Ledger) -> int:
    return sum(1 for _ in client.scan_iter(match=ledger._prefix + "group:*", count=1000))


def test_a_settled_epoch_is_in_the_numbers_and_nowhere_else(desk: Any, client: redis.Redis) -> None:
    ledger: Ledger = desk.ledger
    train_epoch(desk, 0, failing=2)
    register(ledger, 1)
    before = ledger.counts()
    ledger.settle(Settled(1, 4, 2), EPOCH)
    assert ledger.settled() == Settled(1, 4, 2)
    assert ledger.counts() == before
    assert keys(client, ledger) == EPOCH
    assert (ledger.ids("committed"), ledger.ids("failed")) == ([], [])
    ledger.settle(Settled(1, 4, 2), EPOCH)  # again: nothing changes
    ledger.settle(Settled(0, 0, 0), 0)  # an earlier one: neither
    assert ledger.counts() == before


def test_the_memory_of_ten_epochs_is_that_of_one(desk: Any, client: redis.Redis) -> None:
    ledger: Ledger = desk.ledger
    held: list[int] = []
    for epoch in range(10):
        train_epoch(desk, epoch)
        ledger.settle(Settled(epoch + 1, EPOCH * (epoch + 1), 0), EPOCH * (epoch + 1))
        held.append(sum(1 for _ in client.scan_iter(match=ledger._prefix + "*", count=1000)))
    # But for the names of the leases of the last minute, which end by themselves.
    calls = sum(1 for _ in client.scan_iter(match=ledger._prefix + "call:*", count=1000))
    assert held[-1] - calls <= held[0]
    assert ledger.counts()["committed"] == 10 * EPOCH


def test_the_gate_counts_settled_groups_as_admitted(desk: Any) -> None:
    ledger: Ledger = desk.ledger
    train_epoch(desk, 0, failing=1)
    ids = register(ledger, 1)
    ledger.attach({group_id: desk.prompt_of(group_id) for group_id in ids})
    version = PolicyVersion(1, 0)
    ledger.open_gate(version, "w", 7)  # 5 of the first epoch that did not fail, and 2 more
    ledger.settle(Settled(1, 5, 1), EPOCH)
    assert [desk.lease(version=version).group_id for _ in range(2)] == ids[:2]
    assert ledger.lease("a", version, 9) == Wait("gate")


def test_what_is_said_of_a_settled_group_is_late_or_passed_over(desk: Any, client: redis.Redis) -> None:
    ledger: Ledger = desk.ledger
    committed, failed = train_epoch(desk, 0, failing=2)
    ledger.settle(Settled(1, 4, 2), EPOCH)
    before = ledger.counts()
    assert register(ledger, 0) == [*failed, *committed]
    assert ledger.register(0, [(failed[0], 0)]) == 0
    assert ledger.commit({0: committed}) == 0
    assert ledger.attach({committed[0]: desk.prompt_of(committed[0])}) == 0
    assert ledger.fail(committed[0], 1, desk.INFRA, 9) == "late"
    assert not ledger.renew("actor", committed[0], 1, 9)
    assert ledger.reconcile({0: committed}, dict.fromkeys(failed, desk.DATA)) == {
        "rescored": 0,
        "pending": 0,
        "uncommitted": 0,
    }
    assert ledger.counts() == before
    assert keys(client, ledger) == 0


@pytest.mark.parametrize(
    ("done", "says"),
    [
        (Settled(1, 5, 1), "4 groups are committed and 2 failed, in the manifest 5 and 1"),
        (Settled(2, 4, 2), "6 groups of the first 2 epochs are pending"),
    ],
)
def test_what_is_not_so_is_refused_and_changes_nothing(
    desk: Any, client: redis.Redis, done: Settled, says: str
) -> None:
    ledger: Ledger = desk.ledger
    train_epoch(desk, 0, failing=2)
    register(ledger, 1)
    with pytest.raises(LedgerError, match=says):
        ledger.settle(done, done.epochs * EPOCH)
    assert ledger.settled() == Settled()
    assert keys(client, ledger) == 2 * EPOCH


def test_a_ledger_made_anew_begins_with_the_manifests_numbers(desk: Any) -> None:
    ledger: Ledger = desk.ledger
    ledger.settle(Settled(3, 15, 3), 3 * EPOCH)
    assert ledger.counts()["committed"] == 15
    assert register(ledger, 2)
    assert ledger.counts()["pending"] == 0
    register(ledger, 3)
    assert ledger.counts()["pending"] == EPOCH


def test_going_back_to_a_commit_costs_what_is_under_way_and_not_what_is_settled(
    desk: Any, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger: Ledger = desk.ledger
    steps = {step: [f"{step // 50}:p{2 * (step % 50) + n}" for n in range(2)] for step in range(2_000)}
    ledger.settle(Settled(39, 3_900, 0), 3_900)
    under_way = [group for step in range(1_950, 2_000) for group in steps[step]]
    ledger.register(39, [(group, 3_900 + n) for n, group in enumerate(under_way)])
    called: list[str] = []
    driven = ledger._driven
    monkeypatch.setattr(ledger, "_driven", lambda name, *args: called.append(name) or driven(name, *args))
    ledger.reconcile(steps, {})
    assert called == ["commit", "sweep"]
    assert {row.group_id: row.step for row in ledger.list("committed")} == {
        group: step for step in range(1_950, 2_000) for group in steps[step]
    }
    assert ledger.counts()["committed"] == 4_000
    called.clear()
    ledger.rebuild(steps, {}, {}, None)
    assert called == ["commit"]
    assert keys(client, ledger) == 100


@pytest.mark.parametrize("was", ["committed elsewhere", "failed"])
def test_what_a_settling_that_was_cut_off_has_left_is_put_right_too(desk: Any, client: redis.Redis, was: str) -> None:
    ledger: Ledger = desk.ledger
    (first, *_), _ = train_epoch(desk, 0)
    client.hset(ledger._prefix + "settled", mapping={"epochs": 1, "committed": 0, "failed": 0})  # and nothing dropped
    if was == "failed":
        ledger.mark_failed({first: desk.DATA})
    steps = {0 if was == "failed" else 7: [f"0:p{n}" for n in range(EPOCH)]}
    ledger.reconcile(steps, {})
    assert {(row.group_id, row.step) for row in ledger.list("committed")} == {(g, s) for s in steps for g in steps[s]}


def test_an_epoch_larger_than_one_call_may_drop(desk: Any, client: redis.Redis) -> None:
    ledger: Ledger = desk.ledger
    ids = [f"0:p{n}" for n in range(1203)]
    ledger.register(0, [(group_id, n) for n, group_id in enumerate(ids)])
    ledger.commit({0: ids})
    ledger.settle(Settled(1, 1203, 0), 1203)
    assert ledger.counts()["committed"] == 1203
    assert keys(client, ledger) == 0


def test_a_group_that_has_no_place_yet_is_none_of_an_epoch_that_is_done(desk: Any) -> None:
    """Of a manifest's failed groups only the name is known until their epoch is registered."""
    ledger: Ledger = desk.ledger
    committed, _ = train_epoch(desk, 0)
    ledger.reconcile({0: committed}, {"1:p3": desk.DATA})
    ledger.settle(Settled(1, 6, 0), EPOCH)
    assert ledger.ids("failed") == ["1:p3"]
    register(ledger, 1)
    assert (ledger.counts()["failed"], ledger.counts()["pending"]) == (1, 5)
