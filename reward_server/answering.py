"""One scoring request from bytes to bytes, whatever its wire format: `POST /v1/rewards` and the adapters alike.

Invariants: a failure is never a number (design, 2): a format that cannot say of one item that it failed refuses the
whole request, with 503 where trying again may help and with 422 and the item's field where it does not. A request's
deadline holds from its first byte to its last; a client that goes away leaves the queue.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from reward_server.admission import Admission, busy, while_connected
from reward_server.config import AdaptersSection, RewardSection
from reward_server.idempotency import HEADER as IDEMPOTENCY_KEY
from reward_server.idempotency import Answered, Repeats, checked_key
from reward_server.keys import Allowance
from reward_server.limits import check_items
from reward_server.metrics import Metrics
from reward_server.problems import Path, Refusal, field_problem, header_refusal, invalid, refusal_of
from reward_server.schema import Item, Result, RewardResponse
from reward_server.service import ScoringService

R = TypeVar("R", bound=BaseModel)

DEADLINE = "x-request-deadline-ms"
LONGEST_DEADLINE_MS = 3_600_000
IN_THREAD_BYTES = 64 * 2**10
"""Bodies above this are parsed in a thread: a large one would hold up the event loop for milliseconds."""


@dataclass(frozen=True)
class Rewards:
    """What an adapter writes: every item has a number. `components`: the values of each item's sources."""

    values: Sequence[float]
    components: Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Format(Generic[R]):
    """A wire format: how a request's items are read and how their rewards are written.

    `place` gives the field that item i came from. `query`: the request's query parameters, which `sources` is one of.
    `items` may raise Refusal.
    """

    name: str
    paths: tuple[str, ...]
    request: type[R]
    answer: Any
    summary: str
    items: Callable[[R, AdaptersSection], Sequence[Item]]
    write: Callable[[R, Rewards, Mapping[str, str]], Any]
    place: Callable[[R, int], Path]


@dataclass(frozen=True)
class Asked:
    """A parsed request: what to score, which of its fields a field of item i came from, how to write the answer."""

    items: Sequence[Item]
    sources: Sequence[str] | None
    place: Callable[[int, Path], Path]
    write: Callable[[RewardResponse], bytes]


class Answering:
    """Takes requests of every format through admission, limits and scoring."""

    def __init__(self, section: RewardSection, service: ScoringService, metrics: Metrics) -> None:
        self._section = section
        self._service = service
        self._admission = Admission(section, metrics)
        self._repeats = Repeats(section.idempotency_window_s, section.idempotency_bytes, metrics)

    async def answer(self, request: Request, read: Callable[[bytes], Asked]) -> Response:
        """The answer to a request whose body `read` understands. Raises Refusal."""
        state = request.scope["state"]
        allowance: Allowance = state["allowance"]
        wait_s = allowance.take_request()
        if wait_s is not None:
            raise busy(f"the key {allowance.name} has used its requests of this minute", wait_s)
        check_media_type(request)
        key = checked_key(request.headers.getlist(IDEMPOTENCY_KEY))
        seconds = deadline_s(request)
        try:
            async with asyncio.timeout(None if seconds is None else seconds - (time.monotonic() - state["arrived"])):
                async with self._admission.admitted():
                    body = await self._admission.body(request)

                    async def compute() -> Answered:
                        return await self._compute(body, read, allowance, state)

                    work = (
                        compute()
                        if key is None
                        else self._repeats.answer(
                            allowance.name, request.url.path, key, query_of(request) + body, compute
                        )
                    )
                    answered = await while_connected(request, work)
        except TimeoutError:
            # Inner waits turn their own time-outs into refusals: what is left is the request's.
            message = f"not scored within the {1000 * (seconds or 0):.0f} ms that the request allows"
            raise Refusal(504, "deadline_exceeded", message) from None
        return Response(answered.body, media_type="application/json")

    async def _compute(
        self, body: bytes, read: Callable[[bytes], Asked], allowance: Allowance, state: dict[str, Any]
    ) -> Answered:
        asked = await asyncio.to_thread(read, body) if len(body) > IN_THREAD_BYTES else read(body)
        state["items"] = len(asked.items)
        check_items(asked.items, asked.place, self._section)
        if allowance.max_items is not None and len(asked.items) > allowance.max_items:
            message = f"{len(asked.items)} items, the key {allowance.name} may have {allowance.max_items} at a time"
            raise Refusal(413, "too_large", message)
        with allowance.items(len(asked.items)) as held:
            if not held:
                why = f"the key {allowance.name} has too many items under way"
                raise busy(why, self._section.retry_after_s)
            async with self._admission.turn():
                answer = await self._service.score(asked.items, asked.sources)
        infra = any(result.error is not None and result.error.kind == "infra" for result in answer.results)
        return Answered(asked.write(answer), keep=not infra)

    def read_format(self, form: Format[Any], query: Mapping[str, str], body: bytes) -> Asked:
        """The request of an adapter's format in a body. Refuses with 422 what is no such request."""
        try:
            request: Any = form.request.model_validate_json(body)
        except ValidationError as error:
            raise refusal_of(error, body) from None
        sources = asked_sources(query, self._section)

        def place(index: int, _field: Path = ()) -> Path:
            return form.place(request, index)

        def write(answer: RewardResponse) -> bytes:
            rewards = every_reward(answer.results, place, self._section.retry_after_s)
            return to_json(form.write(request, rewards, query), inf_nan_mode="null")

        return Asked(form.items(request, self._section.adapters), sources, place, write)


def every_reward(results: Sequence[Result], place: Callable[[int], Path], retry_after_s: int) -> Rewards:
    """The rewards of results that are all ok. Raises Refusal where one is not: the format has no word for it."""
    failed = [(i, result.error) for i, result in enumerate(results) if result.error is not None]
    infra = [error for _, error in failed if error.kind == "infra"]
    if infra:
        message = f"{len(infra)} of {len(results)} items could not be scored: {infra[0].message}"
        raise Refusal(503, infra[0].code.value, message, headers={"Retry-After": str(retry_after_s)})
    if failed:
        raise invalid([field_problem(place(i), error.message, error.code.value) for i, error in failed[:20]])
    return Rewards(
        values=[result.reward for result in results if result.reward is not None],
        components=[
            {name: part.value for name, part in result.components.items() if part.value is not None}
            for result in results
        ],
    )


def asked_sources(query: Mapping[str, str], section: RewardSection) -> Sequence[str] | None:
    """The sources in `?sources=a,b`; None, for all of the recipe's, where there are none. Raises Refusal."""
    if "sources" not in query:
        return None
    names = query["sources"].split(",")
    if unknown := [name for name in names if name not in section.sources]:
        allowed = ", ".join(sorted(section.sources))
        problem = field_problem((), f"unknown source; there are: {allowed}", "value_error")
        problem = problem.model_copy(update={"loc": ("query", "sources"), "path": "query.sources"})
        raise Refusal(422, "invalid_request", f"query.sources: {len(unknown)} unknown; there are: {allowed}", [problem])
    return names


def for_adapters(refusal: Refusal) -> Refusal:
    """A refusal as clients of the adapters need it: 503 for what may work again, as they give up on any 4xx."""
    if refusal.status not in (408, 429):
        return refusal
    error = refusal.body.error
    headers = {"Retry-After": "1", **refusal.headers}
    return Refusal(503, error.code, error.message, refusal.body.detail, headers)


def query_of(request: Request) -> bytes:
    """The query, which may name sources or the form of the answer, and a byte that is in none."""
    return request.url.query.encode() + b"\n"


def deadline_s(request: Request) -> float | None:
    """Seconds that the client allows for its request, from its arrival; None where it does not say."""
    given = request.headers.getlist(DEADLINE)
    if not given:
        return None
    if len(given) > 1 or not (given[0].isascii() and given[0].isdigit() and len(given[0]) <= 9 and int(given[0]) > 0):
        raise header_refusal(DEADLINE, "one whole number of milliseconds above 0", "value_error")
    return min(int(given[0]), LONGEST_DEADLINE_MS) / 1000


def check_media_type(request: Request) -> None:
    """Refuses with 415 what says that it is no JSON: a page in a browser can send no other without asking first."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given and given != "application/json" and not given.endswith("+json"):
        raise Refusal(415, "unsupported_media_type", "the body is JSON: send Content-Type: application/json")
