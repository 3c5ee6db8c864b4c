"""Attention of one query a slot on the keys of that slot: the CPU's path, and the oracle of the GPU kernels.

Everything is a batch over slots. A slot without a row in a step is computed along and never read: what that costs is
bounded by the slots in use, and no key has to be moved to leave it out.
"""

import torch
from torch import Tensor


def attend(query: Tensor, keys: Tensor, context: Tensor, heads: Tensor, scale: float, width: int) -> Tensor:
    """sum_h u[h] a[h, j] for j < width: float32 [S, width].

    query [S, H, D]; keys [S, Hkv, K, D], where keys past `context` [S] (int64, at least 1) hold anything finite;
    heads [H] are the weights u of this layer. The softmax is over the whole context, in float32 at least.
    """
    slots, count, depth = query.shape
    groups, length = keys.shape[1], keys.shape[2]
    query = (query * scale).view(slots, groups, count // groups, depth)
    scores = torch.matmul(query, keys.transpose(2, 3)).view(slots, count, length)
    outside = torch.arange(length, device=keys.device) >= context.unsqueeze(1)
    scores.masked_fill_(outside.unsqueeze(1), float("-inf"))
    # Through the log-sum-exp only the columns of the prompt are exponentiated twice, and nothing is divided.
    total = torch.logsumexp(scores, dim=-1, keepdim=True)
    weights = torch.exp(scores[..., :width] - total)
    return torch.matmul(heads, weights)


def statistics(rows: Tensor, content: Tensor, salient: Tensor) -> Tensor:
    """M, C, E and X of rows [S, W]; content [S, W] is 1 or 0, salient [S, W] the weight w_j or 0. Returns [S, 4]."""
    inside = rows * content
    return torch.stack(
        (inside.sum(-1), (rows * salient).sum(-1), torch.xlogy(inside, inside).sum(-1), inside.amax(-1)), dim=-1
    )
