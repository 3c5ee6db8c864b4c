"""Losses of models that score: one number an example, to be weighted and added up over micro-batches and ranks.

Scores are logits. Comparisons come as `scores` [C, K], `ranks` [C, K] (smaller is better, equal is no preference) and
`present` [C, K], which is False where a comparison has fewer than K responses; what stands there is ignored (it may be
anything, NaN included). Losses are in nats. `weighted_mean` divides by the weight of the whole minibatch, so the
losses of its shards add up to its loss, however it is cut.
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid


def bradley_terry(better: Tensor, worse: Tensor, probability: Tensor) -> Tensor:
    """[C]: cross-entropy of P(first preferred) = sigmoid(better - worse) with the label `probability` [C].

    1 is a plain label; a judge's own probability is a soft one, and 0.5 asks for equal scores.
    """
    margin = better - worse
    return -(probability * logsigmoid(margin) + (1.0 - probability) * logsigmoid(-margin))


def all_pairs(scores: Tensor, ranks: Tensor, present: Tensor, probability: Tensor) -> Tensor:
    """[C]: the mean of Bradley-Terry over all pairs of different rank in each comparison (arXiv 2203.02155 eq. 1).

    With K = 2 it is `bradley_terry`. `probability` [C] is that of every pair's better one. 0 where no pair differs.
    """
    scores = torch.where(present, scores, 0.0)
    counts = (ranks.unsqueeze(2) < ranks.unsqueeze(1)) & present.unsqueeze(2) & present.unsqueeze(1)  # [C, i, j]
    losses = bradley_terry(scores.unsqueeze(2), scores.unsqueeze(1), probability.view(-1, 1, 1))
    return (losses * counts).sum((1, 2)) / counts.sum((1, 2)).clamp(min=1)


def plackett_luce(scores: Tensor, ranks: Tensor, present: Tensor) -> Tensor:
    """[C]: -log P(the order) = -sum_i log(e^{s_i} / sum_{j not better than i} e^{s_j}) (Plackett 1975).

    Responses of one rank are each drawn from all that are left with them, Breslow's form (Biometrics 30, 1974): two
    that are tied are drawn to equal scores.
    """
    scores = torch.where(present, scores, 0.0)
    left = (ranks.unsqueeze(2) <= ranks.unsqueeze(1)) & present.unsqueeze(1)  # [C, i, j]: j is there when i is chosen
    # A response that is not there stands for itself, so that no row of the sum is empty.
    left = left | torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    rest = scores.unsqueeze(1).masked_fill(~left, float("-inf")).logsumexp(2)
    return ((rest - scores) * present).sum(1)


def squared_sum(scores: Tensor, present: Tensor) -> Tensor:
    """[C]: (sum of a comparison's scores)^2, which times a coefficient is added to the loss (arXiv 2312.09244).

    Preferences fix differences of scores alone; this draws each comparison's mean to 0.
    """
    return torch.where(present, scores, 0.0).sum(1) ** 2


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Elementwise, of sigmoid(logit) with a target in [0, 1]: a label, a rating, or a judge's probability."""
    return binary_cross_entropy_with_logits(logits, targets, reduction="none")


def squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    """Elementwise (sigmoid(logit) - target)^2."""
    return (torch.sigmoid(logits) - targets) ** 2


def weighted_mean(losses: Tensor, weights: Tensor, total: float) -> Tensor:
    """sum w l / total; w = 0 also silences a NaN or an infinity, in the gradient too. 0 where `total` is 0."""
    return torch.where(weights > 0, losses, 0.0).mul(weights).sum() / (total or 1.0)
