"""Idempotency-Key: the same key with the same body gets the same answer, computed once, by all who wait for it.

Keys belong to whoever asks (the API key's name) and to a route. Only whole answers are kept: a refusal, or an answer
with an infra failure in it, is what a client tries again for. The same key with another body is the client's mistake.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from reward_server.metrics import Metrics
from reward_server.problems import header_refusal

HEADER = "idempotency-key"
LONGEST_KEY = 255


@dataclass(frozen=True)
class Answered:
    """An answer's body; `keep` where the same would be said again."""

    body: bytes
    keep: bool


@dataclass
class _Entry:
    digest: bytes
    task: "asyncio.Task[Answered]"
    waiting: int = 0
    kept_at: float | None = None


class Repeats:
    """Answers by key, for `window_s` and within `most_bytes`; those being computed are bounded by the admission."""

    def __init__(self, window_s: float, most_bytes: int, metrics: Metrics) -> None:
        self._window_s = window_s
        self._most_bytes = most_bytes
        self._metrics = metrics
        self._entries: OrderedDict[tuple[str, str, str], _Entry] = OrderedDict()
        self._bytes = 0

    async def answer(
        self, who: str, route: str, key: str, asked: bytes, compute: Callable[[], Awaitable[Answered]]
    ) -> Answered:
        """The answer to the key: known, being computed for another, or computed now. `asked`: what must be the same.

        Whoever waits may be cancelled; the computation is cancelled with the last of them.
        """
        self._forget(time.monotonic())
        place = (who, route, key)
        digest = hashlib.sha256(asked).digest()
        entry = self._entries.get(place)
        if entry is None:
            entry = _Entry(digest, asyncio.create_task(_run(compute)))
            self._entries[place] = entry
        elif entry.digest != digest:
            raise header_refusal(HEADER, "this key came with another body or query before", "idempotency_key_reused")
        else:
            self._metrics.repeated.inc()
        entry.waiting += 1
        try:
            answered = await asyncio.shield(entry.task)
        finally:
            entry.waiting -= 1
            if not entry.task.done() and entry.waiting == 0:
                entry.task.cancel()
            if self._entries.get(place) is entry and not self._keeps(entry):
                del self._entries[place]
        if entry.kept_at is None and self._entries.get(place) is entry:
            entry.kept_at = time.monotonic()
            self._bytes += len(answered.body)
            self._entries.move_to_end(place)
            self._forget(entry.kept_at)
        return answered

    @staticmethod
    def _keeps(entry: _Entry) -> bool:
        if not entry.task.done():
            return entry.waiting > 0
        return not entry.task.cancelled() and entry.task.exception() is None and entry.task.result().keep

    def _forget(self, now: float) -> None:
        """Drops what is older than the window, and the oldest where there is too much."""
        gone: list[tuple[str, str, str]] = []
        for place, entry in self._entries.items():  # those that are kept are in the order of their age
            if entry.kept_at is None:
                continue
            if now - entry.kept_at < self._window_s and self._bytes <= self._most_bytes:
                break
            self._bytes -= len(entry.task.result().body)
            gone.append(place)
        for place in gone:
            del self._entries[place]


async def _run(compute: Callable[[], Awaitable[Answered]]) -> Answered:
    return await compute()


def checked_key(given: list[str]) -> str | None:
    """The key of a request's Idempotency-Key headers; None where there is none."""
    if not given:
        return None
    key = given[0]
    if len(given) > 1 or not 0 < len(key) <= LONGEST_KEY or not key.isascii() or not key.isprintable():
        raise header_refusal(HEADER, f"one key of 1 to {LONGEST_KEY} printable ASCII characters", "value_error")
    return key
