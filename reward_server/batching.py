"""Micro-batching: rows of many requests, packed by a budget of tokens, run by a model in threads of its own.

A row waits at most `wait_s` for company; then the oldest row runs, with those of the queue that are nearest to it in
length, as many as the budget takes when all are padded to the longest. So nothing starves, little is padding, and the
event loop is never held up. A row whose request has gone is taken out of the queue.
"""

import asyncio
import threading
import time
from bisect import bisect_left
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from reward_server.runner import ModelRunner, Output, Row

IDLE_S = 10.0
"""A thread ends after this time without work; the next row starts another."""


@dataclass(eq=False)
class _Waiting:
    row: Row
    arrived: float
    done: Future[Output] = field(default_factory=lambda: Future[Output]())


class MicroBatcher:
    """The queue of one model. `submit` may be called from any event loop."""

    def __init__(self, runner: ModelRunner, *, tokens: int, wait_s: float, name: str = "model") -> None:
        """`tokens`: most of one forward, padding included; a longer row runs alone."""
        self.runner = runner
        self._tokens = tokens
        self._wait_s = wait_s
        self._name = name
        self._queue: list[_Waiting] = []
        self._changed = threading.Condition()
        self._threads: set[threading.Thread] = set()

    async def submit(self, rows: Sequence[Row]) -> list[Output]:
        """Outputs in order. Raises what the model raised; a cancelled call leaves the queue."""
        now = time.monotonic()
        waiting = [_Waiting(row, now) for row in rows]
        with self._changed:
            self._queue.extend(waiting)
            while waiting and len(self._threads) < self.runner.lanes:
                thread = threading.Thread(target=self._work, name=f"batches-{self._name}", daemon=True)
                self._threads.add(thread)
                thread.start()
            self._changed.notify_all()
        futures = [asyncio.wrap_future(entry.done) for entry in waiting]
        try:
            return list(await asyncio.gather(*futures))
        finally:
            # Where one row failed, or the caller is gone, nobody waits for the others; an error is said once.
            for future in futures:
                if not future.cancel() and not future.cancelled():
                    future.exception()

    def waiting(self) -> int:
        """Rows in the queue."""
        with self._changed:
            return sum(not entry.done.cancelled() for entry in self._queue)

    def _work(self) -> None:
        while batch := self._next():
            try:
                outputs = self.runner.run([entry.row for entry in batch])
                if len(outputs) != len(batch):
                    raise RuntimeError(f"the model gave {len(outputs)} outputs for {len(batch)} rows")
            except BaseException as error:
                for entry in batch:
                    entry.done.set_exception(error)
            else:
                for entry, output in zip(batch, outputs, strict=True):
                    entry.done.set_result(output)

    def _next(self) -> list[_Waiting]:
        """The next rows to run, marked as running; none where the thread is to end."""
        with self._changed:
            idle_from = time.monotonic()
            while True:
                self._queue = [entry for entry in self._queue if not entry.done.cancelled()]
                now = time.monotonic()
                if not self._queue:
                    if now - idle_from >= IDLE_S:
                        self._threads.discard(threading.current_thread())
                        return []
                    self._changed.wait(IDLE_S - (now - idle_from))
                    continue
                left = self._queue[0].arrived + self._wait_s - now
                if left > 0 and sum(len(entry.row.ids) for entry in self._queue) < self._tokens:
                    self._changed.wait(left)
                    continue
                chosen = [self._queue[i] for i in pack([len(entry.row.ids) for entry in self._queue], self._tokens)]
                taken = set(chosen)
                self._queue = [entry for entry in self._queue if entry not in taken]
                running = [entry for entry in chosen if entry.done.set_running_or_notify_cancel()]
                if running:
                    return running


def pack(lengths: Sequence[int], tokens: int) -> list[int]:
    """Indices of the rows that run with row 0, in rising length: those nearest to it, while rows * longest <= tokens.

    `lengths` is in the order of arrival and not empty; row 0 is always chosen.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    first = last = bisect_left(order, (lengths[0], 0), key=lambda i: (lengths[i], i))
    while True:
        # A shorter row costs no more padding than what is there; a longer one makes all rows longer.
        choices: list[tuple[int, int, int]] = []
        if first > 0:
            choices.append((lengths[order[last]] - lengths[order[first - 1]], first - 1, last))
        if last + 1 < len(order):
            choices.append((lengths[order[last + 1]] - lengths[order[first]], first, last + 1))
        fitting = [c for c in choices if (c[2] - c[1] + 1) * lengths[order[c[2]]] <= tokens]
        if not fitting:
            return order[first : last + 1]
        _, first, last = min(fitting)
