"""Sources with one number for the whole input: preference, absolute, facts, principle.

    value = logit                    output: logit, the default: a bounded score flattens the signal (Khan 2024)
    value = 1 / (1 + exp(-logit))    output: probability

A facts source takes off `correctness_penalty` where the reference's words do not stand in the response in a row.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from reward_server.interventions import InterventionFile, Interventions
from reward_server.model_sources_config import AnySequenceSource, FactsSource, PrincipleSource
from reward_server.principle_sets import named_set
from reward_server.runner import ModelRunner, Output, Row
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
from reward_server.scorers.models import Asked, Loaded, ModelScorer, limited, load, shown_facts
from reward_server.scorers.symbolic import words
from services.errors import UserError
from services.principles import PrincipleSet, draw
from services.scoring_format import Example, ScorerFormat, encode, encode_rendered, read_format


def format_of(name: str, source: AnySequenceSource) -> ScorerFormat:
    """The format of the model's scorer.json with the recipe's options over it; without one, the defaults.

    Raises UserError where scorer.json is of another kind of model.
    """
    form = read_format(source.model)
    kinds = ("preference", "absolute") if isinstance(source, FactsSource) else (source.kind,)
    if form is not None and form.kind not in kinds:
        instead = "; a principle source shows facts too" if form.kind == "principle" and source.kind == "facts" else ""
        raise UserError(
            f"reward.sources.{name}.model: scorer.json says kind {form.kind}, the source is {source.kind}{instead}"
        )
    # Without a scorer.json nothing of ours bounds the input: tokenizer and model do.
    form = form or ScorerFormat(kind=kinds[0], max_tokens=2**31 - 1)
    given = {
        key: value
        for key in ("input_template", "strip_bos", "output", "facts", "facts_template", "principle_template")
        if (value := getattr(source, key, None)) is not None
    }
    always = {"facts": True} if isinstance(source, FactsSource) else {}
    return ScorerFormat.model_validate({**form.model_dump(), **given, **always})


def sequence_scorer(
    name: str,
    source: AnySequenceSource,
    *,
    interventions: InterventionFile | None = None,
    runner: ModelRunner | None = None,
) -> Scorer:
    """The scorer of a source with one number for the whole input. Raises UserError."""
    form = format_of(name, source)
    loaded = load(name, source, runner)
    if len(loaded.facts.labels) != 1:
        raise UserError(
            f"reward.sources.{name}.model: {source.model} has {len(loaded.facts.labels)} labels, a score is one number"
        )
    form = limited(name, loaded, form, source)
    more: dict[str, Any] = {
        "model": loaded.facts.revision,
        "format": form.model_dump(mode="json", exclude={"revision"}),
    }
    if not isinstance(source, PrincipleSource):
        return ModelScorer(revision_of(source, **more), loaded.batcher, partial(_prepare, source, loaded, form))
    drawn_from = None if source.principles is None else named_set(source.principles)
    more["principles"] = None if drawn_from is None else drawn_from.revision
    used = interventions if source.interventions else None
    return PrincipleScorer(revision_of(source, **more), source, loaded, form, drawn_from, used)


def _prepare(source: AnySequenceSource, loaded: Loaded, form: ScorerFormat, item: Item) -> Asked:
    if isinstance(source, FactsSource) and not item.facts:
        raise ItemFailure(ErrorCode.MISSING_FACTS, "this source needs `facts`")
    if item.text is None or isinstance(source, FactsSource):
        example = Example(prompt_turns(item), response_text(item), facts=shown_facts(form, item))
        encoded = loaded.encoded(encode, form, example)
    else:  # rendered by the client: nothing in it is known to be the prompt's, so nothing is cut
        encoded = loaded.encoded(encode_rendered, form, Example((), item.text))

    def finish(outputs: list[Output]) -> Scored:
        value, detail = _value(outputs[0], form)
        if isinstance(source, FactsSource) and item.reference is not None:
            correct = stands_in(words(item.reference), words(response_text(item)))
            detail["correct"] = int(correct)
            value -= 0.0 if correct else source.correctness_penalty
        return ok(value, detail)

    return Asked((Row(encoded.ids),), finish, encoded.flags)


def _value(output: Output, form: ScorerFormat) -> tuple[float, dict[str, float | int]]:
    logit = output[0][0]
    if not math.isfinite(logit):
        raise ItemFailure(ErrorCode.NON_FINITE_SCORE, f"the model's logit is {logit}")
    return (sigmoid(logit) if form.output == "probability" else logit), {"logit": logit}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def stands_in(part: Sequence[str], whole: Sequence[str]) -> bool:
    """Whether the words of `part` stand in `whole` in a row."""
    return any(list(whole[i : i + len(part)]) == list(part) for i in range(len(whole) - len(part) + 1))


@dataclass(frozen=True)
class PrincipleScorer:
    """Judging principles after the response: interventions first, then the item's own, or those drawn for it."""

    base_revision: str
    source: PrincipleSource
    loaded: Loaded
    form: ScorerFormat
    principles: PrincipleSet | None
    interventions: InterventionFile | None

    @property
    def revision(self) -> str:
        return self._revision(self._interventions())

    async def score(self, items: Sequence[Item]) -> Sequence[Scored]:
        interventions = self._interventions()
        revision = self._revision(interventions)
        prepare = partial(self._prepare, interventions)
        scored = await ModelScorer(revision, self.loaded.batcher, prepare).score(items)
        return [replace(one, revision=revision) for one in scored]

    def _interventions(self) -> Interventions:
        return Interventions() if self.interventions is None else self.interventions.read()

    def _revision(self, interventions: Interventions) -> str:
        return f"{self.base_revision}+{interventions.revision}" if interventions.texts else self.base_revision

    def _prepare(self, interventions: Interventions, item: Item) -> Asked:
        turns = prompt_turns(item)
        chosen, negated = self._chosen(item, "\n".join(turn.content for turn in turns if turn.role == "user"))
        principles = (*interventions.texts, *chosen)
        example = Example(turns, response_text(item), principles, shown_facts(self.form, item))
        encoded = self.loaded.encoded(encode, self.form, example)

        def finish(outputs: list[Output]) -> Scored:
            value, detail = _value(outputs[0], self.form)
            counts = {"principles": len(chosen), "negated": negated, "interventions": len(interventions.texts)}
            return judged_by(ok(value, {**detail, **counts}), principles)

        return Asked((Row(encoded.ids),), finish, encoded.flags)

    def _chosen(self, item: Item, prompt: str) -> tuple[tuple[str, ...], int]:
        """The predefined principles of an item, and how many of them are negated."""
        if item.principles:
            return item.principles, 0
        if self.principles is None:
            raise ItemFailure(ErrorCode.MISSING_PRINCIPLES, "this source needs `principles`: the recipe names no set")
        drawn = draw(
            self.principles,
            seed=self.source.seed,
            sample_id=item.id,
            # Of the predefined part alone: an intervention is added to the draw, it does not change it.
            revision=self.base_revision,
            count=self.source.count,
            prompt_class=item.prompt_class or self.principles.class_of(prompt),
            negated=self.source.negated,
        )
        return drawn.texts, sum(drawn.negated)
