"""The `process` source: a verifier of steps. Each step of the response gets its probability p of being correct.

A model of labels a token is read at the last token of each step; a model of sequences scores the response up to the end
of each step. With labels correct, incorrect and perhaps neutral, p = P(correct) + neutral * P(neutral) (neutral counts
as correct in Lightman et al., arXiv 2305.20050); with one label, p is its sigmoid; of two labels without names the
second is correct.

    min         lowest p                      correct_steps        number of steps with p >= threshold
    product     product of p                  outcome_and_process  outcome_weight * p of the last step
    last        p of the last step                                   + (1 - outcome_weight) * lowest p
    log_sum     sum of log p
"""

import math
from collections.abc import Callable, Sequence

from reward_server.model_sources_config import ProcessSource
from reward_server.runner import ModelRunner, Output, Row
from reward_server.schema import ErrorCode, Item
from reward_server.scorers.base import ItemFailure, Scored, Scorer, ok, prompt_turns, response_text, revision_of
from reward_server.scorers.models import Asked, ModelScorer, limited, load, shown_facts
from services.errors import UserError
from services.scoring_format import Example, ScorerFormat, StepRule, encode_prefixes, encode_steps, read_format


def process_scorer(name: str, source: ProcessSource, *, runner: ModelRunner | None = None) -> Scorer:
    """Raises UserError for a model that labels no steps."""
    form = read_format(source.model)
    if form is not None and form.kind != "process":
        raise UserError(f"reward.sources.{name}.model: scorer.json says kind {form.kind}, the source is process")
    form = form or ScorerFormat(kind="process", step_rule=StepRule(), max_tokens=2**31 - 1)
    options = ("input_template", "strip_bos", "facts", "step_rule")
    given = {key: value for key in options if (value := getattr(source, key)) is not None}
    form = ScorerFormat.model_validate({**form.model_dump(), **given})
    loaded = load(name, source, runner)
    by_token = loaded.facts.task == "token"
    form = limited(name, loaded, form, source)
    log_p = log_probability_of(name, loaded.facts.labels, source.neutral)

    def prepare(item: Item) -> Asked:
        example = Example(prompt_turns(item), response_text(item), facts=shown_facts(form, item))
        if by_token:
            encoded = loaded.encoded(encode_steps, form, example)
            rows = (Row(encoded.ids, at=encoded.step_ends),)
            return Asked(rows, lambda outputs: finish(outputs[0]), encoded.flags)
        prefixes = loaded.encoded(encode_prefixes, form, example)
        rows = tuple(Row(prefix.ids) for prefix in prefixes)
        return Asked(rows, lambda outputs: finish([output[0] for output in outputs]), prefixes[0].flags)

    def finish(logits: Output) -> Scored:
        if not all(math.isfinite(x) for vector in logits for x in vector):
            raise ItemFailure(ErrorCode.NON_FINITE_SCORE, "a step's logits are not finite")
        logs = [log_p(vector) for vector in logits]
        steps = [math.exp(log) for log in logs]
        correct = [p >= source.threshold for p in steps]
        detail: dict[str, float | int] = {
            "steps": len(steps),
            "correct_steps": sum(correct),
            "first_incorrect": correct.index(False) if False in correct else -1,
            **{f"step_{i}": p for i, p in enumerate(steps)},
        }
        return ok(aggregate(source, logs), detail)

    more = {"model": loaded.facts.revision, "format": form.model_dump(mode="json", exclude={"revision"})}
    return ModelScorer(revision_of(source, **more), loaded.batcher, prepare)


def aggregate(source: ProcessSource, logs: Sequence[float]) -> float:
    """`logs` [steps]: log-probability of each step."""
    match source.aggregate:
        case "min":
            return math.exp(min(logs))
        case "product":
            return math.exp(sum(logs))
        case "last":
            return math.exp(logs[-1])
        case "log_sum":
            return sum(logs)
        case "correct_steps":
            return float(sum(math.exp(log) >= source.threshold for log in logs))
        case "outcome_and_process":
            weight = source.outcome_weight
            return weight * math.exp(logs[-1]) + (1 - weight) * math.exp(min(logs))


def log_probability_of(name: str, labels: Sequence[str], neutral: float) -> Callable[[Sequence[float]], float]:
    """The log-probability that a step is correct, of its logits [labels]. Raises UserError for unknown labels."""
    if len(labels) == 1:
        return lambda logits: -_log1p_exp(-logits[0])
    shares = {"correct": 1.0, "neutral": neutral, "incorrect": 0.0}
    if list(labels) == ["label_0", "label_1"]:
        weights = [0.0, 1.0]
    elif "correct" in labels and set(labels) <= set(shares):
        weights = [shares[label] for label in labels]
    else:
        raise UserError(
            f"reward.sources.{name}.model: its labels are {', '.join(labels)}; a step is correct, incorrect or neutral"
        )
    return lambda logits: (
        _log_sum_exp([x + math.log(w) for x, w in zip(logits, weights, strict=True) if w > 0]) - _log_sum_exp(logits)
    )


def _log_sum_exp(values: Sequence[float]) -> float:
    most = max(values)
    return most + math.log(sum(math.exp(value - most) for value in values))


def _log1p_exp(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
