"""Samples to micro-batches: the same minibatches at any world size, equal work on every rank.

A step's batch is cut into minibatches first, from the seed alone, so that an optimiser update sees the same samples
however many ranks there are. Each minibatch is then dealt to the ranks by token count and packed into micro-batches by
a budget of padded tokens. ZeRO-3 gathers parameters collectively, so all ranks must run the same number of
micro-batches, and in the i-th of them the same number of logit chunks: ranks with less work repeat a sample with
weight 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from learner.policy import ModelInput

Family = Literal["decoder", "encoder-decoder"]


@dataclass(frozen=True)
class Tokens:
    """The token ids of one sample; `kept_ids` [T] sets of ids where truncated sampling is replayed."""

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
    """One optimiser update: `rows` on all ranks together, `ranks[r]` the micro-batches of rank r (all of one length)."""

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
    """Minibatches of one epoch. `lengths` are (prompt, response) tokens a sample; `seed` None keeps the order (forward passes).

    The content of the minibatches depends on `seed`, the number of samples and `minibatches` alone.
    """
    raise NotImplementedError


def collate(
    samples: Sequence[Tokens], *, family: Family, pad_id: int, decoder_start_id: int | None = None
) -> ModelInput:
    """Right-padded tensors of one micro-batch (on the CPU; move them with `ModelInput.to`)."""
    raise NotImplementedError
