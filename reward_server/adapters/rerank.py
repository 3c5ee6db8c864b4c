"""`/rerank`, which two servers have in two forms: vLLM's with `documents` -> {"results": [{"relevance_score"}]}, the
text-embeddings server's (TEI) with `texts` -> [{"score"}]; both from the highest reward to the lowest.
"""

from collections.abc import Mapping, Sequence
from typing import Self

from pydantic import ConfigDict, Field, model_validator

from reward_server.adapters.common import (
    Foreign,
    Texts,
    Told,
    Usage,
    as_list,
    descending,
    pair_item,
    sigmoid,
    without_end,
)
from reward_server.answering import Format, Rewards
from reward_server.config import AdaptersSection
from reward_server.problems import Path
from reward_server.schema import Item, Many


class Request(Foreign):
    """`documents` (vLLM; `top_n` 0: all of them) or `texts` (TEI; without `raw_scores` the sigmoid of the reward)."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["documents"]}, {"required": ["texts"]}]})

    query: str
    documents: Texts | None = None
    texts: Many[str] | None = None
    model: str | None = None
    top_n: int = Field(0, ge=0)
    use_activation: bool | None = None
    raw_scores: bool = False
    return_text: bool = False
    truncate: bool | None = None
    truncate_prompt_tokens: None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.documents is None) == (self.texts is None):
            raise ValueError("either `documents` (vLLM's form) or `texts` (TEI's) is needed")
        return self

    def responses(self) -> list[str]:
        return as_list(self.texts if self.documents is None else self.documents)  # pyright: ignore[reportArgumentType]


class Document(Told):
    text: str


class Found(Told):
    index: int
    document: Document
    relevance_score: float


class VllmAnswer(Told):
    model: str | None
    results: list[Found]
    usage: Usage = Usage()


class Rank(Told):
    index: int
    score: float
    text: str | None = None


def items(request: Request, reading: AdaptersSection) -> Sequence[Item]:
    return [
        pair_item(i, request.query, without_end(response, reading)) for i, response in enumerate(request.responses())
    ]


def write(request: Request, rewards: Rewards, _query: Mapping[str, str]) -> VllmAnswer | list[Rank]:
    order = descending(rewards.values)
    texts = request.responses()
    if request.texts is not None:
        return [
            Rank(
                index=i,
                score=rewards.values[i] if request.raw_scores else sigmoid(rewards.values[i]),
                text=texts[i] if request.return_text else None,
            )
            for i in order
        ]
    found = [
        Found(
            index=i,
            document=Document(text=texts[i]),
            relevance_score=sigmoid(rewards.values[i]) if request.use_activation else rewards.values[i],
        )
        for i in order[: request.top_n or None]
    ]
    return VllmAnswer(model=request.model, results=found)


def place(request: Request, index: int) -> Path:
    if request.texts is not None:
        return ("texts", index)
    return ("documents",) if isinstance(request.documents, str) else ("documents", index)


RERANK = Format(
    name="vLLM, TEI",
    paths=("/rerank", "/v1/rerank", "/v2/rerank"),
    request=Request,
    answer=VllmAnswer | list[Rank],
    summary="vLLM's form with `documents`, TEI's with `texts`: responses to one prompt, the best first.",
    items=items,
    write=write,
    place=place,
)
