"""After a crash the ledger is the manifest's projection again, from whatever it was in, even from nothing."""

from typing import Any

import pytest
import redis

from services.records import PolicyVersion
from services.stream.errors import LedgerError
from services.stream.ledger import Ledger, Wait

V1 = PolicyVersion(1, 1)


def states(ledger: Ledger) -> dict[str, str]:
    return {row.group_id: row.state for state in ledger.counts() for row in ledger.list(state)}  # pyright: ignore[reportArgumentType]


def half_way(desk: Any) -> list[str]:
    """Groups of 10: 2 committed in step 0, 2 consumed in step 1, 2 scored, 1 generated and read, 1 leased, 1 failed."""
    ids = desk.fill(10)
    ledger: Ledger = desk.ledger
    desk.make_scored(6)
    ledger.take(0, 2)
    ledger.commit({0: ids[:2]})
    ledger.take(1, 2)
    desk.generate(1)
    assert len(ledger.read_generated("dies", 9, 1, 60_000)) == 1
    desk.lease("dies")
    ledger.fail(ids[8], desk.lease().attempt, desk.DATA, 0)
    return ids


def test_everything_under_way_is_put_where_a_restart_finds_it(desk: Any) -> None:
    ids = half_way(desk)
    ledger: Ledger = desk.ledger
    assert ledger.reconcile({0: ids[:2]}, {}) == {"rescored": 2, "pending": 1, "uncommitted": 0}
    where = ["committed"] * 2 + ["scored"] * 4 + ["generated", "pending", "failed", "pending"]
    expected = dict(zip(ids, where, strict=True))
    assert states(ledger) == expected
    assert ledger.reconcile({0: ids[:2]}, {}) == {"rescored": 0, "pending": 0, "uncommitted": 0}
    assert states(ledger) == expected
    assert ledger.lease("a", desk.V0, 9) == Wait("gate")  # shut until the new incarnation's weights are there
    assert ledger.take(1, 2) == ids[2:4]  # the same step, the same groups
    assert [group.group_id for _, group in ledger.read_generated("new", 9, 1, 60_000)] == [ids[6]]  # at once


def test_answers_from_before_the_crash_are_late(desk: Any) -> None:
    desk.fill(2)
    ledger: Ledger = desk.ledger
    lease = desk.lease("before")
    desk.generate(1)
    ((entry, group),) = ledger.read_generated("before", 9, 1, 60_000)
    ledger.reconcile({}, {})
    assert not ledger.put_generated(desk.group_of(lease))
    ledger.open_gate(V1, "w", 2)
    assert desk.lease("after", V1).attempt == 2
    assert not ledger.put_generated(desk.group_of(lease))
    # A scorer that lived through it has the present entry in hand: the first answer counts, whoever gives it.
    ((again, _),) = ledger.read_generated("after", 9, 1, 60_000)
    assert again == entry
    assert ledger.put_scored(entry, desk.scored(group))
    assert not ledger.put_scored(entry, desk.scored(group))


def test_a_commit_that_was_cut_off_is_finished(desk: Any) -> None:
    ids = desk.fill(4)
    desk.make_scored(4)
    desk.ledger.take(0, 4)
    desk.ledger.commit({0: ids[:1]})
    desk.ledger.reconcile({0: ids}, {})
    assert set(states(desk.ledger).values()) == {"committed"}


def test_an_older_commit_than_the_ledgers_takes_groups_back(desk: Any) -> None:
    ids = desk.fill(4)
    desk.make_scored(4)
    desk.ledger.take(0, 2)
    desk.ledger.take(1, 2)
    desk.ledger.commit({0: ids[:2], 1: ids[2:]})
    assert desk.ledger.reconcile({0: ids[:2]}, {})["uncommitted"] == 2
    assert [row.group_id for row in desk.ledger.list("pending")] == ids[2:]
    assert desk.ledger.missing_payload(9) == ids[2:]  # dropped at the commit
    # In another step than the ledger has it: the manifest is right.
    desk.ledger.reconcile({5: ids[:2]}, {})
    assert {row.step for row in desk.ledger.list("committed")} == {5}


def test_a_manifest_that_holds_a_group_twice_is_refused(desk: Any) -> None:
    ids = desk.fill(2)
    for twice in ({0: ids, 1: ids[:1]}, {0: [ids[0], ids[0]]}):
        with pytest.raises(LedgerError, match="twice"):
            desk.ledger.reconcile(twice, {})


def test_an_empty_redis_is_rebuilt_from_the_manifest(desk: Any, client: redis.Redis) -> None:
    ids = half_way(desk)
    before: Ledger = desk.ledger
    run = before._prefix
    before.flush()
    assert not client.keys(run.replace("[", r"\[") + "*")
    before.register(0, [(group_id, n) for n, group_id in enumerate(ids)])
    before.reconcile({0: ids[:2], 1: ids[2:4]}, {ids[8]: desk.DATA})
    assert before.counts() == {
        "pending": 5, "leased": 0, "generated": 0, "scored": 0, "consumed": 0, "committed": 4, "failed": 1,
    }  # fmt: skip
    before.attach({group_id: desk.prompt_of(group_id) for group_id in before.missing_payload(9)})
    before.open_gate(V1, "w", 6)
    assert [lease.group_id for lease in desk.generate(2, V1)] == ids[4:6]
    assert before.lease("a", V1, 9) == Wait("gate")  # the committed ones count as admitted
    desk.score()
    assert before.take(2, 2) == ids[4:6]


def test_a_manifest_may_know_groups_that_are_not_registered_yet(desk: Any) -> None:
    ledger: Ledger = desk.ledger
    ledger.reconcile({0: ["0:p0"]}, {"1:p0": desk.DATA})
    assert states(ledger) == {"0:p0": "committed", "1:p0": "failed"}
    desk.fill(2)
    desk.fill(1, epoch=1, limit=2)
    assert [(row.group_id, row.epoch, row.order) for row in ledger.list("committed")] == [("0:p0", 0, 0)]
    assert [(row.group_id, row.epoch, row.order) for row in ledger.list("failed")] == [("1:p0", 1, 1000)]
    assert states(ledger)["0:p1"] == "pending"


def test_scored_samples_that_are_lost_are_generated_again(desk: Any, client: redis.Redis) -> None:
    ids = desk.fill(3)
    ledger: Ledger = desk.ledger
    desk.make_scored(2)
    desk.generate(1)
    ledger.take(0, 1)
    client.delete(f"{ledger._prefix}stream:scored", f"{ledger._prefix}stream:generated")
    assert ledger.reconcile({}, {})["pending"] == 3
    assert [row.group_id for row in ledger.list("pending")] == ids
    ledger.open_gate(V1, "w", 3)
    desk.make_scored(3, V1)
    assert ledger.take(0, 3) == ids


def test_a_lost_low_group_is_not_kept_out_by_the_later_ones_of_before_the_crash(desk: Any) -> None:
    """The run goes back to step 0, where fewer may be admitted than are there already."""
    ids = desk.fill(8)
    ledger: Ledger = desk.ledger
    desk.make_scored(8)
    (entry,) = ledger._calls.command("HMGET", f"{ledger._prefix}group:{ids[1]}", "entry")
    ledger._calls.command("XDEL", f"{ledger._prefix}stream:scored", entry)
    ledger.reconcile({}, {})
    ledger.open_gate(V1, "w", 2)
    desk.make_scored(1, V1)
    assert ledger.take(0, 2) == ids[:2]
