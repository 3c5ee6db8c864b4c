"""Micro-batching: packing, latency, cancellation, failures, and an event loop that stays free."""

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_server.batching import MicroBatcher, pack
from reward_server.runner import ModelFacts, Output, Row


class Lengths:
    """A runner whose output is a row's length; remembers its batches, and takes its time."""

    facts = ModelFacts("sequence", "1", None, ("score",))

    def __init__(self, seconds: float = 0.0, lanes: int = 1) -> None:
        self.seconds = seconds
        self.lanes = lanes
        self.batches: list[list[int]] = []
        self.threads: set[str] = set()

    def run(self, rows: Sequence[Row]) -> list[Output]:
        self.batches.append([len(row.ids) for row in rows])
        self.threads.add(threading.current_thread().name)
        time.sleep(self.seconds)
        if any(row.ids and row.ids[0] == 13 for row in rows):
            raise RuntimeError("the model broke")
        return [[[float(len(row.ids))]] for row in rows]


def row(length: int, first: int = 0) -> Row:
    return Row((first,) * length)


def test_rows_of_many_requests_run_together_and_come_back_in_order() -> None:
    runner = Lengths()
    batcher = MicroBatcher(runner, tokens=100, wait_s=0.3)

    async def go() -> list[list[Output]]:
        return await asyncio.gather(
            batcher.submit([row(9), row(2)]), batcher.submit([]), batcher.submit([row(3), row(30)])
        )

    assert asyncio.run(go()) == [[[[9.0]], [[2.0]]], [], [[[3.0]], [[30.0]]]]
    assert sorted(length for batch in runner.batches for length in batch) == [2, 3, 9, 30]
    assert runner.batches[0] == [2, 3, 9]
    assert asyncio.run(go())[0] == [[[9.0]], [[2.0]]]  # another event loop, the same queue
    assert all(name.startswith("batches-") for name in runner.threads)


lengths = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(lengths, st.integers(1, 200))
def test_a_batch_has_the_oldest_row_and_keeps_to_the_budget(sizes: list[int], tokens: int) -> None:
    chosen = pack(sizes, tokens)
    picked = [sizes[i] for i in chosen]
    assert 0 in chosen
    assert len(set(chosen)) == len(chosen)
    assert picked == sorted(picked)
    assert len(chosen) == 1 or len(chosen) * max(picked) <= tokens
    left_out = [size for i, size in enumerate(sizes) if i not in chosen and min(picked) < size < max(picked)]
    assert not left_out, "nothing between the chosen lengths is left out"


def test_a_full_budget_does_not_wait_and_a_lone_row_waits_no_longer_than_allowed() -> None:
    async def seconds(batcher: MicroBatcher, *rows: Row) -> float:
        started = time.monotonic()
        await batcher.submit(rows)
        return time.monotonic() - started

    assert asyncio.run(seconds(MicroBatcher(Lengths(), tokens=8, wait_s=30), row(4), row(4))) < 5
    alone = asyncio.run(seconds(MicroBatcher(Lengths(), tokens=1000, wait_s=0.2), row(4)))
    assert 0.2 <= alone < 5


def test_the_event_loop_goes_on_while_the_model_runs() -> None:
    batcher = MicroBatcher(Lengths(0.5), tokens=10, wait_s=0)

    async def go() -> int:
        scoring = asyncio.create_task(batcher.submit([row(5)]))
        ticks = 0
        while not scoring.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    assert asyncio.run(go()) >= 10


def test_a_cancelled_request_leaves_the_queue() -> None:
    runner = Lengths(0.3)
    batcher = MicroBatcher(runner, tokens=10, wait_s=0)

    async def go() -> list[Output]:
        first = asyncio.create_task(batcher.submit([row(10)]))
        await asyncio.sleep(0.1)
        gone = asyncio.create_task(batcher.submit([row(7), row(8)]))
        stays = asyncio.create_task(batcher.submit([row(6)]))
        await asyncio.sleep(0.05)
        assert batcher.waiting() == 3
        gone.cancel()
        await asyncio.sleep(0.05)
        assert batcher.waiting() == 1
        await first
        return await stays

    assert asyncio.run(go()) == [[[6.0]]]
    assert runner.batches == [[10], [6]]


def test_a_deadline_ends_the_wait_and_the_next_request_is_served() -> None:
    batcher = MicroBatcher(Lengths(0.4), tokens=10, wait_s=0)

    async def go() -> list[Output]:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await batcher.submit([row(10)])
        return await batcher.submit([row(3)])

    assert asyncio.run(go()) == [[[3.0]]]


def test_what_the_model_raises_is_raised_and_the_queue_lives_on() -> None:
    batcher = MicroBatcher(Lengths(), tokens=4, wait_s=0)

    async def go() -> list[Output]:
        with pytest.raises(RuntimeError, match="the model broke"):
            await batcher.submit([row(4, first=13), row(4)])
        return await batcher.submit([row(2)])

    assert asyncio.run(go()) == [[[2.0]]]


def test_replicas_run_batches_side_by_side() -> None:
    started = time.monotonic()
    batcher = MicroBatcher(Lengths(0.5, lanes=4), tokens=10, wait_s=0)
    outputs = asyncio.run(batcher.submit([row(10) for _ in range(4)]))
    assert outputs == [[[10.0]]] * 4
    assert time.monotonic() - started < 1.5  # one after the other, two seconds
