"""In which order prompts are leased: a permutation an epoch, and a place in it that a checkpoint can hold.

The order is a function of (number of prompts, seed, epoch) alone. It is made by sorting hashes, which no release of a
random number library can change: a run resumed years later goes on in the same order.
"""

from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b


@lru_cache(maxsize=8)
def epoch_order(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of 0 .. n-1: entry i is the index of the prompt that is leased i-th in this epoch."""
    if n < 0 or epoch < 0:
        raise ValueError(f"n and epoch are at least 0, got {n} and {epoch}")

    def key(index: int) -> tuple[bytes, int]:
        return blake2b(f"{seed}:{epoch}:{index}".encode(), digest_size=16).digest(), index

    return tuple(sorted(range(n), key=key))


def index_at(order: int, n: int, seed: int) -> int:
    """The index of the prompt at `order`, the place in the run: epoch * n + place in the epoch."""
    epoch, place = divmod(order, n)
    return epoch_order(n, seed, epoch)[place]


@dataclass(frozen=True, order=True)
class Cursor:
    """The next prompt to lease: `index` is its place in the epoch's order, 0 .. n-1."""

    epoch: int = 0
    index: int = 0

    @classmethod
    def at(cls, order: int, n: int) -> "Cursor":
        return cls(*divmod(order, n))

    def order(self, n: int) -> int:
        return self.epoch * n + self.index

    def advance(self, count: int, n: int) -> "Cursor":
        return Cursor.at(self.order(n) + count, n)


@dataclass(frozen=True)
class Steps:
    """How `groups` groups fall into steps: `full` steps of the asked size, then one of `last` groups where that is
    not 0."""

    full: int
    last: int

    @property
    def count(self) -> int:
        return self.full + (1 if self.last else 0)


def steps_of(groups: int, groups_per_step: int) -> Steps:
    """The last short batch is a step like the others: nothing is dropped because the numbers do not divide."""
    if groups_per_step < 1 or groups < 0:
        raise ValueError(f"groups_per_step is at least 1 and groups at least 0, got {groups_per_step} and {groups}")
    return Steps(*divmod(groups, groups_per_step))
