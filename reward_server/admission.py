"""Bounded admission: how many requests are held, how many are scored at once, and how large they may be.

Invariant: at most `max_requests` bodies of at most `max_bytes` are in memory. A request beyond that is refused before
its body is read, with Retry-After; every wait has a deadline (design, invariant 6), and ends when its client goes away.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from reward_server.config import RewardSection
from reward_server.metrics import Metrics
from reward_server.problems import Refusal

T = TypeVar("T")


class Admission:
    def __init__(self, section: RewardSection, metrics: Metrics) -> None:
        self._section = section
        self._metrics = metrics
        self._admitted = 0
        self._slots = asyncio.Semaphore(section.turns())

    @asynccontextmanager
    async def admitted(self) -> AsyncGenerator[None]:
        """A place among the requests that are held; refuses with 429 where all are taken."""
        if self._admitted >= self._section.max_requests:
            raise self._busy(f"{self._admitted} requests are held already")
        self._admitted += 1
        self._metrics.admitted.inc()
        try:
            yield
        finally:
            self._admitted -= 1
            self._metrics.admitted.dec()

    @asynccontextmanager
    async def turn(self) -> AsyncGenerator[None]:
        """A turn to be scored; refuses with 429 where none comes in time."""
        started = time.perf_counter()
        self._metrics.waiting.inc()
        try:
            async with asyncio.timeout(self._section.queue_timeout_s):
                await self._slots.acquire()
        except TimeoutError:
            raise self._busy(f"no turn within {self._section.queue_timeout_s:g} s") from None
        finally:
            self._metrics.waiting.dec()
            self._metrics.waited(time.perf_counter() - started)
        self._metrics.scoring.inc()
        try:
            with self._metrics.busy_scoring:
                yield
        finally:
            self._metrics.scoring.dec()
            self._slots.release()

    async def body(self, request: Request) -> bytes:
        """The request's body; refuses with 413 where it is too large, 408 where it does not arrive in time."""
        most = self._section.max_bytes
        # Refused without keeping what follows: the transport reads past it, as a client that is cut off while it still
        # sends would see a lost connection, and try again, in place of the refusal.
        too_large = Refusal(413, "too_large", f"the body has more than {most} bytes")
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > most:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._section.body_timeout_s):
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise too_large
                    parts.append(part)
        except TimeoutError:
            message = f"the body did not arrive within {self._section.body_timeout_s:g} s"
            raise Refusal(408, "body_timeout", message, headers={"Connection": "close"}) from None
        except ClientDisconnect:
            raise gone() from None
        return b"".join(parts)

    def _busy(self, why: str) -> Refusal:
        return busy(why, self._section.retry_after_s)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's outcome; where the client goes away first, the work is cancelled and leaves what it waited in.

    Call once the body has been read: what arrives after it is the client's leaving.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise gone()
        return task.result()
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def gone() -> Refusal:
    """Counted and logged; there is nobody left to read it."""
    return Refusal(499, "disconnected", "the client went away before its answer")


def busy(why: str, retry_after_s: int) -> Refusal:
    """429: the same request may be answered later."""
    return Refusal(429, "overloaded", f"overloaded: {why}", headers={"Retry-After": str(retry_after_s)})
