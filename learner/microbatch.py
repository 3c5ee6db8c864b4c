"""Samples to micro-batches: the same minibatches at any world size, equal work on every rank.

A step's batch is cut into minibatches first, from the seed alone, so that an optimiser update sees the same samples
however many ranks there are. Each minibatch is then dealt to the ranks by token count and packed into micro-batches by
a budget of padded tokens. ZeRO-3 gathers parameters collectively, so all ranks must run the same number of
micro-batches, and in the i-th of them the same number of logit chunks: ranks with less work repeat a sample with
weight 0.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from learner.policy import ModelInput

Family = Literal["decoder", "encoder-decoder"]


@dataclass(frozen=True)
class Tokens:
    """The token ids of one sample; `kept_ids`: a set a token where truncated sampling is replayed (empty: all ids)."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    kept_ids: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class MicroBatch:
    """One forward on one rank. `rows` index the step's samples; `weights` (1 or 0) say which of them count.

    `chunks` is the number of logit chunks, equal on all ranks.
    """

    rows: tuple[int, ...]
    weights: tuple[float, ...]
    chunks: int


@dataclass(frozen=True)
class Minibatch:
    """One optimiser update: `rows` of all ranks together; `ranks[r]` the micro-batches of rank r, as many on each."""

    rows: tuple[int, ...]
    ranks: tuple[tuple[MicroBatch, ...], ...]


def plan_epoch(
    lengths: Sequence[tuple[int, int]],
    *,
    world_size: int,
    minibatches: int,
    token_budget: int,
    logit_chunk: int,
    seed: int | None,
) -> tuple[Minibatch, ...]:
    """The minibatches of one epoch.

    `lengths` are (prompt, response) tokens a sample. `seed` None keeps the samples' order (forward passes). The content
    of the minibatches depends on `seed`, `minibatches` and the number of samples alone. ValueError: no sample, or fewer
    samples than minibatches.
    """
    if not 1 <= minibatches <= len(lengths):
        raise ValueError(f"{len(lengths)} samples cannot make {minibatches} minibatches")
    order = list(range(len(lengths)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    ends = [len(order) * i // minibatches for i in range(minibatches + 1)]
    parts = [order[start:end] for start, end in pairwise(ends)]
    return tuple(_plan(part, lengths, world_size, token_budget, logit_chunk) for part in parts)


def _plan(
    rows: list[int], lengths: Sequence[tuple[int, int]], world_size: int, token_budget: int, logit_chunk: int
) -> Minibatch:
    dealt = _deal(rows, lengths, world_size)
    packed = [_pack(part, lengths, token_budget) for part in dealt]
    count = max(len(part) for part in packed)
    idle = min(rows, key=lambda row: (sum(lengths[row]), row))  # the cheapest sample stands in where there is none
    ranks: list[list[tuple[list[int], float]]] = [
        [(part, 1.0) for part in parts] + [([idle], 0.0)] * (count - len(parts)) for parts in packed
    ]
    chunks = [
        max(1, *(-(-sum(lengths[row][1] for row in parts[i][0]) // logit_chunk) for parts in ranks))
        for i in range(count)
    ]
    return Minibatch(
        rows=tuple(rows),
        ranks=tuple(
            tuple(MicroBatch(tuple(part), (weight,) * len(part), chunks[i]) for i, (part, weight) in enumerate(parts))
            for parts in ranks
        ),
    )


def _deal(rows: list[int], lengths: Sequence[tuple[int, int]], world_size: int) -> list[list[int]]:
    """Longest first, each to the rank with the fewest tokens so far."""
    loads = [0] * world_size
    dealt: list[list[int]] = [[] for _ in range(world_size)]
    for row in sorted(rows, key=lambda row: (-sum(lengths[row]), row)):
        rank = loads.index(min(loads))
        dealt[rank].append(row)
        loads[rank] += sum(lengths[row])
    return dealt


def _pack(rows: list[int], lengths: Sequence[tuple[int, int]], token_budget: int) -> list[list[int]]:
    """Neighbours in length together, while rows x longest stays in the budget; a sample above it stands alone."""
    packed: list[list[int]] = []
    longest = 0
    for row in rows:  # as dealt: longest first, so the first row of a part is its longest
        if packed and (len(packed[-1]) + 1) * longest <= token_budget:
            packed[-1].append(row)
        else:
            packed.append([row])
            longest = sum(lengths[row])
    return packed


def collate(
    samples: Sequence[Tokens], *, family: Family, pad_id: int, decoder_start_id: int | None = None
) -> ModelInput:
    """Right-padded tensors of one micro-batch (on the CPU; move them with `ModelInput.to`).

    Causal attention and absolute positions from 0 make right padding invisible to the tokens before it. ValueError: an
    empty prompt or response, a kept set without its token, an encoder-decoder without `decoder_start_id`.
    """
    for sample in samples:
        _check(sample)
    prompts = [list(sample.prompt_ids) for sample in samples]
    responses = [list(sample.response_ids) for sample in samples]
    decoder_input_ids = None
    if family == "decoder":
        sequences = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        first = [len(prompt) - 1 for prompt in prompts]
    else:
        if decoder_start_id is None:
            raise ValueError("an encoder-decoder needs decoder_start_id")
        sequences = prompts
        first = [0] * len(samples)
        decoder_input_ids = _pad([[decoder_start_id, *response] for response in responses], pad_id)
    rows = [list(range(start, start + len(response) + 1)) for start, response in zip(first, responses, strict=True)]
    kept_ids = None
    if any(sample.kept_ids is not None for sample in samples):
        kept_ids = _pad_kept(samples, max(len(response) for response in responses))
    return ModelInput(
        input_ids=_pad(sequences, pad_id),
        attention_mask=_pad([[1] * len(sequence) for sequence in sequences], 0),
        decoder_input_ids=decoder_input_ids,
        rows=_pad(rows, 0),
        response_ids=_pad(responses, 0),
        response_mask=_pad([[1] * len(response) for response in responses], 0).bool(),
        kept_ids=kept_ids,
    )


def pad_rows(values: Sequence[Sequence[float]], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Per-token numbers of several samples as a right-padded tensor [B, T], 0 where padded."""
    return _pad(values, 0, dtype)


def _check(sample: Tokens) -> None:
    if not sample.prompt_ids or not sample.response_ids:
        raise ValueError("a sample needs at least one prompt token and one response token")
    if sample.kept_ids is None:
        return
    if len(sample.kept_ids) != len(sample.response_ids):
        raise ValueError(f"{len(sample.kept_ids)} kept sets for {len(sample.response_ids)} tokens")
    for t, (kept, token) in enumerate(zip(sample.kept_ids, sample.response_ids, strict=True)):
        if kept and token not in kept:
            raise ValueError(f"token {token} of row {t} is not among the {len(kept)} ids that sampling kept")


def _pad(rows: Sequence[Sequence[float]], fill: int, dtype: torch.dtype = torch.int64) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype)


def _pad_kept(samples: Sequence[Tokens], length: int) -> Tensor:
    sets = [sample.kept_ids or ((),) * len(sample.response_ids) for sample in samples]
    width = max(1, *(len(kept) for rows in sets for kept in rows))
    padded = [[[*kept, *[-1] * (width - len(kept))] for kept in rows] for rows in sets]
    return torch.tensor([rows + [[-1] * width] * (length - len(rows)) for rows in padded], dtype=torch.int64)
