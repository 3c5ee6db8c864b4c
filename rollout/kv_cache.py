"""A key/value cache that is allocated once for a whole generation.

transformers' dynamic cache copies all keys and values at every token; this one writes a token in place and hands out
views. It can hand rows to more rows (the samples of a prompt share its prefill) and drop rows that have ended.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, EncoderDecoderCache


class FixedLayer(CacheLayerMixin):
    """Keys and values [B, H, length, D] of one layer, in buffers of `capacity` positions."""

    is_sliding = False
    is_compileable = False
    is_croppable = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._length = 0
        self._key_buffer: Tensor | None = None
        self._value_buffer: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._key_buffer = self._buffer(key_states)
        self._value_buffer = self._buffer(value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._key_buffer is not None
        assert self._value_buffer is not None
        start, end = self._length, self._length + key_states.shape[2]
        if end > self._capacity:
            raise RuntimeError(f"the cache holds {self._capacity} positions, {end} were asked for")
        self._key_buffer[:, :, start:end] = key_states
        self._value_buffer[:, :, start:end] = value_states
        self._length = end
        self.keys, self.values = self._key_buffer[:, :, :end], self._value_buffer[:, :, :end]
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return self._capacity

    def select_rows(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was; more rows or fewer."""
        if not self.is_initialized:
            return
        assert self.keys is not None
        assert self.values is not None
        keys, values = self.keys.index_select(0, index), self.values.index_select(0, index)
        self.lazy_initialization(keys, values)
        assert self._key_buffer is not None
        assert self._value_buffer is not None
        self._key_buffer[:, :, : self._length] = keys
        self._value_buffer[:, :, : self._length] = values
        self.keys, self.values = self._key_buffer[:, :, : self._length], self._value_buffer[:, :, : self._length]

    def _buffer(self, like: Tensor) -> Tensor:
        batch, heads, _, width = like.shape
        return torch.empty((batch, heads, self._capacity, width), dtype=like.dtype, device=like.device)


def new_cache(layers: int, capacity: int, *, cross: bool) -> Cache:
    """An empty cache of `layers` decoder layers; with `cross`, room for cross-attention as well."""
    own = Cache(layers=[FixedLayer(capacity) for _ in range(layers)])
    return EncoderDecoderCache(own, DynamicCache()) if cross else own


def select_rows(cache: Cache, index: Tensor) -> None:
    """Makes row i of the cache what row index[i] was."""
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    for layer in own.layers:
        assert isinstance(layer, FixedLayer)
        layer.select_rows(index)
    if isinstance(cache, EncoderDecoderCache):
        cache.cross_attention_cache.batch_select_indices(index)
