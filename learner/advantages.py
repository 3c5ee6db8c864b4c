"""Rewards to advantages and value targets, for a step's whole batch at once (before it is cut into shards).

Symbols: sample i of B has tokens t = 0 .. T_i-1 (`mask`), a score R_i, a penalty p_it a token (coef * k1, 0 where there
is none), values V_it read before y_t, and V_iT after its last token. V_i0 is V(x). Tensors are [B, T], right-padded;
results are 0 where padded. Nothing here has a gradient.

With one advantage for all tokens (`paper`, `rloo`, `grpo`, and the policy gradient's baselines) the penalty is summed
into the score:  R'_i = R_i - sum_t p_it.

`finish_reason: length` (a response that was cut off at the token limit):
    bootstrap  the episode goes on after the cut: GAE's last step takes V_iT for what is to come. Where one advantage
               stands for all tokens there is no next state to bootstrap from: the response as it stands was scored.
    mask       the sample carries no loss at all (arXiv 2503.14476 section 3.4, overlong filtering). Its score still
               counts in its group's and the batch's mean and deviation: it is a draw from the same policy, and leaving
               out the long ones would shift the baseline by selection.
"""

from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

Estimator = Literal["paper", "gae", "rloo", "grpo", "none", "batch_mean", "value"]
Normalisation = Literal["none", "batch", "group"]
FinishLength = Literal["bootstrap", "mask"]

_EPSILON = 1e-8


@dataclass(frozen=True)
class Experience:
    """A step's batch. `scores` are ok rewards only: a failed sample is not in the batch (invariant 2).

    scores       [B]      R_i
    mask         [B, T]   bool, tokens that exist
    groups       [B]      int64, samples of one prompt share a number
    truncated    [B]      bool, finish_reason == "length"
    penalty      [B, T]   p_it, or None
    values       [B, T]   V_it under the weights before the update, or None where no value function is used
    next_values  [B]      V_iT
    """

    scores: Tensor
    mask: Tensor
    groups: Tensor
    truncated: Tensor
    penalty: Tensor | None = None
    values: Tensor | None = None
    next_values: Tensor | None = None


@dataclass(frozen=True)
class Advantages:
    """advantages [B, T]; returns [B, T], the value function's targets, where `value_mask` (bool [B, T]) is set;
    `loss_mask` (bool [B, T]), the tokens that carry the policy's loss."""

    advantages: Tensor
    returns: Tensor
    value_mask: Tensor
    loss_mask: Tensor


def loss_mask_of(mask: Tensor, truncated: Tensor, finish_length: FinishLength) -> Tensor:
    """The tokens [B, T] of `mask` that carry a loss."""
    return mask & ~truncated[:, None] if finish_length == "mask" else mask


@torch.no_grad()
def estimate(
    experience: Experience,
    estimator: Estimator,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    finish_length: FinishLength = "bootstrap",
    normalise: Normalisation = "none",
) -> Advantages:
    """Advantages and value targets, computed in float64 and given in the dtype of the scores.

    In float32 the mean of equal scores may be off by its last bit, which then is their deviation, too: divided by it,
    advantages would be of the order of 1 where nothing is to be learnt.

    none        A = R'
    batch_mean  A = R' - mean over the batch
    value,
    paper       A = R' - V(x)           target of V(x): R'     (arXiv 2502.10482: one for all tokens, no whitening)
    rloo        A = R' - mean of the group's others            (arXiv 2402.14740)
    grpo        A = (R' - mean) / (std + 1e-8) of the group    (arXiv 2402.03300; the population's std)
    gae         A_t = sum_k (gamma lam)^k delta_{t+k}          (arXiv 1506.02438), target A_t + V_t

    A group of one has rloo undefined: ValueError; grpo gives it 0. ValueError: values missing where they are needed.
    """
    dtype = experience.scores.dtype
    experience = _doubled(experience)
    mask = experience.mask.bool()
    loss_mask = loss_mask_of(mask, experience.truncated, finish_length)
    values = experience.values
    if estimator in ("paper", "value", "gae") and values is None:
        raise ValueError(f"advantage {estimator} needs values")
    if estimator == "gae":
        advantages, returns = _gae(experience, gamma, lam, finish_length)
        value_mask = loss_mask
    else:
        total = _total(experience)
        single = _single(total, experience, estimator)
        advantages = single[:, None].expand(mask.shape)
        returns = total[:, None].expand(mask.shape)
        # V(x) is the one value that is used, and so the one that is trained.
        value_mask = torch.zeros_like(mask)
        if estimator in ("paper", "value"):
            value_mask[:, 0] = loss_mask[:, 0]
    advantages = torch.where(mask, advantages, 0.0)
    if normalise != "none":
        groups = experience.groups if normalise == "group" else torch.zeros_like(experience.groups)
        advantages = _normalise(advantages, loss_mask, groups)
    return Advantages(
        advantages=torch.where(loss_mask, advantages, 0.0).to(dtype),
        returns=torch.where(value_mask, returns, 0.0).to(dtype),
        value_mask=value_mask,
        loss_mask=loss_mask,
    )


def _doubled(experience: Experience) -> Experience:
    def double(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double()

    return replace(
        experience,
        scores=experience.scores.double(),
        penalty=double(experience.penalty),
        values=double(experience.values),
        next_values=double(experience.next_values),
    )


def _total(experience: Experience) -> Tensor:
    """R' [B]: the score less the whole penalty."""
    if experience.penalty is None:
        return experience.scores
    return experience.scores - torch.where(experience.mask.bool(), experience.penalty, 0.0).sum(1)


def _single(total: Tensor, experience: Experience, estimator: Estimator) -> Tensor:
    """The one advantage of each response, [B]."""
    if estimator == "none":
        return total
    if estimator == "batch_mean":
        return total - total.mean()
    if estimator in ("paper", "value"):
        assert experience.values is not None
        return total - experience.values[:, 0]
    index = _index_of(experience.groups)
    count = torch.bincount(index).to(total.dtype)
    sums = torch.zeros_like(count).index_add(0, index, total)
    if estimator == "rloo":
        if bool((count < 2).any()):
            raise ValueError("rloo needs at least two samples of each group")
        return total - (sums[index] - total) / (count[index] - 1)
    centred = total - (sums / count)[index]
    deviation = (torch.zeros_like(count).index_add(0, index, centred**2) / count).sqrt()
    return centred / (deviation[index] + _EPSILON)


def _gae(experience: Experience, gamma: float, lam: float, finish_length: FinishLength) -> tuple[Tensor, Tensor]:
    """delta_t = r_t + gamma V_{t+1} - V_t, r_t = -p_t + [t = T-1] R; V_T is 0 at an end of sequence."""
    mask = experience.mask.bool()
    assert experience.values is not None
    values = torch.where(mask, experience.values, 0.0)
    lengths = mask.sum(1)
    batch = torch.arange(len(lengths), device=mask.device)
    rewards = torch.zeros_like(values)
    if experience.penalty is not None:
        rewards = -torch.where(mask, experience.penalty, 0.0).to(values.dtype)
    rewards[batch, lengths - 1] += experience.scores.to(values.dtype)
    following = torch.zeros_like(values)
    following[:, :-1] = values[:, 1:]
    if finish_length == "bootstrap" and bool(experience.truncated.any()):
        if experience.next_values is None:
            raise ValueError("finish_length: bootstrap needs the value after the last token")
        after = torch.where(experience.truncated, experience.next_values.to(values.dtype), 0.0)
        following[batch, lengths - 1] = after
    delta = torch.where(mask, rewards + gamma * following - values, 0.0)
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):  # padding has delta 0 and comes first, so the sum starts at T_i-1
        running = delta[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages, advantages + values


def _index_of(groups: Tensor) -> Tensor:
    """The groups renumbered from 0, [B]."""
    known = cast(Tensor, torch.unique(groups))  # pyright: ignore[reportUnknownMemberType]
    return torch.searchsorted(known, groups)


def _normalise(advantages: Tensor, mask: Tensor, groups: Tensor) -> Tensor:
    """(A - mean) / (std + 1e-8) over the tokens of `mask` in each group (the population's std)."""
    index = _index_of(groups)
    kept = mask.to(advantages.dtype)
    zeros = advantages.new_zeros(int(index.max()) + 1)
    count = zeros.index_add(0, index, kept.sum(1)).clamp(min=1)
    mean = (zeros.index_add(0, index, (advantages * kept).sum(1)) / count)[index]
    centred = (advantages - mean[:, None]) * kept
    deviation = (zeros.index_add(0, index, (centred**2).sum(1)) / count).sqrt()[index]
    return centred / (deviation[:, None] + _EPSILON)
