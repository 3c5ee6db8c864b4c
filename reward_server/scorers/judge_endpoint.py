"""A judge behind an OpenAI-compatible endpoint (vLLM's server is one): its log-probabilities of the allowed answers.

The endpoint is asked for the `top_logprobs` of the first few tokens. The first token that is an allowed answer counts,
as a judge may begin with a bracket or a space. An answer that is not among those listed is taken at the lowest listed
log-probability, its upper bound, and the item is flagged `judge_bounded`: the true score is further out.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reward_server.model_sources_config import JudgeSource
from reward_server.schema import ErrorCode, Item
from reward_server.scorers.base import ItemFailure, Scored, failed, prompt_turns
from reward_server.scorers.upstream import connection, key_of, post
from services.scoring_format import Turn

BOUNDED = "judge_bounded"
LISTED = 20
"""Tokens that are asked for at each position: the most that the interface allows."""
TOKENS = 4
"""Tokens that are generated: a bracket, a space, the answer."""


@dataclass(frozen=True)
class Found:
    """Log-probabilities of the answers, in their order; `bounded` where one of them is an upper bound."""

    logs: tuple[float, ...]
    bounded: bool


@dataclass(frozen=True)
class EndpointJudge:
    """`questions` of an item and its conversation; `verdict` on it, of log-probabilities [questions][answers]."""

    revision: str
    source: JudgeSource
    questions: Callable[[Item, Sequence[Turn]], Sequence[str]]
    answers: tuple[str, ...]
    verdict: Callable[[Item, Sequence[Sequence[float]]], Scored]

    def __post_init__(self) -> None:
        key_of("judge", self.source.key_env)

    async def score(self, items: Sequence[Item]) -> Sequence[Scored]:
        turns = asyncio.Semaphore(self.source.concurrency)
        key = key_of("judge", self.source.key_env)
        async with connection(self.source.timeout_s, key) as http:
            return await asyncio.gather(*(self._score_one(http, turns, item) for item in items))

    async def _score_one(self, http: Any, turns: asyncio.Semaphore, item: Item) -> Scored:
        try:
            asked = self.questions(item, prompt_turns(item))
            found = await asyncio.gather(*(self._ask(http, turns, question) for question in asked))
            scored = self.verdict(item, [one.logs for one in found])
        except ItemFailure as failure:
            return failed(failure)
        bounded = (BOUNDED,) if any(one.bounded for one in found) else ()
        return replace(scored, flags=(*scored.flags, *bounded))

    async def _ask(self, http: Any, turns: asyncio.Semaphore, question: str) -> Found:
        body = {
            "model": self.source.model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": TOKENS,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": LISTED,
        }
        async with turns:
            positions = await post(
                http, f"{(self.source.url or '').rstrip('/')}/chat/completions", body, _positions,
                timeout_s=self.source.timeout_s, retries=self.source.retries,
            )  # fmt: skip
        return find(positions, self.answers)


def _positions(answer: Any) -> list[tuple[str, list[tuple[str, float]]]]:
    """(token, [(listed token, log-probability)]) of each generated position."""
    return [
        (str(entry["token"]), [(str(top["token"]), float(top["logprob"])) for top in entry["top_logprobs"]])
        for entry in answer["choices"][0]["logprobs"]["content"]
    ]


def find(positions: Sequence[tuple[str, Sequence[tuple[str, float]]]], answers: Sequence[str]) -> Found:
    """The answers' log-probabilities where the judge first gives one. Raises ItemFailure where it gives none.

    Tokens that are the same answer beside white space and brackets are added up.
    """
    for token, listed in positions:
        if _bare(token) not in answers or not listed:
            continue
        sums: dict[str, float] = {}
        for text, log in listed:
            if _bare(text) in answers:
                sums[_bare(text)] = sums.get(_bare(text), 0.0) + math.exp(log)
        lowest = min(log for _, log in listed)
        logs = tuple(math.log(sums[answer]) if sums.get(answer) else lowest for answer in answers)
        return Found(logs, bounded=any(not sums.get(answer) for answer in answers))
    raise ItemFailure(ErrorCode.JUDGE_UNCLEAR, f"the judge's first {TOKENS} tokens have none of {', '.join(answers)}")


def _bare(token: str) -> str:
    return token.strip(" \t\n()[]*\"'.Ġ▁")
