"""A client of the scoring contract. Needs httpx and pydantic, and nothing of ours but the schema.

What goes wrong has two names. `RewardUnavailable`: the server did not answer, or not with what the contract says
(time-out, lost connection, 408, 429, 5xx, garbage); another try may succeed. `RewardRefused`: the server understood and
refused (401, 413, 422 ...); the same request is refused again. Neither ever becomes a number.
"""

import asyncio
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from http import HTTPStatus
from typing import Any, TypeVar

import httpx
from pydantic import ValidationError

from reward_server.schema import ErrorResponse, Item, Result, RewardRequest, RewardResponse

LONGEST_PAUSE_S = 5.0
LONGEST_ASKED_S = 120.0
"""A pause that a server asks for is kept up to this; limits by the minute ask for 60 s at most."""
T = TypeVar("T")


class RewardUnavailable(Exception):  # noqa: N818 - says what is, not what raised it
    """No usable answer: an infra failure. `retry_after_s` is what the server asked for, where it did."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RewardRefused(Exception):  # noqa: N818
    """The server refused the request as it is; `status` is the HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message, status)
        self.status = status

    def __str__(self) -> str:
        return str(self.args[0])


class RewardClient:
    """Scores items at one server, over a pool of connections. Use as an async context manager, or call `close`.

    `timeout_s` is the deadline of one try from connecting to the last byte, which the server is told of. After an infra
    failure a request is tried `retries` more times, with pauses from `backoff_s` that double, with jitter, or that the
    server asks for; every try carries the same Idempotency-Key, so that what was scored already is not scored again.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout_s: float = 30.0,
        *,
        retries: int = 3,
        backoff_s: float = 0.2,
        connections: int = 100,
        trust_env: bool = False,
    ) -> None:
        """`connections`: most at a time. `trust_env`: take proxies from the environment; off, as a proxy for a loopback
        address is a trap."""
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._retries = retries
        self._backoff_s = backoff_s
        headers = {"Content-Type": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=timeout_s,
            trust_env=trust_env,
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    async def __aenter__(self) -> "RewardClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def score(
        self, items: Sequence[Item], sources: Sequence[str] | None = None, *, deadline_s: float | None = None
    ) -> RewardResponse:
        """Results in the order of the items. Raises RewardUnavailable or RewardRefused.

        `deadline_s`: of the whole call, with every try and pause; None: the tries' own deadlines alone.
        """
        request = RewardRequest(items=tuple(items), sources=None if sources is None else tuple(sources))
        body = request.model_dump_json(exclude_none=True).encode()
        key = uuid.uuid4().hex
        end = None if deadline_s is None else time.monotonic() + deadline_s
        for attempt in range(self._retries + 1):
            left = self._timeout_s if end is None else min(self._timeout_s, max(end - time.monotonic(), 0.001))
            try:
                return self._checked(await self._post(body, key, attempt, left), items)
            except RewardUnavailable as failure:
                pause = pause_s(attempt, self._backoff_s, failure.retry_after_s)
                if attempt == self._retries:
                    raise
                if end is not None and time.monotonic() + pause >= end:
                    raise RewardUnavailable(f"{failure}; no further try within {deadline_s:g} s") from failure
                await asyncio.sleep(pause)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def settled(
        self,
        items: Sequence[Item],
        sources: Sequence[str] | None = None,
        *,
        batch_items: int = 64,
        deadline_s: float | None = None,
    ) -> list[Result]:
        """Results of any number of items, in order: each ok, or failed by its own data.

        Items that fail as infra are asked for again, `retries` times; then, as for `score`, RewardUnavailable. All
        batches and tries share `deadline_s`.
        """
        end = None if deadline_s is None else time.monotonic() + deadline_s
        found: dict[int, Result] = {}
        for start in range(0, len(items), batch_items):
            left = list(range(start, min(start + batch_items, len(items))))
            for attempt in range(self._retries + 1):
                remaining = None if end is None else max(end - time.monotonic(), 0.0)
                answer = await self.score([items[i] for i in left], sources, deadline_s=remaining)
                results = dict(zip(left, answer.results, strict=True))
                errors = {i: result.error for i, result in results.items() if result.error is not None}
                left = [i for i, error in errors.items() if error.kind == "infra"]
                found.update((i, result) for i, result in results.items() if i not in left)
                if not left:
                    break
                pause = pause_s(attempt, self._backoff_s)
                if attempt == self._retries or (end is not None and time.monotonic() + pause >= end):
                    message = f"{self.url} failed to score {len(left)} items: {errors[left[0]].message}"
                    raise RewardUnavailable(message)
                await asyncio.sleep(pause)
        return [found[i] for i in range(len(items))]

    async def ready(self) -> bool:
        """Whether the server scores, by one try of /readyz; False where it does not answer."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return (await self._http.get("/readyz")).status_code == HTTPStatus.OK
        except (httpx.HTTPError, TimeoutError):
            return False

    async def _post(self, body: bytes, key: str, attempt: int, timeout_s: float) -> httpx.Response:
        headers = {
            "Idempotency-Key": key,
            "X-Request-Id": f"{key}.{attempt}",
            "X-Request-Deadline-Ms": str(max(1, int(1000 * timeout_s))),
        }
        try:
            # httpx's own time-outs are of each read: a server that sends a byte now and then would never end.
            async with asyncio.timeout(timeout_s):
                return await self._http.post("/v1/rewards", content=body, headers=headers)
        except (TimeoutError, httpx.TimeoutException):
            raise RewardUnavailable(f"{self.url} did not answer within {timeout_s:g} s") from None
        except httpx.HTTPError as error:
            raise RewardUnavailable(f"{self.url}: {type(error).__name__}: {error}") from error

    def _checked(self, response: httpx.Response, items: Sequence[Item]) -> RewardResponse:
        status = response.status_code
        if status != HTTPStatus.OK:
            message = f"{self.url} answered {status}: {said(response)}"
            if status in (408, 429) or not 400 <= status < 500:
                raise RewardUnavailable(message, retry_after(response))
            raise RewardRefused(message, status)
        try:
            answer = RewardResponse.model_validate_json(response.content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(step) for step in first["loc"]) or "the body"
            raise RewardUnavailable(f"{self.url} answered what is no result: {place}: {first['msg']}") from None
        if [result.id for result in answer.results] != [item.id for item in items]:
            raise RewardUnavailable(
                f"{self.url} answered {len(answer.results)} results, not one for each item in order"
            )
        return answer


class SyncRewardClient:
    """`RewardClient` for callers without an event loop: one in a thread of its own, shared by all threads that call.

    The same deadlines hold. In a forked process it starts anew, as neither threads nor connections survive a fork.
    """

    def __init__(self, url: str, token: str | None = None, timeout_s: float = 30.0, **options: Any) -> None:
        """`options` are RewardClient's."""
        self.url = url.rstrip("/")
        self._make = lambda: RewardClient(url, token, timeout_s, **options)
        self._lock = threading.Lock()
        self._pid = -1
        self._loop: asyncio.AbstractEventLoop
        self._client: RewardClient

    def __enter__(self) -> "SyncRewardClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def score(
        self, items: Sequence[Item], sources: Sequence[str] | None = None, *, deadline_s: float | None = None
    ) -> RewardResponse:
        """As RewardClient.score."""
        return self._run(lambda client: client.score(items, sources, deadline_s=deadline_s))

    def settled(self, items: Sequence[Item], sources: Sequence[str] | None = None, **options: Any) -> list[Result]:
        """As RewardClient.settled."""
        return self._run(lambda client: client.settled(items, sources, **options))

    def ready(self) -> bool:
        """As RewardClient.ready."""
        return self._run(lambda client: client.ready())

    def close(self) -> None:
        """Closes the connections and ends the thread; a later call starts anew."""
        with self._lock:
            if self._pid != os.getpid():
                return
            asyncio.run_coroutine_threadsafe(self._client.close(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._pid = -1

    def _run(self, call: Callable[[RewardClient], Coroutine[Any, Any, T]]) -> T:
        with self._lock:
            if self._pid != os.getpid():
                self._loop, self._client = asyncio.new_event_loop(), self._make()
                threading.Thread(target=self._loop.run_forever, name="reward-client", daemon=True).start()
                self._pid = os.getpid()
            loop, client = self._loop, self._client
        future = asyncio.run_coroutine_threadsafe(call(client), loop)
        try:
            return future.result()
        except BaseException:  # an interrupt, too, ends what it waited for
            future.cancel()
            raise


def pause_s(attempt: int, backoff_s: float, asked_s: float | None = None) -> float:
    """Seconds before try `attempt + 1`: what the server asked for and up to a fifth more, else doubling up to 5 s less
    up to a half: clients that failed together do not come back together."""
    if asked_s is not None:
        return min(asked_s, LONGEST_ASKED_S) * random.uniform(1.0, 1.2)
    return min(backoff_s * 2 ** min(attempt, 16), LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)


def retry_after(response: httpx.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdecimal() else None


def said(response: httpx.Response) -> str:
    """What a refusal says, in one short line."""
    try:
        return ErrorResponse.model_validate_json(response.content).error.message[:500]
    except ValidationError:
        return response.text[:100].replace("\n", " ") or "nothing"
