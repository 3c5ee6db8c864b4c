"""The capture of a worker whose steps stay on the device: rows, key sets and statistics at fixed addresses.

The same service as `capture.Capture` for model runners that never wait for the device. A slot is the runner's own index
of a request. Between `place` and `keep_dense`, `attend_layer` runs once a captured layer; its launches read and write
only what was allocated here and by the runner, so that they can be recorded in a CUDA graph and replayed. It knows no
vLLM.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rollout.vllm_capture.buffers import LayerShape
from rollout.vllm_capture.capture import UNCLAIMED, Fetched
from rollout.vllm_capture.placed_rows import StepTensors, no_rows, place_rows
from rollout.vllm_capture.request import CaptureRequest
from rollout.vllm_capture.steps import Ints
from rollout.vllm_capture.triton_kernels import RowTensors, SlotTensors, accumulate_rows, reduce_rows, workspace
from services.stopwatch import Stopwatch, timed

_MOST_SPLITS = 16
_KEYS_A_SPLIT = 64
"""A shorter split leaves part of its tile of keys idle."""


@dataclass
class _Held:
    """A request with statistics: in a slot, or out of the batch with its `rows` [T, 4] put by. `dense` [T + 1, P] takes
    its rows A[t, :], the last of them what is no row."""

    wish: CaptureRequest
    prompt: int
    slot: int | None = None
    rows: Tensor | None = None
    dense: Tensor | None = None


class DeviceCapture:
    """`layers` are the captured layers in the order in which they run, `tables` the block table [slots, blocks] that
    each reads; `total` is the sum of all weights u, over all ranks; `reduce` sums a tensor over the ranks that hold the
    other heads (None: this rank holds all). There are `slots` requests of `longest` tokens at most, with up to `drafts`
    drafted tokens a step; `dtype` is that of queries and keys.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        tables: Sequence[Tensor],
        *,
        total: float,
        dtype: torch.dtype,
        slots: int,
        drafts: int,
        longest: int,
        device: torch.device,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._layers = tuple(layers)
        self._index = {layer.name: i for i, layer in enumerate(layers)}
        self._heads = [torch.tensor(layer.weights, dtype=torch.float32, device=device) for layer in layers]
        self._total = total
        self._reduce = reduce
        self._device = device
        self._prompt = torch.zeros(slots, dtype=torch.int32, device=device)
        self._sets = torch.zeros((2, slots, longest), device=device)
        self._statistics = torch.zeros((slots, longest, 4), device=device)
        self._slots = [
            SlotTensors(table, self._prompt, self._sets[0], self._sets[1], self._statistics) for table in tables
        ]
        self._placed = no_rows(slots, 1 + drafts, device)
        count = self._placed.query.shape[0]
        self._space = workspace(
            rows=count,
            heads=max(layer.query_heads for layer in layers),
            width=longest,
            device=device,
            splits=min(_MOST_SPLITS, 1 << max(0, (longest // _KEYS_A_SPLIT).bit_length() - 1)),
        )
        widest = max(layer.query_heads * layer.width for layer in layers)
        self._query = torch.zeros(count * widest, dtype=dtype, device=device)
        self._count, self._width = count, longest
        self._prompts: Ints = np.zeros(slots, dtype=np.int64)
        self._reach: Ints = np.zeros(slots, dtype=np.int64)
        """One past the last response token of each slot that may have a row: the device alone knows which have."""
        self._held: dict[str, _Held] = {}
        self._in_slot: dict[int, _Held] = {}
        self._by_key: dict[str, _Held] = {}
        self._unclaimed: OrderedDict[str, None] = OrderedDict()
        self._most_unclaimed = UNCLAIMED * slots
        self._dense: list[tuple[int, _Held]] = []
        self.preempted = 0
        """Requests that came back into the batch with rows written before."""
        nobody = torch.full((1,), -1, dtype=torch.int64, device=device)
        nothing = torch.zeros(max(slots, 2), dtype=torch.int32, device=device)
        # Compiled now, and not in the first step.
        place_rows(self._placed, StepTensors(nobody, nothing, nothing, nothing), self._prompt)
        self.time = Stopwatch()
        """What the host spends on it between launches: they are replayed from graphs, which it cannot time."""

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes in use: of the slots, of the scratch of a step, and of what is put by until it is fetched."""
        slots = (self._prompt, self._sets, self._statistics)
        scratch = (self._space.rows, self._space.lse, self._space.largest, self._space.sums, self._query)
        kept = [each for held in self._by_key.values() for each in (held.rows, held.dense) if each is not None]
        return {
            name: sum(each.nbytes for each in tensors)
            for name, tensors in (("slots", slots), ("scratch", scratch), ("kept", kept))
        }

    def enter(self, id: str, slot: int, prompt: int, most_tokens: int, wish: CaptureRequest | None) -> None:
        """A request of P = `prompt` takes a slot, for the first time or after it had lost one."""
        self._prompts[slot] = self._reach[slot] = 0
        self._prompt[slot] = 0
        self._in_slot.pop(slot, None)
        held = self._held.get(id)
        if held is None:
            if wish is None:
                return
            held = self._held[id] = self._by_key[wish.key] = _Held(wish, prompt)
            if wish.dense:
                held.dense = torch.zeros((most_tokens + 1, prompt), device=self._device)
        held.slot = slot
        self._in_slot[slot] = held
        self._prompts[slot] = prompt
        self._prompt[slot] = prompt
        self._sets[:, slot, :prompt].copy_(_key_sets(held.wish, prompt, self._device), non_blocking=True)
        self._statistics[slot].fill_(torch.nan)  # what is never written fails its sample by name
        if held.rows is not None:
            self.preempted += 1
            self._statistics[slot, : len(held.rows)] = held.rows
            self._reach[slot] = len(held.rows)
            held.rows = None

    def leave(self, id: str) -> None:
        """A request loses its slot, because it is finished or because it is preempted."""
        held = self._held.get(id)
        if held is None or held.slot is None:
            return
        held.rows = self._statistics[held.slot, : self._reach[held.slot]].clone()
        self._prompt[held.slot] = 0
        self._prompts[held.slot] = 0
        self._in_slot.pop(held.slot, None)
        held.slot = None

    def finish(self, ids: Sequence[str]) -> None:
        """These requests compute no more tokens; their statistics stay until they are fetched."""
        for id in ids:
            self.leave(id)
            held = self._held.pop(id, None)
            if held is not None and held.wish.key in self._by_key:
                self._unclaimed[held.wish.key] = None
        while len(self._unclaimed) > self._most_unclaimed:
            self._by_key.pop(self._unclaimed.popitem(last=False)[0])

    @timed
    def place(self, step: StepTensors, slots: Ints, lengths: Ints) -> None:
        """A step is about to run; slots, lengths [N]: its requests on this side, and the most their contexts can be."""
        place_rows(self._placed, step, self._prompt)
        self._count, self._width = len(slots) * self._placed.per_request, int(self._prompts[slots].max(initial=1))
        self._reach[slots] = np.maximum(self._reach[slots], lengths - self._prompts[slots] + 1)
        self._dense = [
            (row, held)
            for row, slot in enumerate(slots.tolist())
            if (held := self._in_slot.get(slot)) is not None and held.dense is not None
        ]

    def place_none(self, requests: int) -> None:
        """A step of `requests` requests that are none is about to run, or to be recorded."""
        self._placed.rows.context.zero_()
        self._placed.query.zero_()  # it may have fewer tokens than the step before
        self._count, self._width = requests * self._placed.per_request, self._sets.shape[2]
        self._dense = []

    def attend_layer(self, name: str, query: Tensor, keys: Tensor) -> None:
        """A captured layer ran: query [tokens, H, D] (after the positional embedding), and the paged keys
        [blocks, Hkv, block size, D], those of this step among them."""
        layer = self._index[name]
        shape, slots, count = self._layers[layer], self._slots[layer], self._count
        placed = self._placed
        rows = RowTensors(*(each[:count] for each in (placed.rows.slot, placed.rows.token, placed.rows.context)))
        chosen = self._query[: count * shape.query_heads * shape.width].view(count, shape.query_heads, shape.width)
        torch.index_select(query.view(-1, *chosen.shape[1:]), 0, placed.query[:count], out=chosen)
        accumulate_rows(self._space, rows, slots, chosen, keys, self._heads[layer], shape.scale, add=layer > 0)
        if layer + 1 < len(self._layers):
            return
        if self._reduce is not None:
            sums = self._space.rows[:count, : self._width]
            # As one row: of a matrix vLLM takes it for hidden states, whose width its fastest way expects to be even.
            sums.copy_(self._reduce(sums.contiguous().view(-1)).view_as(sums))
        reduce_rows(self._space, rows, slots, self._total)

    @timed
    def keep_dense(self) -> None:
        """The step has run: its rows A[t, :] of requests that asked for them are taken over."""
        per, rows = self._placed.per_request, self._placed.rows
        for first, held in self._dense:
            assert held.dense is not None
            span = slice(first * per, (first + 1) * per)
            last = len(held.dense) - 1
            at = torch.where(rows.context[span] > 0, rows.token[span], last).clamp(max=last)
            held.dense.index_copy_(0, at.long(), self._space.rows[span, : held.prompt] / self._total)
        self._dense = []

    @timed
    def pop(self, keys: Sequence[str], tokens: Sequence[int]) -> list[Fetched]:
        """Statistics of requests by key, trimmed to their tokens; each can be fetched once. Waits for the device.

        Raises:
            KeyError: no request of that key was captured, or it was fetched already.
            RuntimeError: fewer rows were captured than the response has tokens.
        """
        found = [self._take(key, count) for key, count in zip(keys, tokens, strict=True)]
        if not found:
            return []
        rows = torch.cat([self._rows(held)[:count] for held, count in zip(found, tokens, strict=True)]).cpu()
        dense = [
            None if held.dense is None or not count else held.dense[:count].cpu().numpy()
            for held, count in zip(found, tokens, strict=True)
        ]
        return [
            Fetched(each.numpy().copy(), maps, None) for each, maps in zip(rows.split(list(tokens)), dense, strict=True)
        ]

    def _take(self, key: str, tokens: int) -> _Held:
        held = self._by_key.pop(key, None)
        if held is None:
            raise KeyError(f"no attention statistics are held under {key!r}")
        self._unclaimed.pop(key, None)
        if len(self._rows(held)) < tokens:
            raise RuntimeError(f"{len(self._rows(held))} rows were captured of the {tokens} tokens of {key!r}")
        return held

    def _rows(self, held: _Held) -> Tensor:
        if held.slot is None:
            assert held.rows is not None
            return held.rows
        return self._statistics[held.slot, : self._reach[held.slot]]


def _key_sets(wish: CaptureRequest, prompt: int, device: torch.device) -> Tensor:
    """Content and salient weights over the prompt, float32 [2, P], in memory from which the device copies by itself."""
    sets = torch.zeros((2, prompt), pin_memory=device.type == "cuda")
    sets[0, list(wish.content)] = 1.0
    sets[1, list(wish.salient)] = torch.tensor(wish.salient_weights, dtype=torch.float32)
    return sets
