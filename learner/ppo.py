"""One step of training: scored groups in, an updated policy and the step's metrics out.

The order of things: the frozen reference and the policy as it is score the batch; rewards are standardised and the KL
taken in batch order (invariant 8); advantages; then every epoch's minibatches. All ranks hold the whole batch, which is
small beside a model, and each runs the forward passes of its own share; what belongs to the whole batch (standardising,
advantages, metrics) is computed on every rank alike.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from learner.advantages import Advantages, Estimator, Experience, FinishLength, estimate
from learner.bad_batch import check_batch, flat_share
from learner.batch import Batch, batch_of
from learner.config import LearnerSection
from learner.drift import check, choose, differences
from learner.engine import Engine, Reference, add_over_ranks
from learner.errors import BadBatch, NonFinite
from learner.kl import KLController, kl_loss, kl_penalty, kl_per_sequence
from learner.losses import (
    Normaliser,
    entropy_loss,
    normaliser_of,
    policy_gradient_loss,
    ppo_loss,
    token_weights,
    value_loss,
)
from learner.metrics import (
    advantage_metrics,
    kl_metrics,
    length_metrics,
    reward_metrics,
    sample_figures,
    version_metrics,
)
from learner.microbatch import MicroBatch, collate, pad_rows, plan_epoch
from learner.policy import ModelInput
from learner.standardise import RunningStandardiser
from services.attention.capture import Recorder
from services.records import Group

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rules:
    """What the step needs to know beside the learner's section. `seed` is the run's."""

    seed: int
    temperature: float
    replay: bool
    finish_length: FinishLength
    pad_id: int
    decoder_start_id: int | None


@dataclass(frozen=True)
class TrainerState:
    """What a step leaves to the next beside the weights; part of the commit."""

    standardiser: RunningStandardiser
    controller: KLController

    @classmethod
    def start(cls, section: LearnerSection) -> "TrainerState":
        kl = section.kl
        return cls(RunningStandardiser(), KLController(kl.coef, kl.controller, kl.target, kl.horizon, kl.coef))

    def under(self, section: LearnerSection) -> "TrainerState":
        """A state that was committed, under the recipe as it is now."""
        kl = section.kl
        return replace(self, controller=self.controller.under(kl.coef, kl.controller, kl.target, kl.horizon))

    def to_dict(self) -> dict[str, Any]:
        return {"standardiser": json.loads(self.standardiser.to_json()), "controller": asdict(self.controller)}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "TrainerState":
        return cls(
            RunningStandardiser.from_json(json.dumps(state["standardiser"])),
            KLController.from_json(json.dumps(state["controller"])),
        )


@dataclass(frozen=True)
class StepResult:
    """`samples` are figures for the sample log, by sample id; `state` goes into the next step.

    `bad` says why the batch was not trained on, where it was not (`learner.bad_batch`).
    """

    metrics: dict[str, float]
    samples: dict[str, dict[str, Any]]
    state: TrainerState
    bad: str | None = None


@dataclass(frozen=True)
class _Targets:
    """What the updates of a step aim at; [B, T]. `values` are None without a value function."""

    advantages: Advantages
    reference: Tensor
    values: Tensor | None
    coef: float


def train_step(
    engine: Engine,
    reference: Reference,
    groups: Sequence[Group],
    step: int,
    rules: Rules,
    state: TrainerState,
    recorder: Recorder | None = None,
) -> StepResult:
    """One step on these groups, which are in lease order. Collective.

    Raises:
        BadBatch: the recipe stops at such a batch; the message names the step. NonFinite where a number is.
        DriftExceeded: rollouts and learner disagree by more than the recipe allows.
    """
    section = engine.section
    torch.manual_seed(seed_of(rules.seed, step))
    before = state
    try:
        batch = batch_of(groups, replay=rules.replay)
    except BadBatch as problem:
        return _left_out(_in_step(step, problem), {}, before, section, step)
    drift = {} if recorder is None else _drift(engine, recorder, batch, step, rules)
    ref_logprobs, values, next_values = _before(engine, reference, batch, rules)
    seen = {
        **reward_metrics(batch),
        "reward/flat_share": flat_share(batch),
        **length_metrics(batch),
        **version_metrics(batch, step),
        **drift,
    }
    kl = float(kl_per_sequence(batch.behaviour, ref_logprobs, batch.mask).mean())
    try:
        check_batch(batch, kl, section.bad_batch, rules.finish_length)
    except BadBatch as problem:
        return _left_out(_in_step(step, problem), seen, before, section, step)
    state = replace(state, standardiser=_taken(section, state.standardiser, batch.rewards))
    coef = 0.0 if section.kl.place == "none" else state.controller.coef
    penalty = kl_penalty(batch.behaviour, ref_logprobs, batch.mask, coef) if section.kl.place == "reward" else None
    scores = state.standardiser.apply(batch.rewards) if section.standardise_rewards == "running" else batch.rewards
    advantages = estimate(
        Experience(torch.tensor(scores), batch.mask, batch.groups, batch.truncated, penalty, values, next_values),
        estimator_of(section),
        gamma=section.gamma,
        lam=section.lam,
        finish_length=rules.finish_length,
        normalise=section.normalise_advantages,
    )
    targets = _Targets(advantages, ref_logprobs, values, coef)
    seen |= {
        **kl_metrics(batch, ref_logprobs, coef),
        **advantage_metrics(batch, advantages, values),
        "policy/lr": engine.learning_rate("policy"),
        **({} if values is None else {"value/lr": engine.learning_rate("value")}),
    }
    done = engine.updates_done
    after = replace(state, controller=state.controller.update(kl, len(batch.samples)))
    try:
        updates, entropy = _updates(engine, batch, targets, step, rules)
    except BadBatch as problem:
        if engine.updates_done == done:
            return _left_out(problem, seen, before, section, step)
        made = engine.updates_done - done
        problem = type(problem)(f"{problem}; updates that it had made before and that stay: {made}")
        return _left_out(problem, seen, after, section, step)
    return StepResult(
        metrics=_finite({**seen, "policy/skipped": 0.0, **updates}, step),
        samples=sample_figures(batch, advantages, ref_logprobs, values, entropy),
        state=after,
    )


def _in_step(step: int, problem: BadBatch) -> BadBatch:
    """The problem with the step's number."""
    return type(problem)(f"step {step}: {problem}")


def _left_out(
    problem: BadBatch, seen: dict[str, float], state: TrainerState, section: LearnerSection, step: int
) -> StepResult:
    """A step that was given up: `state` is that before it, or, where it had made updates, after it.

    Raises the problem where the recipe stops at one.
    """
    if section.bad_batch.action == "stop":
        raise problem
    return StepResult(_finite({**seen, "policy/skipped": 1.0}, step), {}, state, str(problem))


def _finite(metrics: dict[str, float], step: int) -> dict[str, float]:
    """Those that are finite. A loss that is not has stopped the update; a figure may be, of a sample that it is clipped
    at, and has no place among numbers."""
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    if missing := sorted(metrics.keys() - finite.keys()):
        log.warning("step %d: not finite, and left out of its metrics: %s", step, ", ".join(missing))
    return finite


def _drift(engine: Engine, recorder: Recorder, batch: Batch, step: int, rules: Rules) -> dict[str, float]:
    section = engine.section.drift
    order = [seed_of(rules.seed, step, sample.sample_id) for sample in batch.samples]
    found = differences(
        engine,
        recorder,
        batch,
        choose(batch, section.share, step, order),
        temperature=rules.temperature,
        pad_id=rules.pad_id,
        decoder_start_id=rules.decoder_start_id,
    )
    check(found, section, step)
    return found.metrics()


def estimator_of(section: LearnerSection) -> Estimator:
    """The name in `advantages` of what the section asks for."""
    return section.advantage if section.objective == "ppo" else section.baseline


def seed_of(*parts: object) -> int:
    """A seed that follows from its parts alone, the same in every process."""
    digest = hashlib.blake2b(":".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # torch takes signed 64 bits


def _taken(section: LearnerSection, standardiser: RunningStandardiser, rewards: Sequence[float]) -> RunningStandardiser:
    return standardiser.update(rewards) if section.standardise_rewards == "running" else standardiser


def _before(
    engine: Engine, reference: Reference, batch: Batch, rules: Rules
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Reference log-probabilities [B, T], and V [B, T] and V_T [B] under the weights before the update."""

    def frozen(inputs: ModelInput, chunks: int) -> tuple[Tensor, ...]:
        return (reference.logprobs(inputs, rules.temperature, chunks=chunks),)

    @torch.no_grad()
    def current(inputs: ModelInput, chunks: int) -> tuple[Tensor, ...]:
        output = engine.forward(inputs, rules.temperature, chunks=chunks)
        assert output.values is not None
        assert output.next_values is not None
        return output.values, output.next_values[:, None]

    (ref_logprobs,) = _pass(engine, batch, rules, frozen, 1)
    if not engine.section.needs_values:
        return ref_logprobs, None, None
    values, after = _pass(engine, batch, rules, current, 2)
    return ref_logprobs, values, after[:, 0]


def _pass(
    engine: Engine, batch: Batch, rules: Rules, forward: Callable[[ModelInput, int], tuple[Tensor, ...]], outputs: int
) -> list[Tensor]:
    """`forward` over the batch, shared among the ranks; `outputs` tensors [B, T] of all of it, 0 where padded."""
    (plan,) = plan_epoch(
        batch.lengths,
        world_size=engine.world_size,
        minibatches=1,
        token_budget=engine.section.microbatch_tokens,
        logit_chunk=engine.section.logit_chunk,
        seed=None,
    )
    whole = [torch.zeros(batch.mask.shape, device=engine.device) for _ in range(outputs)]
    for micro in plan.ranks[engine.rank]:
        results = forward(_inputs(batch, micro, engine, rules), micro.chunks)
        for into, result in zip(whole, results, strict=True):
            _put(into, micro, result)
    # Every sample was run by one rank alone, so the sum over ranks is exact.
    return [tensor.cpu() for tensor in add_over_ranks(whole)]


def _put(into: Tensor, micro: MicroBatch, rows: Tensor) -> None:
    """Rows [n, width] of a micro-batch in their places in [B, T], but for those that only keep the ranks in step."""
    counted = [at for at, weight in enumerate(micro.weights) if weight > 0]  # on the host: the device is not waited for
    places = torch.tensor([micro.rows[at] for at in counted], dtype=torch.long, device=into.device)
    into[places, : rows.shape[1]] = rows[torch.tensor(counted, dtype=torch.long, device=rows.device)].float()


def _inputs(batch: Batch, micro: MicroBatch, engine: Engine, rules: Rules) -> ModelInput:
    tokens = [batch.tokens[row] for row in micro.rows]
    return collate(tokens, family=engine.family, pad_id=rules.pad_id, decoder_start_id=rules.decoder_start_id)


def _updates(
    engine: Engine, batch: Batch, targets: _Targets, step: int, rules: Rules
) -> tuple[dict[str, float], Tensor]:
    """All epochs and minibatches of the step: its metrics, and the entropy [B, T] that the first epoch met, nats."""
    section = engine.section
    entropy = torch.zeros(batch.mask.shape, device=engine.device)
    totals: dict[str, Tensor] = {}
    first_error = torch.zeros(())
    ratio_max = torch.zeros(())
    norms: list[float] = []
    for epoch in range(section.epochs):
        plan = plan_epoch(
            batch.lengths,
            world_size=engine.world_size,
            minibatches=min(section.minibatches, len(batch.samples)),
            token_budget=section.microbatch_tokens,
            logit_chunk=section.logit_chunk,
            seed=seed_of(rules.seed, step, epoch),
        )
        for number, minibatch in enumerate(plan):
            rows = list(minibatch.rows)
            tokens = normaliser_of(targets.advantages.loss_mask[rows])
            values = normaliser_of(targets.advantages.value_mask[rows])
            mine = minibatch.ranks[engine.rank]
            for index, micro in enumerate(mine):
                losses, met = _micro_losses(engine, batch, targets, micro, rules, tokens, values)
                engine.backward(losses.pop("loss"), last=index == len(mine) - 1)
                error, largest = losses.pop("first_error"), losses.pop("ratio_max")
                if epoch == 0:
                    _put(entropy, micro, met)
                ratio_max = torch.maximum(ratio_max, largest.cpu())
                if epoch == number == 0:
                    first_error = torch.maximum(first_error, error.cpu())
                for name, value in losses.items():
                    totals[name] = totals.get(name, torch.zeros(())) + value.detach().cpu()
            try:
                norms.append(engine.update())
            except NonFinite as problem:
                raise NonFinite(f"step {step}, epoch {epoch}, minibatch {number}: {problem}") from problem
    metrics = _summary(engine, totals, ratio_max, first_error, norms)
    (entropy,) = add_over_ranks([entropy])
    return metrics, entropy.cpu()


def _micro_losses(
    engine: Engine,
    batch: Batch,
    targets: _Targets,
    micro: MicroBatch,
    rules: Rules,
    tokens: Normaliser,
    entries: Normaliser,
) -> tuple[dict[str, Tensor], Tensor]:
    """Losses of one micro-batch over counts of the minibatch; `loss` has the gradient, the rest are figures.

    And the entropy [rows, width] of the policy at each token.
    """
    section = engine.section
    inputs = _inputs(batch, micro, engine, rules)
    entropy = "gradient" if section.entropy_coef else "figure"
    output = engine.forward(inputs, rules.temperature, chunks=micro.chunks, entropy=entropy)
    rows, width = list(micro.rows), output.logprobs.shape[1]
    counts = pad_rows([[weight] for weight in micro.weights])  # 0: a sample that only keeps the ranks in step

    def part(tensor: Tensor) -> Tensor:
        return tensor[rows, :width].to(engine.device)

    carries = part(targets.advantages.loss_mask * 1.0) * counts.to(engine.device)
    weights = token_weights(carries, section.aggregation, tokens)
    old, advantages = part(batch.behaviour), part(targets.advantages.advantages)
    surrogate = ppo_loss(output.logprobs, old, advantages, weights, clip=section.clip)
    policy = surrogate.loss
    if section.objective == "policy_gradient":
        policy = policy_gradient_loss(output.logprobs, advantages, weights)
    loss = policy
    figures = {
        "policy/loss": policy,
        "ratio": surrogate.ratio,
        "clipped": surrogate.clipped,
        "approx_kl": surrogate.approx_kl,
        "tokens": surrogate.tokens,
    }
    if output.values is not None:
        assert targets.values is not None
        entry_weights = token_weights(
            part(targets.advantages.value_mask * 1.0) * counts.to(engine.device), "token_mean", entries
        )
        value = value_loss(
            output.values,
            part(targets.advantages.returns),
            entry_weights,
            old_values=part(targets.values),
            clip=section.value_clip,
        )
        loss = loss + section.value_coef * value
        figures["value/loss"] = value
    assert output.entropy is not None
    bonus = entropy_loss(output.entropy, weights)
    figures["policy/entropy"] = -bonus
    if section.entropy_coef:
        loss = loss + section.entropy_coef * bonus
    if section.kl.place == "loss":
        distance = kl_loss(output.logprobs, part(targets.reference), weights)
        loss = loss + targets.coef * distance
        figures["kl/loss"] = distance
    with torch.no_grad():
        figures["first_error"] = torch.where(weights > 0, (output.logprobs - old).abs(), 0.0).amax()
    return {"loss": loss, "ratio_max": surrogate.ratio_max, **figures}, output.entropy.detach()


def _summary(
    engine: Engine, totals: dict[str, Tensor], ratio_max: Tensor, first_error: Tensor, norms: list[float]
) -> dict[str, float]:
    """The updates' metrics over all ranks: losses are means over updates, the rest means over tokens."""
    names = sorted(totals)
    added = add_over_ranks([torch.stack([totals[name] for name in names]).float().to(engine.device)])[0].tolist()
    largest = torch.stack([ratio_max, first_error]).to(engine.device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    whole = dict(zip(names, added, strict=True))
    tokens = max(1.0, whole.pop("tokens"))
    return {
        "policy/ratio_mean": whole.pop("ratio") / tokens,
        "policy/ratio_max": float(largest[0]),
        # |log ratio| of unchanged weights: 0 up to rounding where rollout and learner agree (invariant 7).
        "policy/first_log_ratio_max": float(largest[1]),
        "policy/clip_share": whole.pop("clipped") / tokens,
        "policy/approx_kl": whole.pop("approx_kl") / tokens,
        "policy/grad_norm": sum(norms) / len(norms),
        "policy/updates": float(engine.updates_done),
        **{name: value / len(norms) for name, value in whole.items()},
    }
