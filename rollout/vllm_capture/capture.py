"""The capture of one worker: which request holds which slot, the step under way, and the statistics to be fetched.

The adapter of a model runner tells it what a step computes (`begin`), the hooks in the captured layers give it queries
and keys (`attend_layer`), and the engine fetches statistics by key (`pop`). It knows no vLLM.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rollout.vllm_capture.attend import attend, statistics
from rollout.vllm_capture.buffers import LayerShape, Slots
from rollout.vllm_capture.request import CaptureRequest
from rollout.vllm_capture.steps import Ints, Rows, rows_of_step, tokens_of_step
from services.stopwatch import Stopwatch, timed

UNCLAIMED = 4
"""Finished requests whose statistics nobody fetched (their client went away): kept for this many full batches."""

_ALL = np.iinfo(np.int64).max


@dataclass(frozen=True)
class BatchEntry:
    """A request that comes into the batch: prompt length P, what it asks, and the cache blocks of its keys."""

    prompt: int
    wish: CaptureRequest | None
    blocks: Ints


@dataclass(frozen=True)
class KeptSet:
    """What top-k and top-p left of one step's distribution: token ids (int32), and the logarithm of their mass."""

    ids: NDArray[np.int32]
    log_mass: float


@dataclass
class _Held:
    """A request with statistics: in a slot, or out of the batch with its `rows` [T, 4] put by."""

    wish: CaptureRequest
    prompt: int
    slot: int | None = None
    rows: Tensor | None = None
    dense: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    kept: dict[int, KeptSet] = field(default_factory=dict[int, KeptSet])


@dataclass(frozen=True)
class _Round:
    """Rows as index tensors, and the sum over layers and heads so far: [slots in use, longest context]."""

    rows: Rows
    query: Tensor
    slot: Tensor
    token: Tensor
    context: Tensor
    shortest: int
    sums: Tensor


@dataclass
class _Step:
    slot: Tensor
    position: Tensor
    captured: Tensor | None
    """Which of the step's tokens belong to captured requests; None: all."""
    cached: list[tuple[int, Tensor]]
    """Slots whose first keys the prefix cache holds, and where: read when the layer has written its keys of this step,
    among which they may be (requests of one step share a prefix that is computed in it)."""
    rounds: list[_Round]
    used: int
    longest: int
    width: int
    layers: int = 0


@dataclass(frozen=True)
class Fetched:
    """Statistics [T, 4] (M, C, E, X) and, where the request asked for them, rows [T, P] (float32) and T kept sets."""

    statistics: NDArray[np.float32]
    dense: NDArray[np.float32] | None
    kept: tuple[KeptSet, ...] | None


class Capture:
    """`layers` are the captured layers in the order in which they run; `total` is the sum of all weights u, over all
    ranks; `reduce` sums rows over the ranks that hold the other heads (None: this rank holds all). `block_size` is that
    of the block tables, `copied_block_size` that of `copy_blocks`; the paged cache has room for `paged_tokens`.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        *,
        total: float,
        dtype: torch.dtype,
        most_requests: int,
        longest: int,
        block_size: int,
        copied_block_size: int,
        paged_tokens: int,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._layers = tuple(layers)
        self._index = {layer.name: i for i, layer in enumerate(layers)}
        self._heads = [torch.tensor(layer.weights, dtype=torch.float32) for layer in layers]
        self._total = total
        self._block_size = block_size
        self._copied_block_size = copied_block_size
        self._reduce = reduce
        self._slots = Slots(layers, dtype, most=most_requests, longest=longest)
        # Keys that were cached before the capture began were not seen: no numbers, so that such a sample fails by name.
        self._shadow = [
            torch.full((paged_tokens, layer.key_heads, layer.width), math.nan, dtype=dtype) for layer in layers
        ]
        self._held: dict[str, _Held] = {}
        self._dense: dict[int, _Held] = {}
        self._by_key: dict[str, _Held] = {}
        self._unclaimed: OrderedDict[str, None] = OrderedDict()
        self._most_unclaimed = UNCLAIMED * most_requests
        self._cached: list[tuple[int, Tensor]] = []
        self._batch: list[str] = []
        self._batch_slots: Ints = np.zeros(0, dtype=np.int64)
        self._batch_prompts: Ints = np.zeros(0, dtype=np.int64)
        self._step: _Step | None = None
        self._drawing: dict[int, tuple[_Held, int]] = {}
        self.preempted = 0
        """Requests that came back into the batch with rows written before."""
        self.time = Stopwatch()
        """What all of this takes."""

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes in use: of the slots, and of the shadow of the paged keys."""
        return {"slots": self._slots.nbytes, "shadow": sum(keys.nbytes for keys in self._shadow)}

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Follows the cache where it copies blocks (source, destination)."""
        size = self._copied_block_size
        for source, destination in pairs:
            for keys in self._shadow:
                keys[destination * size : (destination + 1) * size] = keys[source * size : (source + 1) * size]

    def resume(self, ids: Iterable[str]) -> None:
        """These requests come back into the batch in the coming step, perhaps without having been away for one.

        What is computed of them then is in the cache, by new weights where these were the reason, and is read from it.
        """
        for id in ids:
            if (held := self._held.get(id)) is not None:
                self._leave(held)

    def finish(self, ids: Sequence[str]) -> None:
        """These requests compute no more tokens; their statistics stay until they are fetched."""
        for id in ids:
            held = self._held.pop(id, None)
            if held is None:
                continue
            self._leave(held)
            if held.wish.key in self._by_key:
                self._unclaimed[held.wish.key] = None
        while len(self._unclaimed) > self._most_unclaimed:
            self._by_key.pop(self._unclaimed.popitem(last=False)[0])

    @timed
    def begin(
        self, entry: Callable[[int], BatchEntry], ids: list[str], computed: Ints, scheduled: Ints, committed: Ints
    ) -> None:
        """A step is about to run: requests `ids` in the runner's order; computed, scheduled, committed: [requests].

        `entry(i)` describes the i-th request; it is called for those that come into the batch.
        """
        self._cached = []
        if ids != self._batch:
            self._change_batch(entry, ids, computed)
        slots, prompts = self._batch_slots, self._batch_prompts
        self._drawing = self._truncated_draws(ids, computed + scheduled - prompts, committed)
        captured = slots >= 0
        longest = int((computed + scheduled).max(initial=1))
        self._slots.reserve(longest)
        used, width = self._slots.used, min(longest, int(prompts.max(initial=1)))
        tokens = tokens_of_step(slots, computed, scheduled)
        # A request that asks for nothing gets no row, as if all its tokens were committed.
        rounds = rows_of_step(slots, computed, scheduled, prompts, np.where(captured, committed, _ALL))
        self._step = _Step(
            torch.from_numpy(tokens.slot),
            torch.from_numpy(tokens.position),
            None if captured.all() else torch.from_numpy(np.flatnonzero(tokens.slot >= 0)),
            self._cached,
            [
                _Round(
                    rows,
                    torch.from_numpy(rows.query),
                    torch.from_numpy(rows.slot),
                    torch.from_numpy(rows.token),
                    torch.full((used,), longest).index_put_(
                        (torch.from_numpy(rows.slot),), torch.from_numpy(rows.context)
                    ),
                    int(rows.context.min()),
                    torch.zeros((used, longest)),
                )
                for rows in rounds
            ],
            used,
            longest,
            width,
        )

    @timed
    def attend_layer(self, name: str, query: Tensor, keys: Tensor, slot_mapping: Tensor) -> None:
        """A captured layer runs: query [tokens, H, D], keys [tokens, Hkv, D] (after the positional embedding),
        slot_mapping [tokens], where the cache puts each key."""
        layer = self._index[name]
        shadow = self._shadow[layer]
        shadow[slot_mapping] = keys[: slot_mapping.shape[0]].to(shadow.dtype)
        step = self._step
        if step is None:
            return
        for slot, paged in step.cached:
            self._slots.keys[layer][slot, :, :, : len(paged)] = shadow[paged].permute(1, 2, 0)
        self._write_keys(step, layer, keys)
        shape = self._layers[layer]
        held = self._slots.keys[layer][: step.used, :, :, : step.longest].float()
        for round in step.rounds:
            scattered = torch.zeros((step.used, shape.query_heads, shape.width))
            scattered[round.slot] = query[round.query].float()
            round.sums.add_(attend(scattered, held, round.context, round.shortest, self._heads[layer], shape.scale))
        step.layers += 1
        if step.layers == len(self._layers):
            self._step = None
            self._finish_step(step)

    @property
    def draws_truncated(self) -> bool:
        """Whether a request of the step under way asked for its kept sets."""
        return bool(self._drawing)

    @timed
    def keep_sets(self, kept: Tensor, log_mass: Tensor) -> None:
        """The step drew its tokens: kept [requests, V] bool, log_mass [requests], in the order given to `begin`."""
        for row, (held, token) in self._drawing.items():
            ids = torch.nonzero(kept[row]).squeeze(-1).to(torch.int32).numpy()
            held.kept[token] = KeptSet(ids, float(log_mass[row]))

    @timed
    def pop(self, keys: Sequence[str], tokens: Sequence[int]) -> list[Fetched]:
        """Statistics of requests by key, trimmed to their tokens; each can be fetched once.

        Raises:
            KeyError: no request of that key was captured, or it was fetched already.
            RuntimeError: fewer rows were captured than the response has tokens.
        """
        return [self._pop(key, count) for key, count in zip(keys, tokens, strict=True)]

    def _pop(self, key: str, tokens: int) -> Fetched:
        held = self._by_key.pop(key, None)
        if held is None:
            raise KeyError(f"no attention statistics are held under {key!r}")
        self._unclaimed.pop(key, None)
        rows = self._rows(held)
        if len(rows) < tokens:
            raise RuntimeError(f"{len(rows)} rows were captured of the {tokens} tokens of {key!r}")
        dense = torch.stack([held.dense[t] for t in range(tokens)]).numpy() if held.wish.dense and tokens else None
        kept = tuple(held.kept[t] for t in range(tokens) if t in held.kept) if held.wish.kept_sets else None
        if kept is not None and len(kept) < tokens:
            raise RuntimeError(f"{len(kept)} kept sets were recorded of the {tokens} tokens of {key!r}")
        return Fetched(rows[:tokens].numpy().copy(), dense, kept)

    def _rows(self, held: _Held) -> Tensor:
        if held.slot is None:
            assert held.rows is not None
            return held.rows
        return self._slots.statistics[held.slot, : self._slots.written[held.slot]]

    def _change_batch(self, entry: Callable[[int], BatchEntry], ids: list[str], computed: Ints) -> None:
        """Slots follow the batch: preempted requests lose theirs, new and resumed ones get one with their keys."""
        present = set(ids)
        for id, held in self._held.items():
            if id not in present:
                self._leave(held)
        slots = np.full(len(ids), -1, dtype=np.int64)
        prompts = np.ones(len(ids), dtype=np.int64)
        for i, id in enumerate(ids):
            held = self._held.get(id)
            if held is None or held.slot is None:
                held = self._enter(id, held, entry(i), int(computed[i]))
            if held is not None and held.slot is not None:
                slots[i], prompts[i] = held.slot, held.prompt
        self._batch, self._batch_slots, self._batch_prompts = list(ids), slots, prompts

    def _truncated_draws(self, ids: list[str], tokens: Ints, committed: Ints) -> dict[int, tuple[_Held, int]]:
        """By row: the requests that ask for kept sets, and the response token that this step draws for them. A prefill
        that does not end yet draws one too, which is thrown away: its token is negative, or committed already."""
        asking = ((row, self._held.get(id)) for row, id in enumerate(ids))
        return {
            row: (held, int(tokens[row]))
            for row, held in asking
            if held is not None and held.wish.kept_sets and tokens[row] >= max(0, int(committed[row]))
        }

    def _enter(self, id: str, held: _Held | None, entry: BatchEntry, computed: int) -> _Held | None:
        if held is None:
            if entry.wish is None:
                return None
            held = _Held(entry.wish, entry.prompt)
            self._held[id] = held
            self._by_key[entry.wish.key] = held
        slots, wish = self._slots, held.wish
        slots.reserve(max(entry.prompt, computed))
        slot = held.slot = slots.take()
        slots.content[slot, list(wish.content)] = 1.0
        slots.salient[slot, list(wish.salient)] = torch.tensor(wish.salient_weights, dtype=torch.float32)
        if wish.dense:
            self._dense[slot] = held
        if held.rows is not None:
            self.preempted += 1
            slots.reserve(len(held.rows))
            slots.statistics[slot, : len(held.rows)] = held.rows
            slots.written[slot] = len(held.rows)
            held.rows = None
        if computed:
            positions = np.arange(computed)
            paged = entry.blocks[positions // self._block_size] * self._block_size + positions % self._block_size
            self._cached.append((slot, torch.from_numpy(paged)))
        return held

    def _leave(self, held: _Held) -> None:
        if held.slot is None:
            return
        held.rows = self._rows(held).clone()
        self._dense.pop(held.slot, None)
        self._slots.give(held.slot)
        held.slot = None
        self._batch = []  # so that the next step looks its slots up again

    def _write_keys(self, step: _Step, layer: int, keys: Tensor) -> None:
        slot, position, keys = step.slot, step.position, keys[: len(step.slot)]
        if step.captured is not None:
            slot, position, keys = slot[step.captured], position[step.captured], keys[step.captured]
        held = self._slots.keys[layer]
        held[slot, :, :, position] = keys.to(held.dtype)

    def _finish_step(self, step: _Step) -> None:
        slots = self._slots
        content = slots.content[: step.used, : step.width]
        salient = slots.salient[: step.used, : step.width]
        for round in step.rounds:
            sums = round.sums[:, : step.width]
            rows = (sums if self._reduce is None else self._reduce(sums.contiguous())) / self._total
            slots.statistics[round.slot, round.token] = statistics(rows, content, salient)[round.slot]
            slots.written[round.rows.slot] = np.maximum(slots.written[round.rows.slot], round.rows.token + 1)
            if self._dense:
                for slot, token in zip(round.rows.slot.tolist(), round.rows.token.tolist(), strict=True):
                    if slot in self._dense:
                        held = self._dense[slot]
                        held.dense[token] = rows[slot, : held.prompt].clone()
