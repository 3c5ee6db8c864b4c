"""Capturing attention in transformers models: the one module of the attention package that imports torch models.

`register()` adds an attention implementation to transformers, under the name `CAPTURE`: scaled-dot-product attention
for every module, but a module with a tap computes the rows A[t, :] of the specification too. A row stays on
the device and is reduced to M, C, E and X at once. The padding mask is the same as sdpa's; without
registering the mask as well, transformers would drop it in silence.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import transformers.integrations.sdpa_attention as sdpa
import transformers.masking_utils as masking
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel

from services.attention.config import CapturedLayers
from services.stopwatch import Stopwatch

CAPTURE = "attune_capture"
_TAP = "_attune_tap"

# transformers leaves these in part without types.
_sdpa_attention: Any = sdpa.sdpa_attention_forward  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
_sdpa_mask: Any = masking.sdpa_mask  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
_attentions: Any = AttentionInterface
_masks: Any = AttentionMaskInterface


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention function in a forward: which module, with how many queries, keys and heads."""

    module: nn.Module
    queries: int
    keys: int
    heads: int


class Recorder:
    """Gathers the weighted sum over layers and heads of one forward's rows.

    `rows` says which queries have rows: a start (they run to the end), or a query index for each batch row [B].
    Not for use by two threads at once.
    """

    def __init__(self, layers: int, total: float) -> None:
        self._layers = layers
        self._total = total
        self._sum: Tensor | None = None
        self._seen = 0
        self.rows: int | Tensor | None = None
        self.time = Stopwatch()
        """What taking rows takes, beyond attention itself."""

    def add(self, rows: Tensor) -> None:
        self._sum = rows if self._sum is None else self._sum + rows
        self._seen += 1

    @contextmanager
    def recording(self, rows: int | Tensor) -> Generator[None]:
        """Records the forward within; what an earlier one left, if it failed, is dropped."""
        self._sum, self._seen, self.rows = None, 0, rows
        try:
            yield
        finally:
            self.rows = None

    def take(self) -> Tensor:
        """A[t, :] of the last forward: float32 [B, R, K] over the K keys that the cache held."""
        rows, seen = self._sum, self._seen
        self._sum, self._seen = None, 0
        if rows is None or seen != self._layers:
            raise RuntimeError(f"{seen} of {self._layers} captured layers attended in this forward")
        return rows / self._total


@dataclass(frozen=True)
class _Tap:
    recorder: Recorder
    weights: Tensor  # [H], float32


_calls: ContextVar[list[AttentionCall] | None] = ContextVar("attune_attention_calls", default=None)


def register() -> None:
    """Makes `CAPTURE` an attention implementation of transformers; again is harmless."""
    _attentions.register(CAPTURE, _attention)
    _masks.register(CAPTURE, _sdpa_mask)


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Switches every part of a model to an attention implementation ("eager", `CAPTURE`, ...).

    `PreTrainedModel.set_attn_implementation` passes over parts that hold a copy of the configuration, as T5's do.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            config._attn_implementation_internal = name  # pyright: ignore[reportPrivateUsage]


@contextmanager
def listing_calls() -> Generator[list[AttentionCall]]:
    """Lists the attention calls of the forwards within: how captured modules are found in any architecture."""
    calls: list[AttentionCall] = []
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


def attach(modules: Sequence[nn.Module], captured: CapturedLayers, device: torch.device) -> Recorder:
    """Taps the attention modules of the captured layers (aligned to `captured.layers`)."""
    recorder = Recorder(len(captured.layers), captured.total)
    for module, weights in zip(modules, captured.weights, strict=True):
        # Past nn.Module's bookkeeping: a tap is neither parameter nor submodule, and reading it must be cheap.
        module.__dict__[_TAP] = _Tap(recorder, torch.tensor(weights, dtype=torch.float32, device=device))
    return recorder


def detach(model: PreTrainedModel) -> None:
    """Removes every tap of the model."""
    for module in model.modules():
        module.__dict__.pop(_TAP, None)


def reduce_rows(rows: Tensor, content: Tensor, salient: Tensor) -> Tensor:
    """M, C, E, X of rows.

    rows [B, R, P]; content [B, P] is 1 at content positions, 0 elsewhere; salient [B, P] is the weight w_j at salient
    positions, 0 elsewhere. Returns float32 [B, R, 4].
    """
    inside = rows * content.unsqueeze(1)
    mass = inside.sum(-1)
    salient_mass = torch.matmul(rows, salient.unsqueeze(-1)).squeeze(-1)
    neg_entropy_sum = torch.xlogy(inside, inside).sum(-1)
    return torch.stack((mass, salient_mass, neg_entropy_sum, inside.amax(-1)), dim=-1)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, H, Q, D], key and value [B, Hkv, K, D] -> [B, Q, H, D]."""
    calls = _calls.get()
    if calls is not None:
        calls.append(AttentionCall(module, query.shape[2], key.shape[2], query.shape[1]))
    tap: _Tap | None = module.__dict__.get(_TAP)
    if tap is None or tap.recorder.rows is None:
        return _sdpa_attention(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    bias: Tensor | None = kwargs.get("position_bias")
    if query.shape[2] == 1:
        # While decoding the row is all there is, and the output comes from it: no second pass over the keys.
        weights = _softmax(query, key, attention_mask, bias, scale)
        with tap.recorder.time:
            tap.recorder.add(_average(weights, tap.weights))
        return _mix(weights, value).transpose(1, 2), None
    with tap.recorder.time:
        index = _query_index(tap.recorder.rows, query)
        mask = _rows_of(attention_mask, index)
        if attention_mask is None and _causal(module, kwargs):
            positions = torch.arange(key.shape[2], device=key.device)
            mask = positions <= index[:, None, :, None]
        weights = _softmax(_rows_of(query, index), key, mask, _rows_of(bias, index), scale)
        tap.recorder.add(_average(weights, tap.weights))
    return _sdpa_attention(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _query_index(rows: int | Tensor | None, query: Tensor) -> Tensor:
    """Which queries have rows: [B, R] or [1, R]."""
    if isinstance(rows, Tensor):
        return rows.unsqueeze(-1)
    return torch.arange(rows or 0, query.shape[2], device=query.device).unsqueeze(0)


def _rows_of(tensor: Tensor | None, index: Tensor) -> Tensor | None:
    """The chosen query rows of a tensor [b, h, Q, x]: [B, h, R, x]; a dimension of one query stands for all."""
    if tensor is None or tensor.shape[2] == 1:
        return tensor
    if index.shape[0] == 1:
        return tensor[:, :, index[0]]
    batch = tensor.expand(index.shape[0], -1, -1, -1)
    return batch.gather(2, index[:, None, :, None].expand(-1, batch.shape[1], -1, batch.shape[3]))


def _causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether sdpa's causal shortcut is in force where there is no mask and more than one query."""
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _softmax(query: Tensor | None, key: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    """Softmax weights over all keys, float32 [B, H, R, K]; the query heads of one key head are handled together."""
    assert query is not None
    batch, heads, rows, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    grouped = query.float().reshape(batch, groups, heads // groups * rows, width)
    scores = torch.matmul(grouped, key.float().transpose(2, 3)).view(batch, heads, rows, keys) * scale
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, dim=-1)


def _average(weights: Tensor, heads: Tensor) -> Tensor:
    """Sum over heads with their weights: [B, H, R, K] -> [B, R, K]."""
    batch, count, rows, keys = weights.shape
    return torch.matmul(heads, weights.view(batch, count, rows * keys)).view(batch, rows, keys)


def _mix(weights: Tensor, value: Tensor) -> Tensor:
    """The attention output of one query: [B, H, 1, K] and [B, Hkv, K, D] -> [B, H, 1, D]."""
    batch, heads, _, keys = weights.shape
    groups = value.shape[1]
    grouped = weights.to(value.dtype).view(batch, groups, heads // groups, keys)
    return torch.matmul(grouped, value).view(batch, heads, 1, value.shape[-1])
