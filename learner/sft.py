"""Supervised fine-tuning: cross-entropy on response tokens only, through the same engine as reinforcement learning."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from learner.engine import Engine, add_over_ranks
from learner.errors import NonFinite
from learner.losses import Normaliser, cross_entropy_loss, token_weights
from learner.microbatch import MicroBatch, Tokens, collate, pad_rows, plan_epoch
from learner.ppo import seed_of
from learner.sft_config import SftSection

Pair = tuple[Sequence[int], Sequence[int]]
"""(prompt ids, response ids): the response ends with the end-of-sequence token that the policy is to emit."""


WINDOW = 16
"""Minibatches among which pairs are sorted by length."""


@dataclass(frozen=True)
class EpochReport:
    """Losses are nats a response token; `validation_loss` is None where there are no validation pairs."""

    epoch: int
    updates: int
    train_loss: float
    validation_loss: float | None
    response_tokens: int


def updates_of(pairs: int, section: SftSection) -> int:
    """Optimiser updates of a whole fine-tuning."""
    return section.epochs * math.ceil(pairs / section.batch_size)


def epoch_order(lengths: Sequence[tuple[int, int]], minibatches: int, seed: int) -> list[int]:
    """The pairs of an epoch in random order, pairs of similar length near each other.

    Shuffled, then sorted by length within windows of `WINDOW` minibatches, and these cut and shuffled again: there is a
    third less padding, and what comes when still depends on the seed alone.
    """
    draw = random.Random(seed)
    rows = list(range(len(lengths)))
    draw.shuffle(rows)
    size = math.ceil(len(rows) / minibatches)
    parts: list[list[int]] = []
    for start in range(0, len(rows), WINDOW * size):
        window = sorted(rows[start : start + WINDOW * size], key=lambda row: sum(lengths[row]))
        parts += [window[i : i + size] for i in range(0, len(window), size)]
    draw.shuffle(parts)
    return [row for part in parts for row in part]


def fine_tune(
    engine: Engine,
    train: Sequence[Pair],
    validation: Sequence[Pair],
    section: SftSection,
    *,
    seed: int,
    pad_id: int,
    decoder_start_id: int | None,
    on_update: Callable[[], None] = lambda: None,
) -> list[EpochReport]:
    """All epochs, each followed by the loss on the validation pairs. Collective.

    Raises:
        NonFinite: names the epoch and the update.
        ValueError: no training pairs, or one without prompt or response tokens.
    """
    if not train:
        raise ValueError("there are no training pairs")
    task = _Task(engine, pad_id, decoder_start_id, on_update)
    training = [Tokens(tuple(prompt), tuple(response)) for prompt, response in train]
    held_out = [Tokens(tuple(prompt), tuple(response)) for prompt, response in validation]
    reports: list[EpochReport] = []
    for epoch in range(section.epochs):
        minibatches = math.ceil(len(training) / section.batch_size)
        order = epoch_order(_lengths(training), minibatches, seed_of(seed, epoch))
        loss, tokens = task.train([training[row] for row in order], minibatches, epoch)
        report = EpochReport(
            epoch=epoch,
            updates=engine.updates_done,
            train_loss=loss,
            validation_loss=task.evaluate(held_out) if held_out else None,
            response_tokens=tokens,
        )
        reports.append(report)
    return reports


@dataclass(frozen=True)
class _Task:
    engine: Engine
    pad_id: int
    decoder_start_id: int | None
    on_update: Callable[[], None]

    def train(self, pairs: Sequence[Tokens], minibatches: int, epoch: int) -> tuple[float, int]:
        """One epoch over pairs in this order: its mean loss a token (as it went), and its response tokens."""
        engine = self.engine
        plan = plan_epoch(
            _lengths(pairs),
            world_size=engine.world_size,
            minibatches=minibatches,
            token_budget=engine.section.microbatch_tokens,
            logit_chunk=engine.section.logit_chunk,
            seed=None,
        )
        total = torch.zeros((), dtype=torch.float64)
        for number, minibatch in enumerate(plan):
            tokens = sum(len(pairs[row].response_ids) for row in minibatch.rows)
            mine = minibatch.ranks[engine.rank]
            for index, micro in enumerate(mine):
                loss = self._loss(pairs, micro, Normaliser(tokens, len(minibatch.rows)))
                total += loss.detach().cpu().double() * tokens
                engine.backward(loss, last=index == len(mine) - 1)
            try:
                engine.update()
            except NonFinite as problem:
                raise NonFinite(f"fine-tuning, epoch {epoch}, minibatch {number}: {problem}") from problem
            self.on_update()
        tokens = sum(len(pair.response_ids) for pair in pairs)
        loss = float(add_over_ranks([total.to(engine.device)])[0]) / tokens
        return loss, tokens

    @torch.no_grad()
    def evaluate(self, pairs: Sequence[Tokens]) -> float:
        """The mean loss a response token."""
        engine = self.engine
        (plan,) = plan_epoch(
            _lengths(pairs),
            world_size=engine.world_size,
            minibatches=1,
            token_budget=engine.section.microbatch_tokens,
            logit_chunk=engine.section.logit_chunk,
            seed=None,
        )
        tokens = sum(len(pair.response_ids) for pair in pairs)
        total = torch.zeros((), device=engine.device)
        for micro in plan.ranks[engine.rank]:
            total = total + self._loss(pairs, micro, Normaliser(tokens, len(pairs)))
        return float(add_over_ranks([total])[0])

    def _loss(self, pairs: Sequence[Tokens], micro: MicroBatch, whole: Normaliser) -> torch.Tensor:
        inputs = collate(
            [pairs[row] for row in micro.rows],
            family=self.engine.family,
            pad_id=self.pad_id,
            decoder_start_id=self.decoder_start_id,
        )
        output = self.engine.forward(inputs, 1.0, chunks=micro.chunks)
        carries = inputs.response_mask * pad_rows([[weight] for weight in micro.weights])
        return cross_entropy_loss(output.logprobs, token_weights(carries, "token_mean", whole).to(self.engine.device))


def _lengths(pairs: Sequence[Tokens]) -> list[tuple[int, int]]:
    return [(len(pair.prompt_ids), len(pair.response_ids)) for pair in pairs]
