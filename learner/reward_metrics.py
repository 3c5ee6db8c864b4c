"""How good a model that scores is on what it was not trained on. Numbers in, numbers out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

PROBES = ("best", "bad", "irrelevant", "meaningless")
"""Answers to one prompt in the order in which a model that scores should put them."""


@dataclass(frozen=True)
class Bin:
    """Cases whose prediction (calibration) or label (error by range) lies in [low, high), the last one closed.

    `predicted` and `observed` are means, `error` the mean absolute difference; NaN-free, as empty bins are left out.
    """

    low: float
    high: float
    count: int
    predicted: float
    observed: float
    error: float


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x), without overflow."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def pair_accuracy(scores: Sequence[Sequence[float]], ranks: Sequence[Sequence[float]]) -> float:
    """Share of the pairs of different rank (smaller is better) that are scored in their order; equal scores are half.

    Each comparison counts the same, however many responses it has. ValueError: no pair differs.
    """
    shares: list[float] = []
    for row, order in zip(scores, ranks, strict=True):
        margins = [
            row[i] - row[j] if order[i] < order[j] else row[j] - row[i]
            for i, j in combinations(range(len(row)), 2)
            if order[i] != order[j]
        ]
        if margins:
            shares.append(sum(1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins) / len(margins))
    if not shares:
        raise ValueError("no comparison has two responses of different rank")
    return sum(shares) / len(shares)


def binary_accuracy(predicted: Sequence[float], labels: Sequence[float]) -> float:
    """Share of probabilities on the same side of 0.5 as their labels; labels of exactly 0.5 are left out.

    ValueError: no label is left.
    """
    decided = [(p > 0.5) == (y > 0.5) for p, y in zip(predicted, labels, strict=True) if y != 0.5]
    if not decided:
        raise ValueError("no label lies on one side of 0.5")
    return sum(decided) / len(decided)


def mean_ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1 upwards; equal values share the mean of their ranks."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for place in order[start:end]:
            ranks[place] = (start + 1 + end) / 2
        start = end
    return ranks


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The rank correlation, ties by mean ranks; None where one side does not vary."""
    a, b = mean_ranks(first), mean_ranks(second)
    mean = (len(a) + 1) / 2
    covariance = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    spread = math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))
    return covariance / spread if spread > 0 else None


def calibration(predicted: Sequence[float], observed: Sequence[float], bins: int = 10) -> tuple[float, list[Bin]]:
    """(expected calibration error, bins) of probabilities against labels in [0, 1].

    Equal-width bins of the prediction; the error is the mean over cases of |mean prediction - mean label| of their bin
    (Naeini et al. 2015).
    """
    found = _binned(predicted, predicted, observed, bins)
    total = sum(each.count for each in found)
    return sum(each.count * abs(each.predicted - each.observed) for each in found) / total, found


def error_by_range(predicted: Sequence[float], labels: Sequence[float], bins: int = 5) -> list[Bin]:
    """The mean absolute error by where the label in [0, 1] lies: uneven labels show as uneven errors."""
    return _binned(labels, predicted, labels, bins)


def _binned(by: Sequence[float], predicted: Sequence[float], observed: Sequence[float], bins: int) -> list[Bin]:
    if not by:
        raise ValueError("there is nothing to put into bins")
    members: dict[int, list[tuple[float, float]]] = {}
    for value, p, y in zip(by, predicted, observed, strict=True):
        members.setdefault(min(bins - 1, int(value * bins)), []).append((p, y))
    return [
        Bin(
            low=place / bins,
            high=(place + 1) / bins,
            count=len(cases),
            predicted=sum(p for p, _ in cases) / len(cases),
            observed=sum(y for _, y in cases) / len(cases),
            error=sum(abs(p - y) for p, y in cases) / len(cases),
        )
        for place, cases in sorted(members.items())
    ]


def probe_order(scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """Shares of the prompts where best > bad, bad > irrelevant, irrelevant > meaningless, and all three (`in_order`).

    `scores` [n][4] are in the order of `PROBES`. ValueError: no prompt, or another number of answers.
    """
    if not scores or any(len(row) != len(PROBES) for row in scores):
        raise ValueError(f"a prompt is probed with {len(PROBES)} answers, {', '.join(PROBES)}")
    holds = [[a > b for a, b in pairwise(row)] for row in scores]
    shares = {
        f"{better}>{worse}": sum(row[place] for row in holds) / len(holds)
        for place, (better, worse) in enumerate(pairwise(PROBES))
    }
    return {**shares, "in_order": sum(map(all, holds)) / len(holds)}
