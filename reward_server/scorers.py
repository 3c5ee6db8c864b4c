"""The interface of every source of score, and the symbolic ones: length, repetition, exact match.

A scorer takes a batch and answers for each item, in order, with a component: a finite value or a failure with its
code. A score is a function of the item and the scorer's revision: never of the batch (design, invariants 4 and 8).
Scorers are asynchronous so that a model, a judge or another service fits behind the same interface; one that computes
on the processor leaves the event loop to others.
"""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from reward_server.config import (
    ExactMatchSource,
    LengthSource,
    RepetitionSource,
    SourceSection,
    digest,
    resolved_source,
)
from reward_server.schema import Component, ErrorCode, Item, failed_component
from services.attention.options import AttentionOptions
from services.attention.reward import repetition

CODE_REVISION = 1
"""Part of every source's revision: raised when the same item would get another score from the same configuration."""


@dataclass(frozen=True)
class Scored:
    """One item's component, and flags for its result."""

    component: Component
    flags: tuple[str, ...] = ()


class Scorer(Protocol):
    """One source of score. `revision` changes whenever the same item could get another value."""

    @property
    def revision(self) -> str: ...

    async def score(self, items: Sequence[Item]) -> Sequence[Scored]:
        """A component for each item, in order. What concerns one item fails that item; an exception is the source's
        own failure and fails them all as `source_error` (infra)."""
        ...


class ItemFailure(Exception):  # noqa: N818 - a failure is the word of the design
    """Raised by a function that scores one item, for a failure that concerns this item."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def revision_of(source: SourceSection) -> str:
    """Of the kind, its resolved options and the code's revision; weight and clipping belong to the recipe's."""
    values = resolved_source(source)
    own = {key: value for key, value in values.items() if key not in {"weight", "required", "offset", "scale", "clip"}}
    return digest({"code": CODE_REVISION, **own})


@dataclass(frozen=True)
class FunctionScorer:
    """A source that is a pure function of one item, run in a thread."""

    revision: str
    function: Callable[[Item], Scored]

    async def score(self, items: Sequence[Item]) -> Sequence[Scored]:
        return await asyncio.to_thread(lambda: [self._score_one(item) for item in items])

    def _score_one(self, item: Item) -> Scored:
        try:
            return self.function(item)
        except ItemFailure as failure:
            return Scored(failed_component(failure.code, str(failure)))


def ok(value: float, detail: Mapping[str, float | int]) -> Scored:
    return Scored(Component(status="ok", value=value, detail=dict(detail)))


def length_scorer(source: LengthSource) -> FunctionScorer:
    """bonus * min(n, target) / target - penalty * max(0, n - target) / target."""

    def score(item: Item) -> Scored:
        count = _count_units(item, source.unit)
        bonus = source.bonus * min(count, source.target) / source.target
        penalty = source.penalty * max(0, count - source.target) / source.target
        return ok(bonus - penalty, {"length": count, "bonus": bonus, "penalty": penalty})

    return FunctionScorer(revision_of(source), score)


def repetition_scorer(source: RepetitionSource) -> FunctionScorer:
    """Minus the `repeat` term of the attention reward, over tokens or words."""
    options = AttentionOptions(ngrams=source.ngrams, repeat_count=source.repeat_count, rate=source.rate)

    def score(item: Item) -> Scored:
        units = _response_ids(item) if source.unit == "tokens" else _word_ids(_response_text(item))
        repeat = repetition(units, (), options)  # a trailing end of sequence is cut off already
        return ok(0.0 - repeat, {"repeat": repeat})

    return FunctionScorer(revision_of(source), score)


def exact_match_scorer(source: ExactMatchSource) -> FunctionScorer:
    """1 where the response is the reference after normalisation, else 0."""
    normalise = NORMALISATIONS[source.normalise]

    def score(item: Item) -> Scored:
        if item.reference is None:
            raise ItemFailure(ErrorCode.MISSING_REFERENCE, "exact_match needs `reference`")
        return ok(float(normalise(_response_text(item)) == normalise(item.reference)), {})

    return FunctionScorer(revision_of(source), score)


_WORD = re.compile(r"[-+−]?\d+(?:[.,]\d+)*|\w+(?:['’]\w+)*")


def words(text: str) -> list[str]:
    """Lower-cased words: numbers with sign and decimals, and runs of letters, digits and underscores."""
    return _WORD.findall(text.casefold())


NORMALISATIONS: dict[str, Callable[[str], object]] = {
    "none": str,
    "whitespace": str.split,
    # Text without any word (an emoticon, a formula's sign) is compared as it stands.
    "words": lambda text: words(text) or text.split(),
}


def _word_ids(text: str) -> list[int]:
    numbers: dict[str, int] = {}
    return [numbers.setdefault(word, len(numbers)) for word in words(text)]


def _count_units(item: Item, unit: str) -> int:
    if unit == "tokens":
        return len(_response_ids(item))
    text = _response_text(item)
    return len(text.split()) if unit == "words" else len(text)


def _response_text(item: Item) -> str:
    if item.response is None:
        raise ItemFailure(ErrorCode.MISSING_RESPONSE, "this source needs `response`")
    if not item.response.strip():
        raise ItemFailure(ErrorCode.EMPTY_RESPONSE, "the response is empty")
    return item.response


def _response_ids(item: Item) -> Sequence[int]:
    """The response's tokens without a trailing one that is in `eos_ids`."""
    if item.response_ids is None:
        raise ItemFailure(ErrorCode.MISSING_RESPONSE_IDS, "this source needs `response_ids`")
    ids = item.response_ids
    if ids and ids[-1] in item.eos_ids:
        ids = ids[:-1]
    if not ids:
        raise ItemFailure(ErrorCode.EMPTY_RESPONSE, "the response has no token but an end of sequence")
    return ids
