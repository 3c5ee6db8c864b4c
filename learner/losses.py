"""Losses of the policy and the value function, as sums that add up over micro-batches and ranks.

Every tensor is [B, T], right-padded; what stands under padding is ignored (it may be anything, NaN included). A loss
is sum_{i,t} w_it l_it with the weights of `token_weights`, whose normaliser is the number of tokens or samples of the
whole minibatch on all ranks: the losses of a minibatch's shards add up to its loss, however it is cut.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum"]


@dataclass(frozen=True)
class Normaliser:
    """What a minibatch holds on all ranks together, counting only what carries loss."""

    tokens: int
    sequences: int


@dataclass(frozen=True)
class PolicyLoss:
    """`loss`, with its gradient; the rest are detached sums over tokens, to be divided by `tokens` after adding up.

    ratio        sum of r = pi / pi_old
    clipped      tokens whose gradient the clip has stopped
    approx_kl    sum of (r - 1) - log r, the k3 estimate of KL(pi_old || pi), nats
    ratio_max    the largest r here (a maximum, not a sum); 0 where there is no token
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    approx_kl: Tensor
    ratio_max: Tensor
    tokens: Tensor


def normaliser_of(mask: Tensor) -> Normaliser:
    """Tokens, and samples with at least one, of a [B, T] mask of what carries loss."""
    return Normaliser(tokens=int(mask.sum()), sequences=int(mask.any(1).sum()))


def token_weights(mask: Tensor, aggregation: Aggregation, whole: Normaliser) -> Tensor:
    """Weights w [B, T] (float, 0 outside `mask`) with loss = sum_{i,t} w_it l_it.

    token_mean     w = 1 / tokens               every token counts the same
    sequence_mean  w = 1 / (sequences T_i)      GRPO, arXiv 2402.03300 eq. 3: every response counts the same
    sequence_sum   w = 1 / sequences            the gradient of the response's log-likelihood (REINFORCE)

    `mask` [B, T] is bool or 0/1; T_i its tokens in row i. Zero everywhere where the minibatch holds no token.
    """
    mask = mask.to(torch.get_default_dtype()) if mask.dtype == torch.bool else mask
    if aggregation == "token_mean":
        return mask / max(1, whole.tokens)
    if aggregation == "sequence_mean":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / max(1, whole.sequences)
    return mask / max(1, whole.sequences)


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """sum w x, where w = 0 also silences a NaN or an infinity, in the gradient too."""
    return torch.where(weights > 0, values, 0.0).mul(weights).sum()


def ppo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor, *, clip: float) -> PolicyLoss:
    """The clipped surrogate, arXiv 1707.06347 eq. 7: -min(r A, clamp(r, 1-clip, 1+clip) A), r = exp(logp - logp_old).

    The minimum is over the two products, so for A < 0 it is the larger ratio that counts and the loss has no floor as
    the ratio grows. `old_logprobs` are the behaviour policy's, of the same distribution (invariant 7).
    """
    inside = weights > 0
    log_ratio = torch.where(inside, logprobs - old_logprobs, 0.0)
    ratio = torch.exp(log_ratio)
    advantages = torch.where(inside, advantages, 0.0)
    free = ratio * advantages
    held = ratio.clamp(1.0 - clip, 1.0 + clip) * advantages
    with torch.no_grad():
        tokens = inside.sum()
        ratio_sum = torch.where(inside, ratio, 0.0).sum()
        approx_kl = (torch.where(inside, torch.expm1(log_ratio), 0.0) - log_ratio).sum()
        ratio_max = torch.where(inside, ratio, 0.0).amax() if ratio.numel() else ratio.new_zeros(())
    return PolicyLoss(
        loss=-weighted_sum(torch.minimum(free, held), weights),
        ratio=ratio_sum,
        clipped=(held.detach() < free.detach()).sum(),
        approx_kl=approx_kl,
        ratio_max=ratio_max,
        tokens=tokens,
    )


def policy_gradient_loss(logprobs: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """-A log pi(y_t | x, y_<t): REINFORCE (Williams 1992) with whatever baseline is in A. On-policy: one epoch."""
    return -weighted_sum(logprobs * torch.where(weights > 0, advantages, 0.0), weights)


def value_loss(
    values: Tensor, returns: Tensor, weights: Tensor, *, old_values: Tensor | None = None, clip: float | None = None
) -> Tensor:
    """(V - G)^2 / 2; with `clip`, max of that and the same at V_old + clamp(V - V_old, -clip, clip).

    The clipped form is that of PPO's published code (arXiv 2005.12729 section 3). `weights`: the mean over the entries
    that have a target, `token_weights(value_mask, "token_mean", normaliser_of(value_mask of the minibatch))`.
    ValueError: `clip` without `old_values`.
    """
    inside = weights > 0
    values, returns = torch.where(inside, values, 0.0), torch.where(inside, returns, 0.0)
    error = (values - returns) ** 2
    if clip is not None:
        if old_values is None:
            raise ValueError("a clipped value loss needs old_values")
        old_values = torch.where(inside, old_values, 0.0)
        near = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (near - returns) ** 2)
    return 0.5 * weighted_sum(error, weights)


def entropy_loss(entropy: Tensor, weights: Tensor) -> Tensor:
    """-H, nats: times the entropy coefficient it is the bonus of arXiv 1707.06347 eq. 9."""
    return -weighted_sum(entropy, weights)


def cross_entropy_loss(logprobs: Tensor, weights: Tensor) -> Tensor:
    """-log pi of the tokens: supervised fine-tuning on the response."""
    return -weighted_sum(logprobs, weights)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(G - V) / Var(G) over the entries of `mask`; NaN-free: 0 where the returns do not vary."""
    inside = mask > 0
    target = returns[inside].double()
    if target.numel() == 0:
        return 0.0
    spread = target.var(unbiased=False)
    if spread <= 0:
        return 0.0
    return float(1 - (target - values[inside].double()).var(unbiased=False) / spread)
