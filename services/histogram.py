"""Values counted by bucket, with what else a reader of a histogram asks for."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Histogram:
    """`counts` [len(bounds) + 1]: of values up to the first bound, up to each next one, and above the last.

    `total` and `squares` are the sums of the values and of their squares, `low` and `high` the ends of their range.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float
    squares: float
    low: float
    high: float

    @property
    def count(self) -> int:
        return sum(self.counts)


def histogram(values: Iterable[float], bounds: Sequence[float]) -> Histogram | None:
    """The histogram of values; None where there are none."""
    return weighted_histogram(((value, 1) for value in values), bounds)


def weighted_histogram(pairs: Iterable[tuple[float, int]], bounds: Sequence[float]) -> Histogram | None:
    """The same of (value, how often)."""
    counts = [0] * (len(bounds) + 1)
    total = squares = 0.0
    low, high = float("inf"), float("-inf")
    for value, times in pairs:
        if times <= 0:
            continue
        counts[bisect_left(bounds, value)] += times
        total += value * times
        squares += value * value * times
        low, high = min(low, value), max(high, value)
    if low > high:
        return None
    return Histogram(tuple(bounds), tuple(counts), total, squares, low, high)
