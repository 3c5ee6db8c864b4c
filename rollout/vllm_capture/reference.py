"""Rows and statistics of `triton_kernels` in float64, a row at a time: what tests and benchmarks hold against it.

Takes the same paged tensors and knows nothing of tiles or splits.
"""

import torch
from torch import Tensor

from rollout.vllm_capture.attend import statistics


def reference_keys(keys: Tensor, blocks: Tensor, context: int) -> Tensor:
    """The first `context` keys of a request, float64 [Hkv, context, D].

    keys [blocks, Hkv, block size, D]; blocks: its row of the block table.
    """
    positions = torch.arange(context, device=keys.device)
    size = keys.shape[2]
    return keys[blocks[positions // size].long(), :, positions % size].double().transpose(0, 1)


def reference_scores(query: Tensor, keys: Tensor, blocks: Tensor, context: int, scale: float) -> Tensor:
    """Scaled scores of one query [H, D] on its context, float64 [H, context]."""
    held = reference_keys(keys, blocks, context)
    grouped = query.double().unflatten(0, (held.shape[0], -1))
    return (grouped @ held.transpose(1, 2)).flatten(0, 1) * scale


def reference_row(scores: Tensor, heads: Tensor, prompt: int, width: int) -> Tensor:
    """sum_h u[h] a[h, j] at the first `prompt` positions, float64 [width] with zeros beyond; scores [H, context]."""
    row = scores.new_zeros(width)
    weights = heads.double() @ torch.softmax(scores, dim=-1)
    row[:prompt] = weights[:prompt]
    return row


def reference_statistics(row: Tensor, content: Tensor, salient: Tensor) -> Tensor:
    """M, C, E and X of A[t, :] [W], float64 [4]; content [W] is 1 or 0, salient [W] the weight w_j or 0."""
    return statistics(row.double(), content.double(), salient.double())


def entropies(statistics: Tensor) -> Tensor:
    """h of statistics [..., 4], float64 [...]; NaN where M = 0, which the scorer leaves out."""
    mass, neg_entropy = statistics[..., 0].double(), statistics[..., 2].double()
    return torch.clamp(torch.log(mass) - neg_entropy / mass, min=0.0)
