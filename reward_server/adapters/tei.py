"""The text-embeddings server's (TEI) `/predict`: a text, a pair, or a batch of both -> [{"score", "label"}], a list for
each of a batch. A pair is prompt and response; a text is both in one. Without `raw_scores` the score is the reward's
sigmoid.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field

from reward_server.adapters.common import Foreign, Told, pair_item, sigmoid, text_item, without_end
from reward_server.answering import Format, Rewards
from reward_server.config import AdaptersSection
from reward_server.problems import Path
from reward_server.schema import Item

Text = tuple[str]
Pair = tuple[str, str]


class Request(Foreign):
    inputs: str | Pair | tuple[Text | Pair, ...]
    raw_scores: bool = False
    truncate: bool | None = None

    def entries(self) -> Sequence[Sequence[str]]:
        if isinstance(self.inputs, str):
            return [(self.inputs,)]
        first = self.inputs[0] if self.inputs else ()
        return [self.inputs] if isinstance(first, str) else self.inputs  # type: ignore[list-item, return-value]

    def is_batch(self) -> bool:
        return not isinstance(self.inputs, str) and not (self.inputs and isinstance(self.inputs[0], str))


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
