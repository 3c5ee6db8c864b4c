"""The `judge` source: a language model is asked, by the recipe's rubric, which answer is better, or how good one is.

    compare   value = mean over both orders of  log p(the response's letter) - log p(the reference's letter)
    rate      value = sum_d d * p(d) / sum_d p(d)      over the digits of the scale

p is the judge's distribution over its next token, never a sampled word. Both orders are asked, as judges favour a place
(Zheng et al., arXiv 2306.05685); `consistent` says whether they agree, and a result is flagged `judge_inconsistent`
where they do not. A judge that gives its allowed answers together less than `min_mass` fails the item.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from reward_server.model_sources_config import JudgeSource
from reward_server.runner import ModelRunner, Row
from reward_server.schema import ErrorCode, Item
from reward_server.scorers.base import (
    ItemFailure,
    Scored,
    Scorer,
    judged_by,
    ok,
    prompt_turns,
    response_text,
    revision_of,
)
from reward_server.scorers.judge_endpoint import EndpointJudge
from reward_server.scorers.models import Asked, Loaded, ModelScorer, load
from reward_server.scorers.sequence import sigmoid
from services.errors import UserError
from services.scoring_format import Example, ScorerFormat, Turn, chat_text, encode_text, fit, plain_text

INCONSISTENT = "judge_inconsistent"

_PLACES = re.compile(r"\{(prompt|response|reference|first|second|principles|lowest|highest)\}")


def judge_scorer(name: str, source: JudgeSource, *, runner: ModelRunner | None = None) -> Scorer:
    """Raises UserError for a model that cannot judge."""
    if source.url is not None:
        return EndpointJudge(revision_of(source, model=source.model), source, partial(questions, source),
                             answers_of(source), partial(judged, source))  # fmt: skip
    loaded = load(name, source, runner)
    limits = [limit for limit in (source.max_tokens, loaded.facts.max_tokens) if limit is not None]
    form = ScorerFormat(kind="preference", max_tokens=min(limits, default=2**31 - 1))
    judge = LocalJudge(name, source, loaded, form)
    judge.tokens("")  # an answer that is no token of its own is found at the start
    more = {"model": loaded.facts.revision, "max_tokens": form.max_tokens}
    return ModelScorer(revision_of(source, **more), loaded.batcher, judge.prepare)


@dataclass(frozen=True)
class LocalJudge:
    """Questions as rows of the judge's tokens."""

    name: str
    source: JudgeSource
    loaded: Loaded
    form: ScorerFormat

    def prepare(self, item: Item) -> Asked:
        example = Example(prompt_turns(item), response_text(item))
        asked = [
            self.loaded.encoded(partial(self._row, item, order), self.form, example)
            for order in range(len(questions(self.source, item, example.turns)))
        ]
        flags = tuple(dict.fromkeys(flag for _, flags in asked for flag in flags))
        rows = tuple(row for row, _ in asked)
        return Asked(rows, lambda outputs: judged(self.source, item, [output[0] for output in outputs]), flags)

    def tokens(self, question: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids up to where the answers part, and the id that each answer goes on with there."""
        tokenizer = self.loaded.tokenizer
        turns = (Turn("user", question),)
        # A base model has no chat template: it goes on with the text.
        templated = tokenizer.chat_template is not None
        text = chat_text(tokenizer, turns, generation_prompt=True) if templated else f"{question}\n"
        answers = answers_of(self.source)
        full = [encode_text(tokenizer, self.form, text + self.source.answer_prefix + answer) for answer in answers]
        same = next((i for i, ids in enumerate(zip(*full, strict=False)) if len(set(ids)) > 1), None)
        choices = () if same is None else tuple(ids[same] for ids in full)
        if same is None or len(set(choices)) < len(answers):
            raise UserError(
                f"reward.sources.{self.name}.answer_prefix: after {self.source.answer_prefix!r} the judge's tokenizer "
                f"does not tell {', '.join(answers)} apart by one token"
            )
        return full[0][:same], choices

    def _row(
        self, item: Item, order: int, tokenizer: Any, form: ScorerFormat, example: Example, limit: int | None
    ) -> tuple[Row, tuple[str, ...]]:
        del limit  # the format has it
        turns, encoded = fit(
            tokenizer,
            example.turns,
            lambda turns: self.tokens(questions(self.source, item, turns)[order])[0],
            form.max_tokens,
        )
        _, choices = self.tokens(questions(self.source, item, turns)[order])
        return Row(encoded.ids, choices=choices), encoded.flags


def answers_of(source: JudgeSource) -> tuple[str, ...]:
    if source.mode == "compare":
        return ("A", "B")
    return tuple(str(digit) for digit in range(source.lowest, source.highest + 1))


def principles_of(source: JudgeSource, item: Item) -> tuple[str, ...]:
    return tuple(item.principles or source.principles)


def questions(source: JudgeSource, item: Item, turns: Sequence[Turn]) -> tuple[str, ...]:
    """What the judge is asked about an item: to compare, once with the response first and once with it second."""
    response = response_text(item)
    principles = principles_of(source, item)
    places = {
        "prompt": plain_text(turns),
        "response": response,
        "reference": item.reference or "",
        "principles": "\n".join(["Principles:", *(f"- {text}" for text in principles), ""]) if principles else "",
        "lowest": str(source.lowest),
        "highest": str(source.highest),
    }
    if source.mode == "rate":
        return (_filled(source.text(), places),)
    if item.reference is None:
        raise ItemFailure(ErrorCode.MISSING_REFERENCE, "a judge that compares needs `reference`")
    return tuple(
        _filled(source.text(), {**places, "first": first, "second": second})
        for first, second in ((response, item.reference), (item.reference, response))
    )


def _filled(rubric: str, places: Mapping[str, str]) -> str:
    """In one pass: what an item says is never taken for a place."""
    return _PLACES.sub(lambda match: places[match.group(1)], rubric)


def judged(source: JudgeSource, item: Item, logs: Sequence[Sequence[float]]) -> Scored:
    """The verdict on an item, with the principles that the judge read."""
    return judged_by(verdict(source, logs), principles_of(source, item))


def verdict(source: JudgeSource, logs: Sequence[Sequence[float]]) -> Scored:
    """The score, of log-probabilities [questions][answers]."""
    masses = [sum(math.exp(log) for log in answers) for answers in logs]
    if not min(masses) >= source.min_mass:
        raise ItemFailure(
            ErrorCode.JUDGE_UNCLEAR,
            f"the judge gives its allowed answers a probability of {min(masses):.3g}, asked for is {source.min_mass:g}",
        )
    if source.mode == "rate":
        shares = [math.exp(log - max(logs[0])) for log in logs[0]]
        digits = range(source.lowest, source.highest + 1)
        mean = sum(digit * share for digit, share in zip(digits, shares, strict=True)) / sum(shares)
        square = sum((digit - mean) ** 2 * share for digit, share in zip(digits, shares, strict=True)) / sum(shares)
        return ok(mean, {"spread": math.sqrt(square), "mass": masses[0]})
    margins = (logs[0][0] - logs[0][1], logs[1][1] - logs[1][0])
    log_odds = sum(margins) / 2
    consistent = (margins[0] > 0) == (margins[1] > 0)
    detail = {"first": margins[0], "second": margins[1], "consistent": int(consistent), "mass": min(masses)}
    value = sigmoid(log_odds) if source.output == "probability" else log_odds
    return ok(value, detail, () if consistent else (INCONSISTENT,))
