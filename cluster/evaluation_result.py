"""What an evaluation came to: the responses with their figures, means with intervals, and before against after.

A response that could not be scored has a failure with its name and no attention figures (invariant 2): it is counted,
and every mean says over how many prompts it is.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from cluster.evaluation_config import CORPUS_METRICS, METRICS, Decoding, EvaluationSection
from cluster.evaluation_metrics import (
    bootstrap_mean,
    bootstrap_ratio,
    distinct,
    paired_difference,
    perplexity,
    pooled_within_sd,
)
from cluster.files import write_atomically
from services.errors import UserError
from services.records import FinishReason, PolicyVersion, Record

REWARD = "reward"
LOG_RATIO_METRICS = ("log_ratio_token", "log_ratio_response", "k3_token")
"""Of a rescored result alone: log pi(y) - log pi_0(y) a token and a response, and the k3 estimate a token (nats)."""


class EvaluatedPrompt(Record):
    """A prompt as it was asked.

    `reference_logprob` is the sum over the tokens of `reference_ids` (nats, temperature 1); None where there is no
    reference, it does not fit the context, or a log-probability is not finite. `refused` says why a prompt was not
    answered.
    """

    prompt_id: str
    prompt: str
    prompt_ids: tuple[int, ...]
    content: tuple[int, ...]
    salient: tuple[int, ...]
    salient_weights: tuple[float, ...]
    reference: str | None = None
    reference_ids: tuple[int, ...] | None = None
    reference_logprob: float | None = None
    refused: str | None = None


class EvaluatedResponse(Record):
    """One response. `values` has the figures that it has: none of the attention where `failure` names why."""

    prompt_id: str
    decoding: Decoding
    index: int
    response: str
    response_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[float, ...]
    values: dict[str, float]
    failure: str | None = None
    flags: tuple[str, ...] = ()


class Figure(Record):
    """The mean of a metric over `count` prompts, each the mean of its responses, and its bootstrap interval; without an
    interval where resampling prompts would bias the metric (distinct-n). `within_sd`: pooled standard deviation of the
    responses within a prompt, where prompts have several."""

    value: float
    low: float | None = None
    high: float | None = None
    count: int
    within_sd: float | None = None


class EvaluationResult(Record):
    schema_version: Literal[1] = 1
    label: str
    version: PolicyVersion
    settings: EvaluationSection
    max_tokens: int
    attention_options: dict[str, object]
    eos_ids: tuple[int, ...]
    prompts: tuple[EvaluatedPrompt, ...]
    responses: tuple[EvaluatedResponse, ...]
    figures: dict[Decoding, dict[str, Figure]]
    failures: dict[Decoding, dict[str, int]]
    created_at: float

    def figure(self, name: str) -> Figure | None:
        """The figure DECODING/METRIC; None where this evaluation has no such figure."""
        decoding, _, metric = name.partition("/")
        found = (figures.get(metric) for known, figures in self.figures.items() if known == decoding)
        return next(found, None)

    def scalars(self) -> dict[str, float]:
        """Every figure's value under `evaluation/DECODING/METRIC`, and the number of failures, for metrics.jsonl."""
        values = {
            f"evaluation/{decoding}/{metric}": figure.value
            for decoding, figures in self.figures.items()
            for metric, figure in figures.items()
        }
        failed = {
            f"evaluation/{decoding}/failed": float(sum(codes.values())) for decoding, codes in self.failures.items()
        }
        return values | failed

    def save(self, path: Path) -> None:
        write_atomically(path, self.model_dump_json(indent=1) + "\n")


def load_result(path: Path) -> EvaluationResult:
    """Reads what `EvaluationResult.save` wrote.

    Raises:
        UserError: there is no such file, or it is no evaluation.
    """
    try:
        return EvaluationResult.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"evaluation {path}: there is no such file") from error
    except ValueError as error:
        raise UserError(f"evaluation {path}: not a result of attune evaluate: {error}") from error


def summarise(
    prompts: Sequence[EvaluatedPrompt],
    responses: Sequence[EvaluatedResponse],
    settings: EvaluationSection,
    eos_ids: Sequence[int],
    metrics: Sequence[str] = METRICS,
) -> tuple[dict[Decoding, dict[str, Figure]], dict[Decoding, dict[str, int]]]:
    """The figures and the failures of every decoding that has responses, in the order of `settings.decodings`."""
    figures: dict[Decoding, dict[str, Figure]] = {}
    failures: dict[Decoding, dict[str, int]] = {}
    reference = _perplexity(prompts, settings)
    for decoding in settings.decodings:
        mine = [response for response in responses if response.decoding == decoding]
        found: dict[str, Figure] = {}
        for metric in metrics:
            figure = reference if metric == "perplexity" else _figure(metric, mine, settings, eos_ids)
            if figure is not None:
                found[metric] = figure
        figures[decoding] = found
        failures[decoding] = dict(sorted(Counter(r.failure for r in mine if r.failure is not None).items()))
    return figures, failures


def by_prompt(responses: Iterable[EvaluatedResponse], metric: str) -> dict[str, list[float]]:
    """The values of a metric, by prompt id; prompts without any are left out."""
    groups: dict[str, list[float]] = {}
    for response in responses:
        if metric in response.values:
            groups.setdefault(response.prompt_id, []).append(response.values[metric])
    return groups


def _figure(
    metric: str, responses: Sequence[EvaluatedResponse], settings: EvaluationSection, eos_ids: Sequence[int]
) -> Figure | None:
    if metric in ("distinct_1", "distinct_2"):
        value = distinct([without_eos(r.response_ids, eos_ids) for r in responses], int(metric[-1]))
        return None if value is None else Figure(value=value, count=len({r.prompt_id for r in responses}))
    groups = by_prompt(responses, metric)
    if not groups:
        return None
    interval = bootstrap_mean(
        list(_means(groups).values()), seed=settings.seed, resamples=settings.resamples, level=settings.level
    )
    return Figure(
        value=interval.value,
        low=interval.low,
        high=interval.high,
        count=interval.count,
        within_sd=pooled_within_sd(list(groups.values())),
    )


def _perplexity(prompts: Sequence[EvaluatedPrompt], settings: EvaluationSection) -> Figure | None:
    known = [
        (p.reference_logprob, len(p.reference_ids))
        for p in prompts
        if p.reference_logprob is not None and p.reference_ids
    ]
    sums, counts = [total for total, _ in known], [tokens for _, tokens in known]
    value = perplexity(sums, counts)
    if value is None or math.isinf(value):
        return None
    nats = bootstrap_ratio(
        [-total for total in sums],
        [float(tokens) for tokens in counts],
        seed=settings.seed,
        resamples=settings.resamples,
        level=settings.level,
    )
    high = math.exp(nats.high) if nats.high < 709 else None
    return Figure(value=value, low=math.exp(nats.low), high=high, count=len(known))


def without_eos(ids: Sequence[int], eos_ids: Sequence[int]) -> Sequence[int]:
    """The ids but a trailing one that ends the sequence."""
    return ids[:-1] if ids and ids[-1] in eos_ids else ids


def _means(groups: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {prompt_id: math.fsum(values) / len(values) for prompt_id, values in groups.items()}


class Change(Record):
    """A metric before and after over the `count` prompts that both have, with the interval of the paired difference.

    `in_sd` is the difference in units of the pooled within-prompt standard deviation before, where there is one.
    """

    decoding: Decoding
    metric: str
    before: float
    after: float
    difference: float
    low: float | None = None
    high: float | None = None
    count: int
    in_sd: float | None = None
    in_sd_low: float | None = None
    in_sd_high: float | None = None


def compare(before: EvaluationResult, after: EvaluationResult) -> tuple[Change, ...]:
    """Every metric that both results have, prompts paired; settings of the intervals are those of `before`."""
    changes: list[Change] = []
    for decoding, figures in before.figures.items():
        for metric, figure in figures.items():
            other = after.figures.get(decoding, {}).get(metric)
            if other is None:
                continue
            if metric in CORPUS_METRICS:
                changes.append(
                    Change(
                        decoding=decoding,
                        metric=metric,
                        before=figure.value,
                        after=other.value,
                        difference=other.value - figure.value,
                        count=min(figure.count, other.count),
                    )
                )
            else:
                change = _paired(before, after, decoding, metric)
                if change is not None:
                    changes.append(change)
    return tuple(changes)


def _paired(before: EvaluationResult, after: EvaluationResult, decoding: Decoding, metric: str) -> Change | None:
    settings = before.settings
    groups = by_prompt((r for r in before.responses if r.decoding == decoding), metric)
    first = _means(groups)
    second = _means(by_prompt((r for r in after.responses if r.decoding == decoding), metric))
    interval = paired_difference(first, second, seed=settings.seed, resamples=settings.resamples, level=settings.level)
    if interval is None:
        return None
    shared = first.keys() & second.keys()
    sd = pooled_within_sd(list(groups.values()))
    return Change(
        decoding=decoding,
        metric=metric,
        before=math.fsum(first[key] for key in shared) / len(shared),
        after=math.fsum(second[key] for key in shared) / len(shared),
        difference=interval.value,
        low=interval.low,
        high=interval.high,
        count=interval.count,
        in_sd=interval.value / sd if sd else None,
        in_sd_low=interval.low / sd if sd else None,
        in_sd_high=interval.high / sd if sd else None,
    )
