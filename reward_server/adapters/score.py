"""vLLM's `/score`: pairs of texts, one with one, one with many, or each with its own -> `data[].score`.

The first text is the prompt, the second the response. `use_activation` true gives the sigmoid of the reward.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Self

from pydantic import ConfigDict, model_validator

from reward_server.adapters.common import Foreign, Texts, Told, Usage, as_list, pair_item, sigmoid, without_end
from reward_server.answering import Format, Rewards
from reward_server.config import AdaptersSection
from reward_server.problems import Path
from reward_server.schema import Item

NAMES = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
"""Under which names clients send the two sides."""


class Request(Foreign):
    """One pair of sides: text_1 and text_2, queries and documents or items, data_1 and data_2."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": list(names)} for names in NAMES]})

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None
    model: str | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: None = None
    instruction: None = None

    @model_validator(mode="after")
    def _one_pair_of_sides(self) -> Self:
        given = {name for name in dict.fromkeys(sum(NAMES, ())) if getattr(self, name) is not None}
        if given not in [set(names) for names in NAMES]:
            allowed = ", ".join(f"{first} and {second}" for first, second in NAMES)
            raise ValueError(f"exactly one pair of sides is needed: {allowed}")
        many, others = (as_list(side) for side in self.sides())
        if len(many) not in (1, len(others)):
            raise ValueError(f"{len(many)} texts with {len(others)}: one with many, or as many on both sides")
        return self

    def names(self) -> tuple[str, str]:
        return next(names for names in NAMES if all(getattr(self, name) is not None for name in names))

    def sides(self) -> tuple[str | tuple[str, ...], str | tuple[str, ...]]:
        first, second = self.names()
        return getattr(self, first), getattr(self, second)


class Score(Told):
    index: int
    object: Literal["score"] = "score"
    score: float


class Answer(Told):
    object: Literal["list"] = "list"
    model: str | None
    data: list[Score]
    usage: Usage = Usage()


def items(request: Request, reading: AdaptersSection) -> Sequence[Item]:
    prompts, responses = (as_list(side) for side in request.sides())
    if len(prompts) == 1:
        prompts = prompts * len(responses)
    return [
        pair_item(i, prompt, without_end(response, reading))
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]


def write(request: Request, rewards: Rewards, _query: Mapping[str, str]) -> Answer:
    values = [sigmoid(value) for value in rewards.values] if request.use_activation else rewards.values
    return Answer(model=request.model, data=[Score(index=i, score=value) for i, value in enumerate(values)])


def place(request: Request, index: int) -> Path:
    name = request.names()[1]
    return (name,) if isinstance(getattr(request, name), str) else (name, index)


SCORE = Format(
    name="vLLM",
    paths=("/score", "/v1/score"),
    request=Request,
    answer=Answer,
    summary="vLLM's scoring of pairs: the first text is the prompt, the second the response.",
    items=items,
    write=write,
    place=place,
)
