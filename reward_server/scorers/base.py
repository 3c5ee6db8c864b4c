"""The interface of every source of score, and what the scorers share.

A scorer takes a batch and answers for each item, in order, with a component: a finite value or a failure with its
code. A score is a function of the item and the scorer's revision: never of the batch (design, invariants 4 and 8).
Scorers are asynchronous so that a model, a judge or another service fits behind the same interface; one that computes
on the processor leaves the event loop to others.
"""

import asyncio
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from reward_server.config import SourceSection, digest, resolved_source
from reward_server.schema import Component, ErrorCode, Item, failed_component
from services.scoring_format import Turn, turns_of

CODE_REVISION = 1
"""Part of every source's revision: raised when the same item would get another score from the same configuration."""


@dataclass(frozen=True)
class Scored:
    """One item's component, and flags for its result. `revision` is that of the scorer when it scored, where it can
    change while the server runs; None: the scorer's own."""

    component: Component
    flags: tuple[str, ...] = ()
    revision: str | None = None


class Scorer(Protocol):
    """One source of score. `revision` changes whenever the same item could get another value."""

    @property
    def revision(self) -> str: ...

    async def score(self, items: Sequence[Item]) -> Sequence[Scored]:
        """A component for each item, in order. What concerns one item fails that item; an exception is the source's
        own failure and fails them all as `source_error`, NoReplica as `source_down` (infra)."""
        ...


class ItemFailure(Exception):  # noqa: N818 - a failure is the word of the design
    """Raised by a function that scores one item, for a failure that concerns this item."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


NOT_ITS_OWN = frozenset({"weight", "required", "offset", "scale", "clip"})
"""Options of a source that belong to the combination: to the recipe's revision, not to the source's."""
PLACEMENT = frozenset(
    {"device", "batch_tokens", "batch_wait_ms", "timeout_s", "retries", "concurrency", "key_env", "model_revision"}
    | {"replicas", "threads", "cpus", "gpus", "restarts"}
)
"""Options of a source that asks a model which say where and how fast, not what."""


def revision_of(source: SourceSection, **more: Any) -> str:
    """Of the kind, its resolved options and the code's revision. `more` stands in for options of the same name: the
    revision of a model's files for its path."""
    hidden = NOT_ITS_OWN | PLACEMENT if more else NOT_ITS_OWN
    own = {key: value for key, value in resolved_source(source).items() if key not in hidden}
    return digest({"code": CODE_REVISION, **own, **more})


@dataclass(frozen=True)
class FunctionScorer:
    """A source that is a pure function of one item, run in a thread, which ends after the item in hand where nobody
    waits for it any more."""

    revision: str
    function: Callable[[Item], Scored]

    async def score(self, items: Sequence[Item]) -> Sequence[Scored]:
        gone = threading.Event()

        def score() -> list[Scored]:
            return [self._score_one(item) for item in items if not gone.is_set()]

        try:
            return await asyncio.to_thread(score)
        finally:
            gone.set()

    def _score_one(self, item: Item) -> Scored:
        try:
            return self.function(item)
        except ItemFailure as failure:
            return failed(failure)


def ok(value: float, detail: Mapping[str, float | int], flags: Sequence[str] = ()) -> Scored:
    """A score. Raises ItemFailure where it, or a number beside it, is not finite."""
    for name, number in {"value": value, **detail}.items():
        if not math.isfinite(number):
            raise ItemFailure(ErrorCode.NON_FINITE_SCORE, f"the source's {name} is {number}")
    return Scored(Component(status="ok", value=value, detail=dict(detail)), tuple(flags))


def judged_by(scored: Scored, principles: Sequence[str]) -> Scored:
    """The same score, with the principles that the model read."""
    component = scored.component.model_copy(update={"principles": tuple(principles)})
    return replace(scored, component=component)


def failed(failure: ItemFailure) -> Scored:
    return Scored(failed_component(failure.code, str(failure)))


def prompt_turns(item: Item) -> tuple[Turn, ...]:
    """The conversation that the response answers; a prompt without roles is one user message."""
    if item.prompt is not None:
        return turns_of(item.prompt)
    if not item.messages:
        raise ItemFailure(ErrorCode.MISSING_PROMPT, "this source needs `prompt` or `messages`")
    return tuple(Turn(message.role, message.content) for message in item.messages)


def response_text(item: Item) -> str:
    if item.response is None:
        raise ItemFailure(ErrorCode.MISSING_RESPONSE, "this source needs `response`")
    if not item.response.strip():
        raise ItemFailure(ErrorCode.EMPTY_RESPONSE, "the response is empty")
    return item.response


def response_ids(item: Item) -> Sequence[int]:
    """The response's tokens without a trailing one that is in `eos_ids`."""
    if item.response_ids is None:
        raise ItemFailure(ErrorCode.MISSING_RESPONSE_IDS, "this source needs `response_ids`")
    ids = item.response_ids
    if ids and ids[-1] in item.eos_ids:
        ids = ids[:-1]
    if not ids:
        raise ItemFailure(ErrorCode.EMPTY_RESPONSE, "the response has no token but an end of sequence")
    return ids
