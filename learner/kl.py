"""KL to the reference policy: estimators a token, the penalty in the reward, the loss, and the adaptive coefficient.

For one token y ~ pi, with d = log pi(y) - log ref(y), both conditioned on the same prefix (Schulman, "Approximating KL
divergence", 2020):

    k1 = d                      unbiased for KL(pi || ref), of either sign
    k3 = exp(-d) - 1 + d        unbiased for KL(pi || ref), never negative
"""

import json
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from learner.losses import weighted_sum


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log pi - log ref, nats, elementwise."""
    return logprobs - ref_logprobs


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(-d) - 1 + d with d = log pi - log ref, nats, elementwise. Its gradient in log pi is 1 - exp(-d)."""
    difference = logprobs - ref_logprobs
    return torch.expm1(-difference) + difference


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, coef: float) -> Tensor:
    """coef * k1 [B, T], 0 outside `mask`: what is taken from the reward a token (Ziegler 2019, arXiv 1909.08593 eq. 2).

    A number, without gradient: the behaviour policy's log-probabilities stand in it.
    """
    return torch.where(mask > 0, coef * k1(logprobs, ref_logprobs), 0.0).detach()


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, weights: Tensor) -> Tensor:
    """sum w k3 (GRPO, arXiv 2402.03300 eq. 4), to be multiplied by the coefficient. Gradient through log pi only."""
    inside = weights > 0
    # Before the exponential: infinity times 0 would be NaN in the gradient.
    return weighted_sum(
        k3(torch.where(inside, logprobs, 0.0), torch.where(inside, ref_logprobs, 0.0).detach()), weights
    )


def kl_per_sequence(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """sum_t k1 [B]: the estimate of KL(pi || ref) of whole responses, nats; what the controller steers."""
    return torch.where(mask > 0, k1(logprobs, ref_logprobs), 0.0).sum(1)


@dataclass(frozen=True)
class KLController:
    """The KL coefficient and, where it is adaptive, its rule (Ziegler 2019, arXiv 1909.08593 section 2.2):

        e = clamp(KL / target - 1, -0.2, 0.2)        coef <- coef (1 + e n / horizon)

    KL is the mean over the step's n samples of `kl_per_sequence`, nats. Part of the commit (invariant 8).
    """

    coef: float
    kind: Literal["fixed", "adaptive"] = "fixed"
    target: float = 6.0
    horizon: int = 10_000
    start: float | None = None
    """What the recipe had the coefficient begin with."""

    def under(self, coef: float, kind: Literal["fixed", "adaptive"], target: float, horizon: int) -> "KLController":
        """This controller under a recipe that may have changed: its coefficient goes on where it was moved and the
        recipe still begins with the same one; else it is the recipe's."""
        goes_on = self.kind == kind == "adaptive" and self.start in (None, coef)
        return KLController(self.coef if goes_on else coef, kind, target, horizon, coef)

    def update(self, kl: float, samples: int) -> "KLController":
        """The controller after a step of `samples` samples whose mean KL was `kl`."""
        if self.kind == "fixed":
            return self
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        return replace(self, coef=self.coef * (1.0 + error * samples / self.horizon))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "KLController":
        return cls(**json.loads(text))
