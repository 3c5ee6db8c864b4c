"""A client of the scoring contract. Needs httpx and pydantic, and nothing of ours but the schema.

What goes wrong has two names. `RewardUnavailable`: the server did not answer, or not with what the contract says
(time-out, lost connection, 408, 429, 5xx, garbage); another try may succeed. `RewardRefused`: the server understood and
refused (401, 413, 422 ...); the same request is refused again. Neither ever becomes a number.
"""

import asyncio
import random
from collections.abc import Sequence
from http import HTTPStatus

import httpx
from pydantic import ValidationError

from reward_server.schema import ErrorResponse, Item, RewardRequest, RewardResponse

LONGEST_PAUSE_S = 5.0


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

    `timeout_s` is the deadline of one try from connecting to the last byte. After an infra failure a request is tried
    `retries` more times, with pauses from `backoff_s` that double, with jitter, or that the server asks for.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout_s: float = 30.0,
        *,
        retries: int = 3,
        backoff_s: float = 0.2,
        trust_env: bool = False,
    ) -> None:
        """`trust_env`: take proxies from the environment; off, as a proxy for a loopback address is a trap."""
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._retries = retries
        self._backoff_s = backoff_s
        headers = {"Content-Type": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        self._http = httpx.AsyncClient(base_url=self.url, headers=headers, timeout=timeout_s, trust_env=trust_env)

    async def __aenter__(self) -> "RewardClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def score(self, items: Sequence[Item], sources: Sequence[str] | None = None) -> RewardResponse:
        """Results in the order of the items. Raises RewardUnavailable or RewardRefused."""
        request = RewardRequest(items=tuple(items), sources=None if sources is None else tuple(sources))
        body = request.model_dump_json(exclude_none=True).encode()
        for attempt in range(self._retries + 1):
            try:
                return self._checked(await self._post(body), items)
            except RewardUnavailable as failure:
                if attempt == self._retries:
                    raise
                await asyncio.sleep(pause_s(attempt, self._backoff_s, failure.retry_after_s))
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def ready(self) -> bool:
        """Whether the server scores, by one try of /readyz; False where it does not answer."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return (await self._http.get("/readyz")).status_code == HTTPStatus.OK
        except (httpx.HTTPError, TimeoutError):
            return False

    async def _post(self, body: bytes) -> httpx.Response:
        try:
            # httpx's own time-outs are of each read: a server that sends a byte now and then would never end.
            async with asyncio.timeout(self._timeout_s):
                return await self._http.post("/v1/rewards", content=body)
        except (TimeoutError, httpx.TimeoutException):
            raise RewardUnavailable(f"{self.url} did not answer within {self._timeout_s:g} s") from None
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


def pause_s(attempt: int, backoff_s: float, asked_s: float | None = None) -> float:
    """Seconds before try `attempt + 1`: what the server asked for, else doubling up to 5 s; with jitter of a half."""
    longest = min(asked_s if asked_s is not None else backoff_s * 2 ** min(attempt, 16), LONGEST_PAUSE_S)
    return longest * random.uniform(0.5, 1.0) if asked_s is None else longest * random.uniform(1.0, 1.5)


def retry_after(response: httpx.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdecimal() else None


def said(response: httpx.Response) -> str:
    """What a refusal says, in one short line."""
    try:
        return ErrorResponse.model_validate_json(response.content).error.message[:500]
    except ValidationError:
        return response.text[:100].replace("\n", " ") or "nothing"
