"""Running standardisation of rewards: (R - mean) / deviation over every reward ever taken (invariant 8).

The state is immutable, updated in batch order when a batch is taken, and is part of the commit. A restart that reads it
back goes on with the same numbers, bit for bit (JSON keeps Python floats exactly).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class RunningStandardiser:
    """Count, mean and sum of squared deviations (Welford 1962; batches merged as in Chan, Golub, LeVeque 1983)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def update(self, values: Sequence[float]) -> "RunningStandardiser":
        """With a batch added: with n, m, S of the batch and d = m - mean,

            mean <- mean + d n / N        squares <- squares + S + d^2 count n / N        N = count + n

        ValueError: a value that is not finite.
        """
        if not values:
            return self
        if not all(math.isfinite(value) for value in values):
            raise ValueError("a reward that is not finite cannot be standardised")
        n = len(values)
        mean = math.fsum(values) / n
        squares = math.fsum((value - mean) ** 2 for value in values)
        total = self.count + n
        shift = mean - self.mean
        return RunningStandardiser(
            count=total,
            mean=self.mean + shift * n / total,
            squares=self.squares + squares + shift * shift * self.count * n / total,
        )

    @property
    def deviation(self) -> float:
        """Of the population seen so far; 0 before the first."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def apply(self, values: Sequence[float]) -> list[float]:
        """(value - mean) / (deviation + 1e-8). Call it after `update` with the same batch: the first batch has no past.

        Where all rewards seen are equal the result is 0. ValueError: nothing seen yet.
        """
        if not self.count:
            raise ValueError("nothing has been seen that rewards could be standardised by")
        scale = self.deviation + 1e-8
        return [(value - self.mean) / scale for value in values]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RunningStandardiser":
        return cls(**json.loads(text))
