"""Prompts into a real ledger: lease order, the window of payloads, and invariant 3 by the driver's own moves."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import uuid4

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.feed import Feed
from services.records import Failure, Group, Lease, PolicyVersion, Prompt, Sample, Score
from services.stream.connect import connect
from services.stream.embedded import EmbeddedRedis
from services.stream.ledger import Ledger, Wait
from services.text.order import epoch_order

EMPTY = Failure(kind="data", code="prompt_refused", message="too long")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis.Redis]:
    with EmbeddedRedis(Path(tmp_path_factory.mktemp("redis"))) as server:
        connection = connect(server.url)
        yield connection
        connection.close()


@pytest.fixture
def ledger(client: redis.Redis) -> Ledger:
    return new_ledger(client)


def new_ledger(client: redis.Redis) -> Ledger:
    return Ledger(client, f"run-{uuid4().hex[:8]}")


def prompts(n: int) -> list[Prompt]:
    return [Prompt(prompt_id=f"p{i}", source="tests", text=f"prompt {i}") for i in range(n)]


def in_lease_order(n: int, seed: int, epochs: int) -> list[str]:
    return [f"{epoch}:p{index}" for epoch in range(epochs) for index in epoch_order(n, seed, epoch)]


def scored(lease: Lease, version: PolicyVersion) -> Group:
    score = Score(status="ok", value=1.0)
    sample = Sample(
        sample_id=f"{lease.group_id}:0",
        group_id=lease.group_id,
        prompt_id=lease.prompt.prompt_id,
        attempt=lease.attempt,
        policy_versions=((*version, 1),),
        prompt="p",
        prompt_ids=(1,),
        response="r",
        response_ids=(2,),
        finish_reason="stop",
        logprobs=(-1.0,),
        scores={"length": score},
        reward=score,
        created_at=0.0,
    )
    return Group(
        group_id=lease.group_id,
        attempt=lease.attempt,
        epoch=lease.epoch,
        order=lease.order,
        version=version,
        prompt=lease.prompt,
        eos_ids=(2,),
        samples=(sample,),
    )


def lease_all(ledger: Ledger, version: PolicyVersion) -> tuple[list[Lease], str]:
    """What can be leased now, and why no more."""
    leases: list[Lease] = []
    while True:
        answer = ledger.lease("actor", version, 60.0)
        if isinstance(answer, Wait):
            return leases, answer.reason
        assert isinstance(answer, Lease)
        leases.append(answer)


def answer_all(ledger: Ledger, leases: Sequence[Lease], version: PolicyVersion) -> None:
    for lease in leases:
        assert ledger.put_generated(scored(lease, version))
    for entry, group in ledger.read_generated("scorer", 1000, 1, 60_000):
        assert ledger.put_scored(entry, group)


def test_groups_are_leased_in_the_order_of_seed_and_epoch_with_their_prompts(ledger: Ledger) -> None:
    feed = Feed(prompts(7), seed=5, epochs=2, steps=None, groups_per_step=3)
    feed.register(ledger, 7)
    assert feed.all_registered
    feed.top_up(ledger, 100)
    version = PolicyVersion(1, 0)
    ledger.open_gate(version, "weights.json", 100)
    leases, reason = lease_all(ledger, version)
    assert reason == "empty"
    assert [lease.group_id for lease in leases] == in_lease_order(7, 5, 2)
    assert [lease.order for lease in leases] == list(range(14))
    assert [lease.epoch for lease in leases] == [0] * 7 + [1] * 7
    assert all(f"{lease.epoch}:{lease.prompt.prompt_id}" == lease.group_id for lease in leases)
    assert in_lease_order(7, 5, 1) != in_lease_order(7, 6, 1)


def test_epochs_are_registered_whole_when_their_beginning_is_reached_and_once(ledger: Ledger) -> None:
    feed = Feed(prompts(4), seed=0, epochs=3, steps=None, groups_per_step=2)
    for order, registered in ((0, 4), (3, 4), (4, 8), (4, 8), (100, 12), (1000, 12)):
        feed.register(ledger, order)
        assert ledger.counts()["pending"] == registered
        assert feed.all_registered == (registered == 12)
    again = Feed(prompts(4), seed=0, epochs=3, steps=None, groups_per_step=2)
    again.register(ledger, 100)
    assert ledger.counts()["pending"] == 12


def test_prompts_stand_in_the_ledger_a_window_ahead_and_no_further(ledger: Ledger) -> None:
    feed = Feed(prompts(20), seed=1, epochs=1, steps=None, groups_per_step=2)
    feed.register(ledger, 0)
    order = in_lease_order(20, 1, 1)
    for _ in range(3):
        feed.top_up(ledger, 5)
        assert ledger.missing_payload(100) == order[5:]
    version = PolicyVersion(1, 0)
    ledger.open_gate(version, "weights.json", 3)
    assert len(lease_all(ledger, version)[0]) == 3
    feed.top_up(ledger, 5)
    assert ledger.missing_payload(100) == order[8:]


def test_a_run_that_went_further_before_may_have_registered_more(ledger: Ledger) -> None:
    before = Feed(prompts(6), seed=2, epochs=2, steps=None, groups_per_step=2)
    before.register(ledger, 6)
    before.top_up(ledger, 6)  # all of the first epoch has its prompts
    resumed = Feed(prompts(6), seed=2, epochs=2, steps=None, groups_per_step=2)
    resumed.register(ledger, 3)
    resumed.top_up(ledger, 8)
    assert ledger.missing_payload(100) == in_lease_order(6, 2, 2)[6:]
    resumed.register(ledger, 6)
    resumed.top_up(ledger, 8)
    assert ledger.missing_payload(100) == in_lease_order(6, 2, 2)[8:]


@pytest.mark.parametrize(
    ("epochs", "steps", "total"), [(1, None, 4), (3, None, 10), (1, 3, 3), (1, 4, 4), (1, 9, 4), (2, 7, 7)]
)
def test_the_last_short_batch_is_a_step(epochs: int, steps: int | None, total: int) -> None:
    feed = Feed(prompts(10), seed=0, epochs=epochs, steps=steps, groups_per_step=3)
    assert feed.total_steps == total
    assert feed.admission_limit(0, 0) == 3
    assert feed.admission_limit(1, 1) == 9
    assert feed.admission_limit(100, 2) == 3 * total


def test_a_run_that_got_more_epochs_counts_from_its_short_batch() -> None:
    """10 groups in steps of 4, 4 and 2, then a second epoch: none is left over, none is leased too early."""
    feed = Feed(prompts(10), seed=0, epochs=2, steps=None, groups_per_step=4, steps_done=3, groups_done=10)
    assert feed.total_steps == 6
    assert [feed.admission_limit(step, 0) for step in (3, 4, 5, 6)] == [14, 18, 22, 22]
    bounded = Feed(prompts(10), seed=0, epochs=2, steps=4, groups_per_step=4, steps_done=3, groups_done=10)
    assert bounded.total_steps == 4
    assert bounded.admission_limit(4, 3) == 14


def test_a_run_that_got_fewer_epochs_than_it_has_trained_has_no_step_left() -> None:
    feed = Feed(prompts(10), seed=0, epochs=1, steps=None, groups_per_step=4, steps_done=4, groups_done=16)
    assert feed.total_steps == 4


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9),
    epochs=st.integers(1, 3),
    size=st.integers(1, 4),
    staleness=st.integers(0, 2),
    steps=st.none() | st.integers(1, 12),
    failing=st.sets(st.integers(0, 26), max_size=5),
)
def test_invariant_3(
    client: redis.Redis, n: int, epochs: int, size: int, staleness: int, steps: int | None, failing: set[int]
) -> None:
    """Groups ever admitted and not failed stay within (max_staleness + s + 1) B, and reach it, whatever fails."""
    ledger = new_ledger(client)
    feed = Feed(prompts(n), seed=3, epochs=epochs, steps=steps, groups_per_step=size)
    window = (staleness + 3) * size
    order = in_lease_order(n, 3, epochs)
    sound = [group_id for place, group_id in enumerate(order) if place not in failing]
    done: list[str] = []
    failed: set[str] = set()
    admitted: list[str] = []
    for step in range(feed.total_steps):
        version = PolicyVersion(1, step)
        feed.register(ledger, len(done) + len(failed) + window)
        feed.top_up(ledger, window)
        ledger.open_gate(version, "weights.json", feed.admission_limit(step, staleness))
        while True:
            leases, reason = lease_all(ledger, version)
            assert len(admitted) + len(leases) <= (staleness + step + 1) * size
            assert reason != "no_payload"
            bad = [lease for lease in leases if lease.order in failing]
            for lease in bad:
                assert ledger.fail(lease.group_id, lease.attempt, EMPTY, 0) == "failed"
            failed.update(lease.group_id for lease in bad)
            good = [lease for lease in leases if lease.order not in failing]
            answer_all(ledger, good, version)
            admitted += [lease.group_id for lease in good]
            if not bad:
                break
            feed.register(ledger, len(done) + len(failed) + window)
            feed.top_up(ledger, window)
        # As many as may be, and the first ones.
        assert admitted == sound[: min((staleness + step + 1) * size, feed.total_steps * size)]
        batch = ledger.take(step, size, final=feed.all_registered, oldest_step=step - staleness)
        assert batch == sound[step * size : (step + 1) * size]
        ledger.commit({step: batch})
        done += batch
        if len(batch) < size:
            break
    assert done == sound[: feed.total_steps * size]
    assert "regenerated" not in ledger.counters()
