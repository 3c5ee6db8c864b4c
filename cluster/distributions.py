"""What of a step's groups is counted rather than averaged: histograms, and failures by code.

From the groups alone, so that it is reproducible where invariant 5 applies.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from services.histogram import Histogram, histogram, weighted_histogram
from services.records import Failure, Group, Sample
from services.vocabulary import LENGTH_BOUNDS, REWARD_BOUNDS, STALENESS_BOUNDS


def histograms(groups: Sequence[Group], step: int) -> dict[str, Histogram]:
    """Rewards, scores by source, lengths and staleness of the samples that are trained on, by their keys in
    metrics.jsonl."""
    samples = rewarded(groups)
    scores: dict[str, list[float]] = {}
    for sample in samples:
        for name, score in sample.scores.items():
            if score.value is not None:
                scores.setdefault(name, []).append(score.value)
    found = {
        "reward/histogram": histogram(
            (s.reward.value for s in samples if s.reward and s.reward.value is not None), REWARD_BOUNDS
        ),
        **{f"reward/{name}/histogram": histogram(values, REWARD_BOUNDS) for name, values in sorted(scores.items())},
        "length/histogram": histogram((len(sample.response_ids) for sample in samples), LENGTH_BOUNDS),
        "staleness/histogram": weighted_histogram(
            ((step - at, tokens) for sample in samples for _, at, tokens in sample.policy_versions), STALENESS_BOUNDS
        ),
    }
    return {name: each for name, each in found.items() if each is not None}


def failure_metrics(groups: Sequence[Group], failed_groups: Mapping[str, Failure]) -> dict[str, float]:
    """`failures/*`: samples without a reward and scores that a source did not give, of this step; groups that failed
    for good since the run began."""
    counts: Counter[str] = Counter(f"failures/groups/{failure.code}" for failure in failed_groups.values())
    for group in groups:
        for sample in group.samples:
            if sample.reward is not None and sample.reward.error is not None:
                counts[f"failures/samples/{sample.reward.error.code}"] += 1
            counts.update(
                f"failures/scores/{name}/{score.error.code}"
                for name, score in sample.scores.items()
                if score.error is not None
            )
    return {name: float(count) for name, count in sorted(counts.items())}


def rewarded(groups: Sequence[Group]) -> list[Sample]:
    """The samples that have a reward."""
    return [
        sample
        for group in groups
        for sample in group.samples
        if sample.reward is not None and sample.reward.status == "ok"
    ]
