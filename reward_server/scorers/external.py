"""The `external` source: another service scores, in one of three forms. Its number is the value, as it came.

native    POST /v1/rewards of a server like this one: the result's reward, or its failure
openrlhf  POST {"query": [prompt + response], "prompts": [...], "labels": [reference]} -> {"rewards": [number]}
vllm      POST /score {"model", "text_1": [prompt], "text_2": [response]} -> {"data": [{"index", "score"}]}
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from reward_server.model_sources_config import ExternalSource
from reward_server.schema import ErrorCode, Item, Result, RewardRequest, RewardResponse
from reward_server.scorers.base import ItemFailure, Scored, failed, ok, prompt_turns, response_text, revision_of
from reward_server.scorers.upstream import connection, key_of, post
from services.scoring_format import plain_text


@dataclass(frozen=True)
class ExternalScorer:
    revision: str
    source: ExternalSource

    async def score(self, items: Sequence[Item]) -> Sequence[Scored]:
        wire = WIRES[self.source.format]
        asked: list[tuple[int, Any]] = []
        scored: dict[int, Scored] = {}
        for i, item in enumerate(items):
            try:
                asked.append((i, wire.write_item(item)))
            except ItemFailure as failure:
                scored[i] = failed(failure)
        if asked:
            async with connection(self.source.timeout_s, key_of("external", self.source.key_env)) as http:
                answers = await self._ask(wire, http, [values for _, values in asked])
            scored.update((i, answer) for (i, _), answer in zip(asked, answers, strict=True))
        return [scored[i] for i in range(len(items))]

    async def _ask(self, wire: "Wire", http: Any, values: Sequence[Any]) -> Sequence[Scored]:
        source = self.source
        try:
            return await post(
                http, source.url + wire.path, wire.write(source, values), partial(wire.read, len(values)),
                timeout_s=source.timeout_s, retries=source.retries,
            )  # fmt: skip
        except ItemFailure as failure:
            if failure.code is not ErrorCode.UPSTREAM_FAILED or len(values) == 1:
                return [failed(failure)] * len(values)
            # Refused as a whole: in halves, so that an item fails for what is wrong with itself alone.
            middle = len(values) // 2
            return [
                *await self._ask(wire, http, values[:middle]),
                *await self._ask(wire, http, values[middle:]),
            ]


def external_scorer(name: str, source: ExternalSource) -> ExternalScorer:
    """Raises UserError where its key is not set."""
    key_of(f"reward.sources.{name}", source.key_env)
    return ExternalScorer(revision_of(source, service_revision=source.service_revision), source)


@dataclass(frozen=True)
class Wire:
    """A form: what of an item it needs, the body of many, and the scores of an answer for so many items."""

    path: str
    write_item: Callable[[Item], Any]
    write: Callable[[ExternalSource, Sequence[Any]], dict[str, Any]]
    read: Callable[[int, Any], list[Scored]]


def _native_body(source: ExternalSource, items: Sequence[Item]) -> dict[str, Any]:
    request = RewardRequest(items=tuple(items), sources=source.sources)
    return request.model_dump(mode="json", exclude_none=True)


def _native_scores(count: int, answer: Any) -> list[Scored]:
    results = RewardResponse.model_validate(answer).results
    _check(len(results), count)
    return [_native_score(result) for result in results]


def _native_score(result: Result) -> Scored:
    if result.reward is not None:
        return ok(result.reward, {}, result.flags)
    assert result.error is not None
    infra = result.error.kind == "infra"
    code = ErrorCode.UPSTREAM_UNAVAILABLE if infra else ErrorCode.UPSTREAM_FAILED
    if result.error.code is ErrorCode.SOURCE_DOWN:
        code = ErrorCode.SOURCE_DOWN
    return failed(ItemFailure(code, f"{result.error.code}: {result.error.message}"))


def _texts(item: Item) -> tuple[str, str, str | None]:
    return plain_text(prompt_turns(item)), response_text(item), item.reference


def _openrlhf_body(source: ExternalSource, texts: Sequence[tuple[str, str, str | None]]) -> dict[str, Any]:
    del source
    return {
        "query": [prompt + response for prompt, response, _ in texts],
        "prompts": [prompt for prompt, _, _ in texts],
        "labels": [reference for _, _, reference in texts],
    }


def _openrlhf_scores(count: int, answer: Any) -> list[Scored]:
    rewards = answer["rewards"]
    _check(len(rewards), count)
    return [_number(reward) for reward in rewards]


def _vllm_body(source: ExternalSource, texts: Sequence[tuple[str, str, str | None]]) -> dict[str, Any]:
    return {"model": source.model, "text_1": [t[0] for t in texts], "text_2": [t[1] for t in texts]}


def _vllm_scores(count: int, answer: Any) -> list[Scored]:
    scores = {int(entry["index"]): entry["score"] for entry in answer["data"]}
    _check(len(scores), count)
    return [_number(scores[i]) for i in range(count)]


def _number(value: Any) -> Scored:
    """A score, or a failure where the service gave none: null, a text, NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return failed(ItemFailure(ErrorCode.UPSTREAM_FAILED, "the service gave no number for this item"))
    return ok(float(value), {})


def _check(answers: int, items: int) -> None:
    if answers != items:
        raise ValueError(f"{answers} answers for {items} items")


WIRES = {
    "native": Wire("/v1/rewards", lambda item: item, _native_body, _native_scores),
    "openrlhf": Wire("", _texts, _openrlhf_body, _openrlhf_scores),
    "vllm": Wire("/score", _texts, _vllm_body, _vllm_scores),
}
