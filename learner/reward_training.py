"""Training a model that scores: minibatches of whole examples through the engine, evaluated and stopped early.

The held-out figures are computed from all ranks' scores on every rank, so that all of them decide alike when to keep
the weights and when to stop. What a held-out example scores depends on nothing but its input.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from learner import reward_losses as losses
from learner.engine import Engine, add_over_ranks
from learner.errors import NonFinite
from learner.microbatch import MicroBatch, Minibatch, plan_epoch
from learner.ppo import seed_of
from learner.reward_examples import Example, prepared
from learner.reward_metrics import (
    binary_accuracy,
    calibration,
    error_by_range,
    pair_accuracy,
    probe_order,
    sigmoid,
    spearman,
)
from learner.reward_model_config import RewardModelSection
from learner.scoring_model import ScoringInput
from learner.sft import epoch_order

Scores = list[list[float]]
"""Of each example: a logit an input, or the probability that it is correct of each step."""


@dataclass(frozen=True)
class Report:
    """One evaluation. `train_loss` is the mean since the one before; figures of `held_out` are by name, empty without
    held-out examples; `best` says that these weights were kept."""

    stage: str
    epoch: int
    updates: int
    train_loss: float
    held_out: dict[str, Any]
    best: bool


@dataclass(frozen=True)
class Data:
    """`probes` are comparisons of four, in the order that `learner.reward_metrics.PROBES` says."""

    train: Sequence[Example]
    pretrain: Sequence[Example]
    held_out: Sequence[Example]
    probes: Sequence[Example]


def updates_of(data: Data, section: RewardModelSection) -> int:
    """Optimiser updates of a whole training, if it is not stopped early; all epochs have the same number."""
    main, cheap = (_minibatches(examples, section) for examples in (prepared(data.train, section, 0), data.pretrain))
    return section.epochs * main + section.pretrain.epochs * cheap


@dataclass(frozen=True)
class Progress:
    """Where a training stands after an evaluation: what it needs beside the engine's state to go on from there.

    `minibatches` of the epoch are done. `kept` are the figures of the best weights, whose loss is `best`; `waited`
    evaluations since were no better, and `stopped` says that these were enough. `reports` evaluations were reported.
    """

    stage: str
    epoch: int
    minibatches: int
    updates: int
    reports: int
    best: float | None = None
    waited: int = 0
    kept: dict[str, Any] = field(default_factory=dict)
    stopped: bool = False


def train_scores(
    engine: Engine,
    data: Data,
    section: RewardModelSection,
    *,
    seed: int,
    pad_id: int,
    keep: Callable[[], None],
    save: Callable[[Progress], None],
    on_report: Callable[[Report], None],
    start: Progress | None = None,
) -> dict[str, Any]:
    """All epochs, the cheap preferences' first; returns the figures of the weights that were kept. Collective.

    `keep` is called on every rank when the weights are the best so far (by held-out loss; at the end where nothing is
    held out), and writes them; `save` after every evaluation. `start`: the progress that `save` was last given, the
    engine being where it was then; None: from the beginning.

    Raises:
        NonFinite: names the stage, the epoch and the minibatch; or no held-out loss was a number.
        ValueError: no training examples.
    """
    if not data.train:
        raise ValueError("there are no training examples")
    run = _Run(engine, section, seed, pad_id)
    at = start or Progress("", 0, 0, 0, 0)
    epochs = [("pretrain", epoch) for epoch in range(section.pretrain.epochs if data.pretrain else 0)]
    epochs += [("train", epoch) for epoch in range(section.epochs)]
    for stage, epoch in epochs[epochs.index((at.stage, at.epoch)) if start else 0 :]:
        if at.stopped:
            break
        examples = prepared(data.train, section, seed_of(seed, epoch)) if stage == "train" else data.pretrain
        done = at.minibatches if (stage, epoch) == (at.stage, at.epoch) else 0
        for minibatches, loss in run.epoch(examples, stage, epoch, done=done):
            figures = run.figures(data.held_out)
            lowest = math.inf if at.best is None else at.best
            better = stage == "train" and bool(figures) and figures["loss"] < lowest
            if better:
                keep()
                kept = {"updates": engine.updates_done, **figures, **run.probe(data.probes)}
                at = replace(at, best=figures["loss"], waited=0, kept=kept)
            elif stage == "train":
                at = replace(at, waited=at.waited + 1)
            on_report(Report(stage, epoch, engine.updates_done, loss, figures, best=better))
            at = replace(
                at,
                stage=stage,
                epoch=epoch,
                minibatches=minibatches,
                updates=engine.updates_done,
                reports=at.reports + 1,
                stopped=bool(data.held_out and section.patience and at.waited >= section.patience),
            )
            save(at)
            if at.stopped:
                break
    if not data.held_out:
        keep()
        at = replace(at, kept={"updates": engine.updates_done})
    if not at.kept:
        raise NonFinite("reward model: no held-out loss was a finite number, so no weights were kept")
    return {**at.kept, "stopped_early": at.stopped}


@dataclass(frozen=True)
class _Run:
    engine: Engine
    section: RewardModelSection
    seed: int
    pad_id: int

    def epoch(self, examples: Sequence[Example], stage: str, epoch: int, *, done: int) -> Iterator[tuple[int, float]]:
        """Trains on every example once, but for those of the first `done` minibatches; yields (minibatches done, mean
        loss since the last) as often as the section evaluates."""
        engine = self.engine
        count = _minibatches(examples, self.section)
        order = epoch_order(_lengths(examples), count, seed_of(self.seed, epoch))
        ordered = [examples[row] for row in order]
        plan = self._plan(ordered, count)
        every = math.ceil(count / self.section.evaluations)
        total, seen = torch.zeros((), dtype=torch.float64), 0
        for number, minibatch in enumerate(plan[done:], start=done):
            weight = sum(sum(ordered[row].weights) for row in minibatch.rows)
            mine = minibatch.ranks[engine.rank]
            for index, micro in enumerate(mine):
                loss = self._loss(ordered, micro, weight)
                total += loss.detach().cpu().double()
                engine.backward(loss, last=index == len(mine) - 1)
            try:
                engine.update()
            except NonFinite as problem:
                raise NonFinite(f"reward model, {stage}, epoch {epoch}, minibatch {number}: {problem}") from problem
            seen += 1
            if seen == every or number == count - 1:
                yield number + 1, float(add_over_ranks([total.to(engine.device)])[0]) / seen
                total, seen = torch.zeros((), dtype=torch.float64), 0

    @torch.no_grad()
    def scores(self, examples: Sequence[Example], *, loss_too: bool = True) -> tuple[Scores, float]:
        """Every example's scores, and the mean loss (0 where it is not asked for); the same on all ranks."""
        engine = self.engine
        (plan,) = self._plan(examples, 1)
        starts = [0]
        for example in examples:
            starts.append(starts[-1] + len(example.step_ends or example.inputs))
        found = torch.zeros(starts[-1])
        weight = sum(sum(example.weights) for example in examples)
        loss = torch.zeros(())
        for micro in plan.ranks[engine.rank]:
            mine = [examples[row] for row in micro.rows]
            logits = engine.score(self._collate(mine)).cpu()
            if loss_too:
                loss = loss + self._loss_of(logits, mine, micro.weights, weight)
            place = 0
            for index, (row, counts) in enumerate(zip(micro.rows, micro.weights, strict=True)):
                example = examples[row]
                if example.step_ends:
                    own = logits[index, : len(example.step_ends)].softmax(-1)[:, -1]
                else:
                    own = logits[place : place + len(example.inputs)]
                    place += len(example.inputs)
                if counts:
                    found[starts[row] : starts[row + 1]] = own
        everywhere, total = (part.cpu() for part in add_over_ranks([found.to(engine.device), loss.to(engine.device)]))
        values = everywhere.tolist()
        return [values[a:b] for a, b in pairwise(starts)], float(total)

    def figures(self, examples: Sequence[Example]) -> dict[str, Any]:
        if not examples:
            return {}
        scores, loss = self.scores(examples)
        return {"loss": loss, **held_out_figures(examples, scores, self.section.shape)}

    def probe(self, probes: Sequence[Example]) -> dict[str, Any]:
        if not probes:
            return {}
        scores, _ = self.scores(probes, loss_too=False)  # four answers to a prompt, whatever is learnt
        return {"probes": {"prompts": len(probes), **probe_order(scores)}}

    def _plan(self, examples: Sequence[Example], minibatches: int) -> tuple[Minibatch, ...]:
        section = self.engine.section
        return plan_epoch(
            _lengths(examples),
            world_size=self.engine.world_size,
            minibatches=minibatches,
            token_budget=section.microbatch_tokens,
            logit_chunk=section.logit_chunk,
            seed=None,
        )

    def _loss(self, examples: Sequence[Example], micro: MicroBatch, weight: float) -> Tensor:
        mine = [examples[row] for row in micro.rows]
        return self._loss_of(self.engine.score(self._collate(mine)), mine, micro.weights, weight)

    def _collate(self, examples: Sequence[Example]) -> ScoringInput:
        rows = [ids for example in examples for ids in example.inputs]
        steps = [example.step_ends for example in examples if example.step_ends]
        return ScoringInput(
            input_ids=_padded(rows, self.pad_id),
            attention_mask=_padded([[1] * len(row) for row in rows], 0),
            step_ends=_padded(steps, 0) if steps else None,
        )

    def _loss_of(self, logits: Tensor, examples: Sequence[Example], counts: Sequence[float], total: float) -> Tensor:
        """The part of a minibatch's mean loss that these examples carry; `counts` 0 silences one."""
        section, device = self.section, logits.device
        weights = [[weight * own for weight in example.weights] for example, own in zip(examples, counts, strict=True)]
        if section.shape == "steps":
            targets = _padded([[int(target) for target in example.targets] for example in examples], 0).to(device)
            each = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            return losses.weighted_mean(each, _padded(weights, 0.0, torch.float32).to(device), total)
        flat = torch.tensor([weight for row in weights for weight in row], device=device)
        if section.shape == "ratings":
            targets = torch.tensor([example.targets[0] for example in examples], device=device)
            loss = losses.binary_cross_entropy if section.rating_loss == "bce" else losses.squared_error
            return losses.weighted_mean(loss(logits, targets), flat, total)
        return losses.weighted_mean(self._comparisons(logits, examples), flat, total)

    def _comparisons(self, logits: Tensor, examples: Sequence[Example]) -> Tensor:
        device = logits.device
        ranks = _padded([[int(target) for target in example.targets] for example in examples], 0).to(device)
        present = _padded([[1] * len(example.inputs) for example in examples], 0).bool().to(device)
        scores = logits.new_zeros(present.shape).masked_scatter(present, logits)
        if self.section.comparison_loss == "plackett_luce":
            each = losses.plackett_luce(scores, ranks, present)
        else:
            probability = torch.tensor([example.probability for example in examples], device=device)
            each = losses.all_pairs(scores, ranks, present, probability)
        if self.section.centring:
            each = each + self.section.centring * losses.squared_sum(scores, present)
        return each


def held_out_figures(examples: Sequence[Example], scores: Scores, shape: str) -> dict[str, Any]:
    """By what was learnt: `accuracy`, `rank_correlation`, `calibration_error` with its bins, `error_by_range`.

    Comparisons: accuracy over pairs, calibration of P(better preferred) of those of two. Ratings: of the sigmoid,
    rank correlation with the rating. Steps: of P(correct), the neutral ones left out.
    """
    if shape == "comparisons":
        decided = [i for i, each in enumerate(examples) if each.probability != 0.5 and len(set(each.targets)) > 1]
        figures: dict[str, Any] = {}
        if decided:  # where all are ties, none can be right
            figures["accuracy"] = pair_accuracy([scores[i] for i in decided], [examples[i].targets for i in decided])
        two = [(row, example) for row, example in zip(scores, examples, strict=True) if len(row) == 2]
        # Of every pair both ways round: which response is the first says nothing.
        sides = [
            (sigmoid(sign * (row[0] - row[1])), p if (sign > 0) == (example.targets[0] < example.targets[1]) else 1 - p)
            for row, example in two
            for sign, p in ((1, example.probability), (-1, example.probability))
        ]
        return figures | _calibrated([side for side, _ in sides], [label for _, label in sides])
    if shape == "ratings":
        predicted = [sigmoid(row[0]) for row in scores]
        labels = [example.targets[0] for example in examples]
    else:
        known = [
            (value, float(target == 2.0))
            for row, example in zip(scores, examples, strict=True)
            for value, target in zip(row, example.targets, strict=True)
            if target != 1.0
        ]
        predicted, labels = [value for value, _ in known], [label for _, label in known]
    figures = {"error_by_range": [asdict(each) for each in error_by_range(predicted, labels)]} if labels else {}
    if any(label != 0.5 for label in labels):
        figures["accuracy"] = binary_accuracy(predicted, labels)
    correlation = spearman(predicted, labels)
    return figures | {"rank_correlation": correlation} | _calibrated(predicted, labels)


def _calibrated(predicted: Sequence[float], labels: Sequence[float]) -> dict[str, Any]:
    if not predicted:
        return {}
    error, bins = calibration(predicted, labels)
    return {"calibration_error": error, "calibration": [asdict(each) for each in bins]}


def _minibatches(examples: Sequence[Example], section: RewardModelSection) -> int:
    return math.ceil(len(examples) / section.batch_size)


def _lengths(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """Padded tokens of each example: all its inputs are in one forward."""
    return [(len(example.inputs) * max(map(len, example.inputs)), 0) for example in examples]


def _padded(rows: Sequence[Sequence[float]], fill: float, dtype: torch.dtype = torch.int64) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype)
