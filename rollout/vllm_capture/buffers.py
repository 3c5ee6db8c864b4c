"""The memory of a capture, a row a slot, grown by doubling to what the requests at hand need.

Bytes: a key costs L' * Hkv * D * itemsize in the slots (contiguous, read at every step) and as much in the shadow of
the paged cache, which is read once a request, where the prefix cache gave it keys that it did not compute. A response
token costs 16 bytes, a position of the prompt 8.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerShape:
    """One captured layer on this rank: its heads, the width of a key, and how its weights u[h] stand."""

    name: str
    query_heads: int
    key_heads: int
    width: int
    scale: float
    weights: tuple[float, ...]


def _grown(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    larger = tensor.new_zeros(tuple(shape))
    larger[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return larger


class Slots:
    """Keys, key sets and statistics of the requests in a step, one row each. Keys are [slots, Hkv, D, tokens]:
    a query's product with them reads memory in order.

    `most` slots of `longest` tokens are the bound; memory follows the largest use so far. A slot is taken lowest
    first, so that the slots in use lie side by side.
    """

    def __init__(self, layers: Sequence[LayerShape], dtype: torch.dtype, *, most: int, longest: int) -> None:
        self._most = most
        self._longest = longest
        self._free = list(range(most - 1, -1, -1))
        self.keys = [torch.zeros((0, layer.key_heads, layer.width, 0), dtype=dtype) for layer in layers]
        self.content = torch.zeros((0, 0))
        self.salient = torch.zeros((0, 0))
        self.statistics = torch.zeros((0, 0, 4))
        self.written = np.zeros(most, dtype=np.int64)
        """Rows of each slot that hold something: one past the last response token written."""
        self.used = 0
        """One past the highest slot in use."""
        self._taken: set[int] = set()

    @property
    def nbytes(self) -> int:
        tensors = [*self.keys, self.content, self.salient, self.statistics]
        return sum(tensor.nbytes for tensor in tensors)

    def take(self) -> int:
        slot = self._free.pop()
        self._taken.add(slot)
        self.used = max(self._taken) + 1
        if self.used > self.content.shape[0]:
            self._grow(min(self._most, max(4, 2 * self.content.shape[0])), self.content.shape[1])
        self.content[slot] = 0.0
        self.salient[slot] = 0.0
        self.written[slot] = 0
        return slot

    def give(self, slot: int) -> None:
        self._taken.remove(slot)
        self._free.append(slot)
        self._free.sort(reverse=True)
        self.used = max(self._taken, default=-1) + 1

    def reserve(self, tokens: int) -> None:
        """Makes every slot at least `tokens` long."""
        if tokens > self.content.shape[1]:
            self._grow(self.content.shape[0], min(self._longest, max(64, tokens, 2 * self.content.shape[1])))

    def _grow(self, slots: int, tokens: int) -> None:
        self.keys = [_grown(keys, (slots, keys.shape[1], keys.shape[2], tokens)) for keys in self.keys]
        self.content = _grown(self.content, (slots, tokens))
        self.salient = _grown(self.salient, (slots, tokens))
        self.statistics = _grown(self.statistics, (slots, tokens, 4))
