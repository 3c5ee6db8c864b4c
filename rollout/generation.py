"""The decode loop: several requests' rows side by side, tensors of all rows at each step, no loop over rows.

A request's tokens come from its own generator and its own rows; the rows beside it change nothing beyond the rounding
of batched matrix products. A request alone has no padding and is reproduced bit for bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rollout.engine import AttentionRows, Completion, GenerationRequest, KeySets
from rollout.policy_runner import PaddedPrompts, Runner, pad_prompts
from rollout.sampling import SamplingRows, draw, sampling_rows, truncates
from services.attention.capture import Recorder, reduce_rows
from services.records import FinishReason, PolicyVersion

_COMPACT_BELOW = 0.75
"""Rows that have ended are dropped once fewer than this share is left: dropping copies the cache once."""


@dataclass(frozen=True)
class Row:
    """One sample of one request."""

    request: int
    sample: int


@dataclass
class _Written:
    """What the rows of a batch have come to: [B, T, ...] tensors, filled a step at a time."""

    tokens: Tensor
    logprobs: Tensor
    sampling_logprobs: Tensor
    statistics: Tensor  # [B, T, 4]
    lengths: Tensor  # [B]
    stopped: Tensor  # [B] bool: by an end-of-sequence token
    dense: dict[int, Tensor]  # row -> [T, P], padding included
    kept: list[Tensor]  # a step's [n, 3]: row, t, an id that survived truncation


@dataclass
class _Live:
    """The rows that are being decoded, and what each of them carries along; the first dimension is theirs."""

    rows: Tensor  # the row of the batch that each is
    content: Tensor
    salient: Tensor
    uniforms: Tensor  # [b, T]
    limits: Tensor
    settings: SamplingRows
    ended: Tensor  # bool

    def select(self, index: Tensor) -> "_Live":
        return _Live(
            self.rows[index],
            self.content[index],
            self.salient[index],
            self.uniforms[index],
            self.limits[index],
            self.settings.select(index),
            self.ended[index],
        )


def draw_uniforms(request: GenerationRequest) -> Tensor:
    """The uniform numbers of a request, float64 [samples, max_tokens], from its own generator."""
    generator = torch.Generator().manual_seed(request.seed % 2**63)
    shape = (request.sampling.samples, request.sampling.max_tokens)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def chunk_rows(requests: Sequence[GenerationRequest], max_rows: int) -> list[list[Row]]:
    """All samples of all requests, in order, in batches of at most `max_rows`."""
    rows = [Row(i, k) for i, request in enumerate(requests) for k in range(request.sampling.samples)]
    return [rows[start : start + max_rows] for start in range(0, len(rows), max_rows)]


def key_masks(keys: Sequence[KeySets], prompts: PaddedPrompts, device: torch.device) -> tuple[Tensor, Tensor]:
    """Content [n, P] (1 or 0) and salience weights [n, P] over the padded columns."""
    content = torch.zeros(prompts.ids.shape)
    salient = torch.zeros(prompts.ids.shape)
    for row, (sets, offset) in enumerate(zip(keys, prompts.offsets, strict=True)):
        content[row, torch.tensor(sets.content, dtype=torch.int64) + offset] = 1.0
        where = torch.tensor(sets.salient, dtype=torch.int64) + offset
        salient[row, where] = torch.tensor(sets.salient_weights, dtype=torch.float32)
    return content.to(device), salient.to(device)


@torch.inference_mode()
def generate_batch(
    runner: Runner,
    requests: Sequence[GenerationRequest],
    uniforms: Sequence[Tensor],
    rows: Sequence[Row],
    eos_ids: Sequence[int],
    version: PolicyVersion,
) -> list[Completion]:
    """The completions of `rows`, in their order. Raises ArithmeticError where the policy's logits are not finite."""
    device = runner.device
    used = sorted({row.request for row in rows})
    prompts = pad_prompts([requests[i].prompt_ids for i in used], runner.padding_side, device)
    limits = torch.tensor([requests[row.request].sampling.max_tokens for row in rows], device=device)
    running, logits, attention = runner.begin(prompts, int(limits.max()))
    place = {request: i for i, request in enumerate(used)}
    spread = torch.tensor([place[row.request] for row in rows], device=device)
    if len(rows) != len(used):  # the samples of a prompt share its prefill
        runner.select(running, spread)
        logits, attention = logits[spread], attention[spread]
    content, salient = key_masks([requests[i].keys for i in used], prompts, device)
    live = _Live(
        rows=torch.arange(len(rows), device=device),
        content=content[spread],
        salient=salient[spread],
        uniforms=_uniform_rows(uniforms, rows, int(limits.max())).to(device),
        limits=limits,
        settings=sampling_rows([requests[row.request].sampling for row in rows], device),
        ended=torch.zeros(len(rows), dtype=torch.bool, device=device),
    )
    keep_maps = [i for i, row in enumerate(rows) if row.sample < requests[row.request].keep_maps]
    written = _empty(len(rows), int(limits.max()), prompts.ids.shape[1], keep_maps, device)
    ends = torch.tensor(sorted(eos_ids), device=device)
    for t in range(int(limits.max())):
        tokens = _write_step(written, live, t, logits, attention, ends, runner.recorder)
        left = int((~live.ended).sum())
        if left == 0:
            break
        if left < _COMPACT_BELOW * len(live.rows):
            index = (~live.ended).nonzero().squeeze(-1)
            runner.select(running, index)
            live, tokens = live.select(index), tokens[index]
        logits, attention = runner.step(running, tokens)
    spans = [(prompts.offsets[place[row.request]], prompts.lengths[place[row.request]]) for row in rows]
    return _completions(written, [truncates(requests[row.request].sampling) for row in rows], spans, version)


def _uniform_rows(uniforms: Sequence[Tensor], rows: Sequence[Row], longest: int) -> Tensor:
    numbers = torch.zeros((len(rows), longest), dtype=torch.float64)
    for i, row in enumerate(rows):
        mine = uniforms[row.request][row.sample]
        numbers[i, : len(mine)] = mine
    return numbers


def _empty(count: int, longest: int, width: int, keep_maps: Sequence[int], device: torch.device) -> _Written:
    return _Written(
        tokens=torch.zeros((count, longest), dtype=torch.int64, device=device),
        logprobs=torch.zeros((count, longest), device=device),
        sampling_logprobs=torch.zeros((count, longest), device=device),
        statistics=torch.zeros((count, longest, 4), device=device),
        lengths=torch.zeros(count, dtype=torch.int64, device=device),
        stopped=torch.zeros(count, dtype=torch.bool, device=device),
        dense={row: torch.zeros((longest, width), device=device) for row in keep_maps},
        kept=[],
    )


def _write_step(
    written: _Written, live: _Live, t: int, logits: Tensor, attention: Tensor, ends: Tensor, recorder: Recorder
) -> Tensor:
    """Draws token t of each live row, writes it with its row's statistics, notes what has ended. Returns the tokens.

    A row that has ended is still computed until it is dropped; what it writes lies beyond its length.
    """
    drawn = draw(logits, live.uniforms[:, t], live.settings)
    written.tokens[live.rows, t] = drawn.tokens
    written.logprobs[live.rows, t] = drawn.logprobs
    with recorder.time:
        written.statistics[live.rows, t] = reduce_rows(attention.unsqueeze(1), live.content, live.salient).squeeze(1)
    if drawn.kept is not None:
        written.sampling_logprobs[live.rows, t] = drawn.sampling_logprobs
        which, ids = drawn.kept[live.settings.truncates].nonzero(as_tuple=True)
        rows = live.rows[live.settings.truncates][which]
        written.kept.append(torch.stack((rows, torch.full_like(rows, t), ids), dim=1).cpu())
    if written.dense:
        for place, row in enumerate(live.rows.tolist()):
            if row in written.dense:
                written.dense[row][t] = attention[place]
    stops = torch.isin(drawn.tokens, ends) & ~live.ended
    ending = (stops | (live.limits == t + 1)) & ~live.ended
    written.stopped[live.rows[stops]] = True
    written.lengths[live.rows[ending]] = t + 1
    live.ended = live.ended | ending
    return drawn.tokens


def _completions(
    written: _Written, truncating: Sequence[bool], spans: Sequence[tuple[int, int]], version: PolicyVersion
) -> list[Completion]:
    lengths: list[int] = written.lengths.tolist()
    stopped: list[bool] = written.stopped.tolist()
    tokens, logprobs = written.tokens.cpu(), written.logprobs.cpu().numpy()
    sampling_logprobs, statistics = written.sampling_logprobs.cpu().numpy(), written.statistics.cpu().numpy()
    kept = torch.cat(written.kept) if written.kept else None
    completions: list[Completion] = []
    for row, length in enumerate(lengths):
        offset, width = spans[row]
        dense = written.dense[row][:length, offset : offset + width] if row in written.dense else None
        reason: FinishReason = "stop" if stopped[row] else "length"
        completions.append(
            Completion(
                response_ids=tuple(tokens[row, :length].tolist()),
                finish_reason=reason,
                logprobs=logprobs[row, :length].copy(),
                sampling_logprobs=sampling_logprobs[row, :length].copy() if truncating[row] else None,
                kept_ids=_kept_of(kept, row, length) if truncating[row] and kept is not None else None,
                attention=attention_rows(statistics[row, :length], dense),
                versions=((version.incarnation, version.step, length),),
            )
        )
    return completions


def attention_rows(statistics: NDArray[np.float32], dense: Tensor | None) -> AttentionRows:
    """[T, 4] as the four named columns; `dense` [T, P] where it was kept."""
    columns = np.ascontiguousarray(statistics.T)
    return AttentionRows(*columns, dense=None if dense is None else dense.cpu().numpy().copy())


def _kept_of(kept: Tensor, row: int, length: int) -> tuple[tuple[int, ...], ...]:
    """The ids that each of the row's steps kept, rising."""
    mine = kept[(kept[:, 0] == row) & (kept[:, 1] < length)]  # steps were appended in order
    counts = torch.bincount(mine[:, 1], minlength=length)
    return tuple(tuple(part.tolist()) for part in mine[:, 2].split(counts.tolist()))
