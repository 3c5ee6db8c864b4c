"""Attention of one query a slot on the keys of that slot: the CPU's path, and the oracle of the GPU kernels.

Everything is a batch over slots. A slot without a row in a step is computed along and never read: what that costs is
bounded by the slots in use, and no key has to be moved to leave it out.
"""

import torch
from torch import Tensor


def attend(query: Tensor, keys: Tensor, context: Tensor, shortest: int, heads: Tensor, scale: float) -> Tensor:
    """sum_h u[h] a[h, j]: float32 [S, K].

    query [S, H, D]; keys [S, Hkv, D, K], in which those past `context` [S] (int64, at least 1) hold anything finite;
    shortest: the smallest of `context`; heads [H]: the weights u of this layer. Softmax over the whole context.
    """
    slots, count, depth = query.shape
    groups, length = keys.shape[1], keys.shape[3]
    grouped = (query * scale).view(slots, groups, count // groups, depth)
    scores = torch.matmul(grouped, keys).view(slots, count, length)
    if shortest < length:
        outside = torch.arange(shortest, length, device=keys.device) >= context.unsqueeze(1)
        scores[..., shortest:].masked_fill_(outside.unsqueeze(1), float("-inf"))
    return torch.matmul(heads, torch.softmax(scores, dim=-1))


def statistics(rows: Tensor, content: Tensor, salient: Tensor) -> Tensor:
    """M, C, E and X of rows [S, W]; content [S, W] is 1 or 0, salient [S, W] the weight w_j or 0. Returns [S, 4]."""
    inside = rows * content
    return torch.stack(
        (inside.sum(-1), (rows * salient).sum(-1), torch.xlogy(inside, inside).sum(-1), inside.amax(-1)), dim=-1
    )
