"""Each way of the ledger, and each attempt to get round its invariants."""

import time
from typing import Any
from uuid import uuid4

import pytest
import redis

from services.records import Failure, Lease, PolicyVersion
from services.stream.errors import LedgerError
from services.stream.ledger import Gate, Ledger, LoadWeights, Wait


def test_a_group_goes_all_the_way(desk: Any) -> None:
    ids = desk.fill(3)
    ledger: Ledger = desk.ledger
    assert ledger.counts()["pending"] == 3
    leases = desk.generate(3)
    assert [(lease.group_id, lease.attempt, lease.order, lease.epoch) for lease in leases] == [
        (group_id, 1, n, 0) for n, group_id in enumerate(ids)
    ]
    assert leases[0].prompt == desk.prompt_of(ids[0])
    assert desk.score() == ids
    assert ledger.take(0, 3) == ids
    fetched = ledger.fetch(list(reversed(ids)))
    assert fetched == [desk.scored(desk.group_of(lease)) for lease in reversed(leases)]
    assert ledger.commit({0: ids}) == 3
    assert ledger.counts() == {
        "pending": 0, "leased": 0, "generated": 0, "scored": 0, "consumed": 0, "committed": 3, "failed": 0,
    }  # fmt: skip
    assert ledger.counters() == {}


def test_registering_again_changes_nothing_and_another_place_is_refused(desk: Any) -> None:
    ids = desk.fill(2)
    desk.lease()
    assert desk.ledger.register(0, [(ids[0], 0), (ids[1], 1), ("0:new", 2)]) == 1
    assert desk.ledger.counts()["leased"] == 1
    with pytest.raises(LedgerError, match="0:p1 is registered as epoch 0, order 1"):
        desk.ledger.register(0, [("0:other", 3), (ids[1], 4)])
    assert desk.ledger.counts()["pending"] == 2  # the refused call registered nothing


def test_payloads_are_asked_for_in_order_and_dropped_at_the_commit(desk: Any, client: redis.Redis) -> None:
    ledger: Ledger = desk.ledger
    ids = [f"0:p{n}" for n in range(5)]
    ledger.register(0, [(group_id, 10 - n) for n, group_id in enumerate(ids)])
    assert ledger.missing_payload(2) == ["0:p4", "0:p3"]
    ledger.open_gate(desk.V0, "w", 5)
    assert ledger.lease("a", desk.V0, 9) == Wait("no_payload")
    assert ledger.attach({"0:p4": desk.prompt_of("0:p4"), "0:nobody": desk.prompt_of("0:nobody")}) == 1
    assert ledger.missing_payload(9) == ["0:p3", "0:p2", "0:p1", "0:p0"]
    desk.make_scored(1)
    assert ledger.lease("a", desk.V0, 9) == Wait("no_payload")
    assert ledger.missing_payload(0) == []
    assert ledger.take(0, 1) == ["0:p4"]
    key = f"{ledger._prefix}group:0:p4"
    assert client.hexists(key, "prompt")
    ledger.commit({0: ["0:p4"]})
    assert not client.hexists(key, "prompt")
    assert client.xlen(f"{ledger._prefix}stream:scored") == 0


def test_the_gate(desk: Any) -> None:
    ledger: Ledger = desk.ledger
    assert ledger.gate() is None
    ledger.register(0, [("0:p0", 0)])
    assert ledger.lease("a", desk.V0, 9) == Wait("gate")
    desk.fill(3, limit=2, version=PolicyVersion(1, 4))
    assert ledger.gate() == Gate(PolicyVersion(1, 4), "weights.json", 2)
    for other in (None, PolicyVersion(0, 4), PolicyVersion(1, 3), PolicyVersion(1, 5)):
        assert ledger.lease("a", other, 9) == LoadWeights(PolicyVersion(1, 4), "weights.json")
    desk.lease(version=PolicyVersion(1, 4))
    desk.lease(version=PolicyVersion(1, 4))
    assert ledger.lease("a", PolicyVersion(1, 4), 9) == Wait("gate")
    for back in (PolicyVersion(1, 3), PolicyVersion(0, 9)):
        with pytest.raises(LedgerError, match="cannot go back"):
            ledger.open_gate(back, "w", 9)
    with pytest.raises(LedgerError, match="cannot shrink"):
        ledger.open_gate(PolicyVersion(1, 5), "w", 1)
    ledger.open_gate(PolicyVersion(1, 5), "w", 9)
    desk.lease(version=PolicyVersion(1, 5))
    assert ledger.lease("a", PolicyVersion(1, 5), 9) == Wait("empty")
    ledger.close_gate()
    ledger.release("actor")
    assert ledger.lease("a", PolicyVersion(1, 5), 9) == Wait("gate")
    ledger.open_gate(PolicyVersion(1, 5), "w", 9)
    desk.lease(version=PolicyVersion(1, 5))


# invariant 2: one (group_id, attempt)


def test_a_second_answer_and_a_late_one_are_dropped_and_counted(desk: Any) -> None:
    desk.fill(1)
    ledger: Ledger = desk.ledger
    first = desk.lease("slow", ttl_s=0)
    assert ledger.expire_leases() == ["0:p0"]
    assert not ledger.renew("slow", "0:p0", 1, 60)
    assert not ledger.put_generated(desk.group_of(first))  # nobody has it
    second = desk.lease("quick")
    assert second.attempt == 2
    assert not ledger.put_generated(desk.group_of(first))  # another has it
    assert ledger.fail("0:p0", 1, desk.DATA, 0) == "late"
    assert ledger.put_generated(desk.group_of(second))
    assert not ledger.put_generated(desk.group_of(second))  # twice
    assert not ledger.put_generated(desk.group_of(first))
    assert len(ledger.read_generated("s", 9, 1, 60_000)) == 1
    assert ledger.counters() == {"expired": 1, "late": 4, "late_failures": 1}


def test_an_expired_lease_that_nobody_took_back_may_still_be_answered(desk: Any) -> None:
    desk.fill(1)
    lease = desk.lease(ttl_s=0)
    assert desk.ledger.put_generated(desk.group_of(lease))
    assert desk.ledger.expire_leases() == []


def test_a_renewed_lease_does_not_expire(desk: Any) -> None:
    desk.fill(2)
    ledger: Ledger = desk.ledger
    held, lost = desk.lease("a", ttl_s=0), desk.lease("b", ttl_s=0)
    assert ledger.renew("a", held.group_id, held.attempt, 60)
    assert not ledger.renew("b", held.group_id, held.attempt, 60)  # not b's
    assert not ledger.renew("a", held.group_id, held.attempt + 1, 60)
    assert ledger.expire_leases() == [lost.group_id]


@pytest.mark.parametrize("how", ["expires", "dies", "in turn"])
def test_a_group_that_every_actor_loses_fails_in_the_end(client: redis.Redis, new_desk: Any, how: str) -> None:
    desk = new_desk(Ledger(client, f"losses-{uuid4().hex[:8]}", lease_losses=2))
    desk.fill(2)
    codes: list[str] = []
    for n in range(3):
        desk.lease("loses", ttl_s=0)
        if how == "expires" or (how == "in turn" and n % 2):
            assert desk.ledger.expire_leases() == ["0:p0"]
            codes.append("lease_expired")
        else:
            assert desk.ledger.release("loses") == ["0:p0"]
            codes.append("owner_died")
        row = next(desk.ledger.list("failed" if n == 2 else "pending"))  # why it went back is known before it fails
        assert (row.group_id, row.attempt, row.losses, row.failure.code) == ("0:p0", n + 1, n + 1, codes[-1])
    assert desk.ledger.counts()["failed"] == 1
    assert desk.lease().group_id == "0:p1"  # which takes its place
    desk.ledger.flush()


def test_a_prompt_that_kills_its_actors_fails_without_its_neighbours(client: redis.Redis, new_desk: Any) -> None:
    """Each actor has four groups in hand, as far as it is given so many, and dies while 0:p1 is one of them."""
    desk = new_desk(Ledger(client, f"kills-{uuid4().hex[:8]}", lease_losses=2))
    ids = desk.fill(5)
    ledger: Ledger = desk.ledger
    for n in range(2):
        assert [desk.lease(f"dies-{n}").group_id for _ in range(4)] == ids[:4]
        assert ledger.release(f"dies-{n}") == ids[:4]
    others: list[Lease] = []
    for owner, group_id in zip("abcd", ids, strict=False):
        others.append(desk.lease(owner))
        assert others[-1].group_id == group_id
        for _ in range(2):
            assert ledger.lease(owner, desk.V0, 60) == Wait("alone")  # nothing else while it has that one
    assert desk.lease("e").group_id == ids[4]  # the others go on
    assert ledger.release("b") == [ids[1]]
    assert [row.group_id for row in ledger.list("failed")] == [ids[1]]
    assert ledger.put_generated(desk.group_of(others[0]))
    assert ledger.lease("a", desk.V0, 60) == Wait("empty")  # it may have another one again
    ledger.release("e")
    assert desk.lease("a").group_id == ids[4]
    ledger.flush()


def test_a_group_at_its_last_chance_waits_for_an_owner_with_nothing_else(client: redis.Redis, new_desk: Any) -> None:
    desk = new_desk(Ledger(client, f"alone-{uuid4().hex[:8]}", lease_losses=1))
    desk.fill(4)
    ledger: Ledger = desk.ledger
    desk.lease("dies")
    desk.lease("busy")
    busy = desk.lease("busy")
    ledger.release("dies")
    assert ledger.lease("busy", desk.V0, 60) == Wait("alone")  # and 0:p3 does not overtake it
    assert desk.lease("free").group_id == "0:p0"
    assert desk.lease("busy").group_id == "0:p3"
    ledger.release("free")
    assert ledger.lease("busy", desk.V0, 60) == Wait("empty")  # it has failed
    assert ledger.put_generated(desk.group_of(busy))
    ledger.flush()


@pytest.mark.parametrize("how", ["generated", "failed", "committed", "reconciled", "rebuilt"])
def test_a_last_chance_ends_with_what_becomes_of_the_group(client: redis.Redis, new_desk: Any, how: str) -> None:
    desk = new_desk(Ledger(client, f"last-{uuid4().hex[:8]}", lease_losses=1))
    ids = desk.fill(3)
    ledger: Ledger = desk.ledger
    desk.lease("dies")
    ledger.release("dies")
    if how == "generated":  # and generated once more, as where its samples are lost
        assert ledger.put_generated(desk.group_of(desk.lease("a")))
        ((entry, _),) = ledger.read_generated("s", 9, 1, 60_000)
        assert ledger.fail(ids[0], 2, desk.INFRA, 5, entry_id=entry) == "pending"
    elif how == "failed":
        ledger.mark_failed({ids[0]: desk.DATA})
    elif how == "committed":
        ledger.commit({0: [ids[0]]})
        ledger.reconcile({}, {})  # by a commit that the run does not go on from
    elif how == "rebuilt":
        ledger.forget()
        ledger.claim()
        ledger.register(0, [(group_id, n) for n, group_id in enumerate(ids)])
        ledger.rebuild({}, {}, {}, None)
    else:  # a driver that starts again takes leases back; none of them is a loss, and the last chance stays one
        assert desk.lease("a").group_id == ids[0]
        ledger.reconcile({}, {})
        assert next(ledger.list("pending")).losses == 1
    desk.fill(3)  # its prompt again, where it was dropped
    first = ids[1 if how == "failed" else 0]
    assert desk.lease("a").group_id == first
    if how == "reconciled":
        assert ledger.lease("a", desk.V0, 60) == Wait("alone")
    else:
        desk.lease("a")
        assert first in ledger.release("a")
        assert ledger.counts()["failed"] == (how == "failed")  # all that it lost before is forgotten
    ledger.flush()


def test_a_slow_owner_loses_nothing_however_long_it_takes(client: redis.Redis, new_desk: Any) -> None:
    """With no loss allowed at all: what is renewed is waited for, and its batch with it."""
    desk = new_desk(Ledger(client, f"slow-{uuid4().hex[:8]}", lease_losses=0))
    desk.fill(3)
    slow = desk.lease("slow", ttl_s=2)
    desk.make_scored(2)
    for _ in range(5):  # longer than the lease, in all
        time.sleep(0.5)
        assert desk.ledger.renew("slow", slow.group_id, slow.attempt, 2)
        assert desk.ledger.expire_leases() == []
        assert desk.ledger.take(0, 2) is None
    assert desk.ledger.put_generated(desk.group_of(slow))
    desk.score()
    assert desk.ledger.take(0, 2) == ["0:p0", "0:p1"]
    desk.ledger.flush()


def test_the_account_has_when_a_lease_was_given_and_how_long_it_holds(desk: Any) -> None:
    desk.fill(1)
    before = desk.ledger.now()
    lease = desk.lease("a", ttl_s=5)
    (row,) = desk.ledger.list("leased")
    assert before - 0.01 <= row.leased_at <= desk.ledger.now()
    assert row.expires_at == pytest.approx(row.leased_at + 5, abs=0.01)
    assert desk.ledger.renew("a", lease.group_id, lease.attempt, 50)
    (renewed,) = desk.ledger.list("leased")
    assert renewed.leased_at == row.leased_at
    assert renewed.expires_at > row.expires_at + 40
    desk.ledger.extend_leases(30)
    assert next(desk.ledger.list("leased")).expires_at == renewed.expires_at  # never sooner
    desk.ledger.extend_leases(90)
    assert next(desk.ledger.list("leased")).expires_at > renewed.expires_at + 30


def test_an_answer_by_older_weights_than_the_lease_is_late(desk: Any) -> None:
    """After a ledger was rebuilt from nothing attempts begin again: an actor of before may hold the same one."""
    desk.fill(1)
    old = desk.lease()
    desk.ledger.flush()
    desk.fill(1, version=PolicyVersion(1, 0))
    new = desk.lease("b", PolicyVersion(1, 0))
    assert new.attempt == old.attempt
    assert not desk.ledger.put_generated(desk.group_of(old, PolicyVersion(0, 7)))
    assert desk.ledger.put_generated(desk.group_of(new, PolicyVersion(1, 1)))  # newer ones are welcome


def test_a_failure_from_before_a_ledger_was_made_anew_fails_no_group_of_the_new_one(desk: Any) -> None:
    """Attempts begin again: an actor and a scorer of before may hold the same one."""
    ledger: Ledger = desk.ledger
    desk.fill(2)
    before = [desk.lease("old"), desk.lease("old")]
    assert ledger.put_generated(desk.group_of(before[0]))
    ((entry, _),) = ledger.read_generated("scorer", 9, 1, 60_000)
    ledger.flush()
    desk.fill(2)
    again = [desk.lease("new"), desk.lease("new")]
    assert [lease.attempt for lease in again] == [lease.attempt for lease in before]
    assert ledger.put_generated(desk.group_of(again[0]))
    ((present, _),) = ledger.read_generated("scorer", 9, 1, 60_000)
    assert ledger.fail("0:p0", 1, desk.DATA, 0, entry_id=entry) == "late"
    assert ledger.fail("0:p1", 1, desk.DATA, 0, entry_id=entry) == "late"  # leased: it has no entry
    assert ledger.fail("0:p0", 1, desk.DATA, 0, owner="new") == "late"  # generated: it is the scorer's
    assert ledger.fail("0:p1", 1, desk.DATA, 0, owner="old") == "late"
    assert ledger.counters() == {"late_failures": 4}
    assert ledger.fail("0:p0", 1, desk.DATA, 0, entry_id=present) == "failed"
    assert ledger.fail("0:p1", 1, desk.DATA, 0, owner="new") == "failed"


def test_scores_are_accepted_once_and_for_the_present_entry_alone(desk: Any, client: redis.Redis) -> None:
    desk.fill(1)
    ledger: Ledger = desk.ledger
    desk.generate(1)
    ((entry, group),) = ledger.read_generated("dies", 9, 1, 60_000)
    assert ledger.read_generated("other", 9, 1, 60_000) == []
    ((again, _),) = ledger.read_generated("other", 9, 1, 0)  # idle long enough: taken over
    assert again == entry
    assert ledger.fail("0:p0", 1, desk.INFRA, 5) == "pending"
    assert not ledger.put_scored(entry, desk.scored(group))  # it has gone back
    desk.generate(1)
    assert not ledger.put_scored(entry, desk.scored(group))  # the answer to the attempt before
    ((entry, group),) = ledger.read_generated("other", 9, 1, 60_000)
    assert not ledger.put_scored(entry, desk.scored(group).model_copy(update={"attempt": 1}))
    assert ledger.put_scored(entry, desk.scored(group))
    assert not ledger.put_scored(entry, desk.scored(group))
    assert ledger.fail("0:p0", 2, desk.INFRA, 5) == "late"
    assert ledger.counts()["scored"] == 1
    assert client.xlen(f"{ledger._prefix}stream:generated") == 0
    assert client.xlen(f"{ledger._prefix}stream:scored") == 1
    assert client.xpending(f"{ledger._prefix}stream:generated", "scorers")["pending"] == 0


def test_failures_of_each_kind_have_their_own_budget(desk: Any) -> None:
    desk.fill(1)
    for kind in (desk.INFRA, desk.INFRA, desk.DATA):
        assert desk.ledger.fail("0:p0", desk.lease().attempt, kind, {"infra": 2, "data": 1}[kind.kind]) == "pending"
    (row,) = desk.ledger.list("pending")
    assert row.failure == desk.DATA
    lease = desk.lease()
    assert desk.ledger.fail("0:p0", lease.attempt, desk.DATA, 1) == "failed"
    assert desk.ledger.lease("a", desk.V0, 9) == Wait("empty")
    assert desk.ledger.counters() == {"failures_infra": 2, "failures_data": 2}


def test_what_a_dead_actor_held_is_released(desk: Any) -> None:
    desk.fill(4)
    for owner in ("dead", "alive", "dead"):
        desk.lease(owner)
    assert desk.ledger.release("dead") == ["0:p0", "0:p2"]
    assert desk.ledger.release("dead") == []
    (row,) = desk.ledger.list("leased")
    assert (row.group_id, row.owner, row.version) == ("0:p1", "alive", desk.V0)
    assert desk.lease("next").group_id == "0:p0"  # lowest in order first, though it was leased before


# invariant 3: order, admission


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_admission_bounds_staleness(desk: Any, max_staleness: int) -> None:
    size, steps = 4, 3
    ids = desk.fill(size * steps, limit=0)
    ledger: Ledger = desk.ledger
    trained: list[str] = []
    for step in range(steps):
        ledger.open_gate(PolicyVersion(0, step), "w", (max_staleness + step + 1) * size)
        while isinstance(lease := ledger.lease("a", PolicyVersion(0, step), 60), Lease):
            assert ledger.put_generated(desk.group_of(lease, PolicyVersion(0, step)))
        admitted = sum(ledger.counts().values()) - ledger.counts()["pending"]
        assert admitted == min(size * steps, (max_staleness + step + 1) * size)
        desk.score()
        batch = ledger.take(step, size, oldest_step=step - max_staleness)
        assert batch is not None
        assert all(step - group.version.step <= max_staleness for group in ledger.fetch(batch))
        trained += batch
        if step == 1:
            ledger.commit({0: trained[:size], 1: batch})  # committed groups stay admitted
    assert trained == ids
    assert ledger.counters() == {}


def test_a_failed_group_makes_room_for_the_next_and_the_batch_is_filled_in_order(desk: Any) -> None:
    ids = desk.fill(6, limit=4)
    ledger: Ledger = desk.ledger
    leases = [desk.lease() for _ in range(4)]
    assert ledger.lease("a", desk.V0, 9) == Wait("gate")
    assert ledger.fail(ids[1], 1, desk.DATA, 0) == "failed"
    for lease in (leases[0], leases[2], leases[3]):
        assert ledger.put_generated(desk.group_of(lease))
    desk.score()
    assert ledger.take(0, 4) is None
    desk.make_scored(1)
    assert ledger.take(0, 4) == [ids[0], ids[2], ids[3], ids[4]]


def test_a_slow_group_is_waited_for_not_overtaken(desk: Any) -> None:
    ids = desk.fill(6)
    ledger: Ledger = desk.ledger
    slow = desk.lease("slow")
    desk.make_scored(5)
    assert ledger.take(0, 2) is None
    ledger.release("slow")
    assert ledger.take(0, 2) is None  # back in pending, and still the next one
    assert not ledger.put_generated(desk.group_of(slow))
    assert [lease.group_id for lease in desk.generate(1)] == [ids[0]]
    assert ledger.take(0, 2) is None  # generated is not scored
    desk.score()
    assert ledger.take(0, 2) == ids[:2]
    assert ledger.take(1, 2) == ids[2:4]
    assert ledger.take(0, 2) == ids[:2]  # asked again, the same


def test_a_later_unscored_group_holds_nothing_up(desk: Any) -> None:
    ids = desk.fill(3)
    desk.make_scored(2)
    desk.lease()
    assert desk.ledger.take(0, 2) == ids[:2]


def test_the_last_short_batch(desk: Any) -> None:
    ids = desk.fill(3)
    ledger: Ledger = desk.ledger
    desk.make_scored(2)
    assert ledger.take(0, 4, final=True) is None  # one is still to come
    desk.make_scored(1)
    assert ledger.take(0, 4) is None  # and another epoch might
    assert ledger.take(0, 4, final=True) == ids
    assert ledger.take(1, 4, final=True) == []


def test_groups_older_than_allowed_are_generated_again(desk: Any, client: redis.Redis) -> None:
    ids = desk.fill(2)
    ledger: Ledger = desk.ledger
    desk.make_scored(2)
    ledger.open_gate(PolicyVersion(1, 3), "w", 2)
    assert ledger.take(4, 2, oldest_step=3) is None
    assert ledger.counters() == {"regenerated": 2}
    assert client.xlen(f"{ledger._prefix}stream:scored") == 0
    leases = desk.generate(2, PolicyVersion(1, 3))
    assert [lease.attempt for lease in leases] == [2, 2]
    desk.score()
    assert ledger.take(4, 2, oldest_step=3) == ids
    assert {group.version for group in ledger.fetch(ids)} == {PolicyVersion(1, 3)}


# commits


def test_a_commit_is_idempotent_and_resumable(desk: Any) -> None:
    ids = desk.fill(4)
    ledger: Ledger = desk.ledger
    desk.make_scored(4)
    ledger.take(0, 2)
    ledger.take(1, 2)
    assert ledger.commit({0: ids[:1]}) == 1  # as if it had been cut off here
    assert ledger.commit({0: ids[:2], 1: ids[2:]}) == 3
    assert ledger.commit({0: ids[:2], 1: ids[2:]}) == 0
    assert [(row.group_id, row.step) for row in ledger.list("committed")] == list(zip(ids, [0, 0, 1, 1], strict=True))
    with pytest.raises(LedgerError, match="0:p3 is committed in step 1 and cannot be in step 2 too"):
        ledger.commit({2: [ids[3]]})


def test_groups_stay_readable_until_a_commit_contains_them(desk: Any) -> None:
    ids = desk.fill(1)
    desk.make_scored(1)
    desk.ledger.take(0, 1)
    assert len(desk.ledger.fetch(ids)) == 1
    desk.ledger.commit({0: ids})
    with pytest.raises(LedgerError, match="0:p0 has no scored samples: its state is committed"):
        desk.ledger.fetch(ids)
    with pytest.raises(LedgerError, match="its state is unknown"):
        desk.ledger.fetch(["0:nobody"])


# waiting, the account


def test_the_bell_rings_once_for_what_has_come(desk: Any) -> None:
    desk.fill(3)
    ledger: Ledger = desk.ledger
    assert not ledger.wait_scored(1)
    desk.make_scored(2)
    assert ledger.wait_scored(1)
    assert not ledger.wait_scored(1)
    ledger.fail("0:p2", desk.lease().attempt, desk.DATA, 0)
    assert ledger.wait_scored(1)


def test_the_account_names_every_group_and_why(desk: Any) -> None:
    desk.fill(4)
    ledger: Ledger = desk.ledger
    ledger.fail("0:p0", desk.lease("a").attempt, desk.DATA, 0)
    desk.lease("b")
    (failed,) = ledger.list("failed")
    assert (failed.failure, failed.attempt, failed.owner) == (desk.DATA, 1, None)
    assert [row.group_id for row in ledger.list("pending")] == ["0:p2", "0:p3"]
    assert [row.group_id for row in ledger.list("pending", 1)] == ["0:p2"]
    assert list(ledger.list("pending", 0)) == []


def test_runs_do_not_meet_and_flush_forgets_one(client: redis.Redis, new_desk: Any) -> None:
    one, two = new_desk(Ledger(client, "a.b")), new_desk(Ledger(client, "a-b"))
    one.fill(2)
    two.fill(3)
    one.make_scored(1)
    one.ledger.flush()
    assert sum(one.ledger.counts().values()) == 0
    assert two.ledger.counts()["pending"] == 3
    two.ledger.flush()
    assert not client.keys("attune:{a*")
    with pytest.raises(ValueError, match="run id"):
        Ledger(client, "a*")


def test_a_failure_record_survives_the_way(desk: Any) -> None:
    desk.fill(1)
    odd = Failure(kind="infra", code="x1", message='quotes " and \n lines and é')
    desk.ledger.fail("0:p0", desk.lease().attempt, odd, 0)
    (row,) = desk.ledger.list("failed")
    assert row.failure == odd
