"""The text-embeddings server's (TEI) `/predict`: a text, a pair, or a batch of both -> [{"score", "label"}], a list for
each of a batch. A pair is prompt and response; a text is both in one. Without `raw_scores` the score is the reward's
sigmoid.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, cast

from pydantic import Discriminator, Field, Tag

from reward_server.adapters.common import (
    MANY_TAG,
    ONE_TAG,
    Foreign,
    Told,
    one_or_many,
    pair_item,
    sigmoid,
    text_item,
    without_end,
)
from reward_server.answering import Format, Rewards
from reward_server.config import AdaptersSection
from reward_server.problems import Path
from reward_server.schema import Item, Many

PAIR_TAG = "<pair>"
Entry = Annotated[Many[str], Field(min_length=1, max_length=2)]


def _form(value: Any) -> str:
    entries = cast("Sequence[Any]", value) if isinstance(value, list | tuple) else ()
    return PAIR_TAG if entries and isinstance(entries[0], str) else one_or_many(value)


class Request(Foreign):
    inputs: Annotated[
        Annotated[str, Tag(ONE_TAG)]
        | Annotated[tuple[str, str], Tag(PAIR_TAG)]
        | Annotated[Many[Entry], Tag(MANY_TAG)],
        Discriminator(_form),
    ]
    raw_scores: bool = False
    truncate: bool | None = None

    def entries(self) -> Sequence[Sequence[str]]:
        if isinstance(self.inputs, str):
            return [(self.inputs,)]
        pair = [text for text in self.inputs if isinstance(text, str)]
        return [pair] if pair else [entry for entry in self.inputs if not isinstance(entry, str)]

    def is_batch(self) -> bool:
        return not isinstance(self.inputs, str) and not any(isinstance(entry, str) for entry in self.inputs)


class Prediction(Told):
    score: float
    label: Annotated[str, Field(description="Always `reward`.")] = "reward"


def items(request: Request, reading: AdaptersSection) -> Sequence[Item]:
    return [
        text_item(i, entry[0], reading) if len(entry) == 1 else pair_item(i, entry[0], without_end(entry[1], reading))
        for i, entry in enumerate(request.entries())
    ]


def write(request: Request, rewards: Rewards, _query: Mapping[str, str]) -> list[Prediction] | list[list[Prediction]]:
    found = [Prediction(score=value if request.raw_scores else sigmoid(value)) for value in rewards.values]
    return [[prediction] for prediction in found] if request.is_batch() else found


def place(request: Request, index: int) -> Path:
    return ("inputs", index) if request.is_batch() else ("inputs",)


PREDICT = Format(
    name="TEI",
    paths=("/predict",),
    request=Request,
    answer=list[Prediction] | list[list[Prediction]],
    summary="TEI's sequence classification with one class.",
    items=items,
    write=write,
    place=place,
)
