"""The learner's engine: what is trained, under DeepSpeed ZeRO-3, one optimiser update at a time.

It is a policy with its value function, or a model that scores.

The losses that come in are sums over this rank's micro-batch divided by counts of the whole minibatch on all ranks, so
an update does not depend on how a minibatch is cut. DeepSpeed averages gradients over the ranks; they are to be added.
"""

import logging
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from learner.config import LearnerSection
from learner.errors import NonFinite
from learner.microbatch import Family
from learner.policy import (
    Entropy,
    ModelInput,
    PolicyOutput,
    PolicyWithValue,
    enable_gradient_checkpointing,
    parameter_groups,
)
from learner.reshard import resharded
from learner.scoring_model import ScoringInput, ScoringModel
from learner.zero import deepspeed_config

# DeepSpeed calls collectives under the names torch has just renamed, and torch warns at every call.
warnings.filterwarnings("ignore", message=r".*torch\.distributed\..*is deprecated", category=FutureWarning)


def _worth_saying(record: logging.LogRecord) -> bool:
    # The policy's output is a dataclass, which ZeRO-3 does not look into; it has no need to, for `PolicyWithValue` owns
    # no parameter itself, and the modules that do return tensors.
    return "unknown inputs or outputs type" not in record.getMessage()


logging.getLogger("DeepSpeed").addFilter(_worth_saying)

ADAM_SETTINGS = ("betas", "eps", "weight_decay")


class Engine:
    """A model that is trained. Every method is collective: all ranks call it, in the same order.

    `updates` is the run's number of optimiser updates, for the schedule; None where the schedule does not ask for it.
    """

    def __init__(
        self, policy: PolicyWithValue | ScoringModel, section: LearnerSection, *, updates: int | None, device: str
    ) -> None:
        import deepspeed

        if section.gradient_checkpointing:
            enable_gradient_checkpointing(policy)
        self.section = section
        self.device = device
        self.family: Family = "encoder-decoder" if policy.encoder_decoder else "decoder"
        self.updates_done = 0
        self._updates = updates
        if section.schedule != "constant" and updates is None:
            raise ValueError(f"learner.schedule {section.schedule} needs the number of updates of the run")
        rates = {"policy": section.lr, "value": section.value_lr}
        named = {kind: group for kind, group in parameter_groups(policy).items() if group}
        self._rates = [rates[kind] for kind in named]
        self._kinds = tuple(named)
        optimizer = torch.optim.AdamW(
            [{"params": [p for _, p in group], "lr": rates[kind]} for kind, group in named.items()],
            betas=section.betas,
            eps=section.eps,
            weight_decay=section.weight_decay,
            fused=True,
        )
        count = sum(p.numel() for p in policy.parameters())
        self._engine: Any
        self._optimizer: Any
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=policy,
            optimizer=optimizer,
            config=deepspeed_config(section, count, trained=True),
            dist_init_required=False,
        )
        self._engine.train(section.gradient_checkpointing)
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()

    @property
    def policy(self) -> PolicyWithValue:
        return self._engine.module

    @property
    def lm(self) -> nn.Module:
        return self._engine.module.lm

    def forward(self, batch: ModelInput, temperature: float, *, chunks: int, entropy: Entropy = None) -> PolicyOutput:
        return self._engine(batch.to(self.device), temperature, chunks=chunks, entropy=entropy)

    def score(self, batch: ScoringInput) -> Tensor:
        """The forward of a `ScoringModel`."""
        return self._engine(batch.to(self.device))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradient of this rank's micro-batch; `last` of the minibatch.

        A loss that is not finite may have a gradient that is (of what it was clipped to): it is made not to be, so that
        no rank takes the step.
        """
        factor = torch.where(torch.isfinite(loss.detach()), float(self.world_size), math.nan)
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * factor, scale_wrt_gas=False)

    def update(self) -> float:
        """One optimiser update from what was added up. Returns the global norm of the gradient before clipping.

        Raises:
            NonFinite: on every rank alike; the weights are as they were before.
        """
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self.schedule(self.updates_done)
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        if not math.isfinite(norm):
            raise NonFinite(
                f"the gradient of update {self.updates_done} is not finite; the weights were left as they were"
            )
        self.updates_done += 1
        return norm

    def learning_rate(self, kind: Literal["policy", "value"] = "policy") -> float:
        """The rate of the next update; 0 where there is no such group."""
        if kind not in self._kinds:
            return 0.0
        return self._rates[self._kinds.index(kind)] * self.schedule(self.updates_done)

    def schedule(self, update: int) -> float:
        """The factor of the learning rates at an update, counted from 0."""
        section = self.section
        if update < section.warmup:
            return (update + 1) / (section.warmup + 1)
        if section.schedule == "constant":
            return 1.0
        assert self._updates is not None
        progress = min(1.0, (update - section.warmup) / max(1, self._updates - section.warmup))
        return 1.0 - progress if section.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))

    def save(self, directory: str) -> None:
        """Weights, optimiser state and DeepSpeed's counters, each rank its part, under `directory`/engine."""
        self._engine.save_checkpoint(directory, tag="engine", save_latest=False)

    def load(self, directory: str, *, updates_done: int, ranks: int) -> None:
        """What `save` wrote on so many ranks: bit for bit, here on as many or on another number."""
        if ranks != self.world_size:
            with resharded(directory, self._engine, self._optimizer) as own:
                self.load(own, updates_done=updates_done, ranks=self.world_size)
            return
        # The moments are the checkpoint's, how they are used is the recipe's, which may have changed.
        settings = [{key: group[key] for key in ADAM_SETTINGS} for group in self._optimizer.param_groups]
        path, _ = self._engine.load_checkpoint(directory, tag="engine", load_lr_scheduler_states=False)
        if path is None:
            raise FileNotFoundError(f"{directory}/engine holds no engine state")
        for group, own in zip(self._optimizer.param_groups, settings, strict=True):
            group.update(own)
        self.updates_done = updates_done


class Reference:
    """The frozen policy that the KL is measured against: a second ZeRO-3 module, never trained."""

    def __init__(self, policy: PolicyWithValue, section: LearnerSection, *, device: str) -> None:
        import deepspeed

        policy.requires_grad_(False)
        count = sum(p.numel() for p in policy.parameters())
        self.device = device
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(
            model=policy, config=deepspeed_config(section, count, trained=False), dist_init_required=False
        )
        self._engine.eval()

    @torch.no_grad()
    def logprobs(self, batch: ModelInput, temperature: float, *, chunks: int) -> Tensor:
        """[B, T]; collective."""
        return self._engine(batch.to(self.device), temperature, chunks=chunks).logprobs


def add_over_ranks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums over ranks of tensors of the same shapes everywhere, in one collective; float32."""
    flat = torch.cat([tensor.detach().float().reshape(-1) for tensor in tensors])
    torch.distributed.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def texts_of_ranks(text: str, device: str) -> list[str]:
    """What each rank says, by rank. Collective; torch's own gathering of objects would unpickle them."""
    said = text.encode()
    ranks = torch.distributed.get_world_size()
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    torch.distributed.all_gather(lengths, torch.tensor([len(said)], device=device))
    longest = max(int(length) for length in lengths)
    mine = torch.zeros(longest, dtype=torch.uint8, device=device)
    mine[: len(said)] = torch.tensor(list(said), dtype=torch.uint8)
    parts = [torch.empty_like(mine) for _ in range(ranks)]
    torch.distributed.all_gather(parts, mine)
    return [bytes(part[: int(length)].tolist()).decode() for part, length in zip(parts, lengths, strict=True)]
