"""In which order prompts are leased: a permutation an epoch.

The order is a function of (number of prompts, seed, epoch) alone. It is made by sorting hashes, which no release of a
random number library can change: a run resumed years later goes on in the same order.
"""

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
