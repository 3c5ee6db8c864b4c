"""What a step says of itself: the part of its line in metrics.jsonl that the learner knows.

All of it follows from the batch and the weights; nothing is timed here, so that the line is reproducible where
invariant 5 applies.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learner.advantages import Advantages
from learner.batch import Batch
from learner.kl import k1, k3, kl_per_sequence
from learner.losses import explained_variance

ATTENTION_PARTS = ("coverage", "focus", "repeat")


def reward_metrics(batch: Batch) -> dict[str, float]:
    """`reward/*`: the combination, its spread within prompts, each source, and the parts of the attention reward."""
    within = [statistics.pstdev(values) for values in batch.rewards_by_group() if len(values) > 1]
    metrics = {
        **_mean_std("reward", batch.rewards),
        "reward/within_prompt_std": _mean(within),
        "reward/ok": float(len(batch.rewards)),
        "reward/failed": float(batch.failed),
    }
    sources = sorted({name for sample in batch.samples for name in sample.scores})
    for name in sources:
        values = [
            score.value
            for sample in batch.samples
            if (score := sample.scores.get(name)) is not None and score.value is not None
        ]
        if values:
            metrics |= _mean_std(f"reward/{name}", values)
        # An optional source that failed is left out of the combination: said here, for the reward itself is not failed.
        metrics[f"reward/{name}/failed"] = float(len(batch.samples) - len(values))
    for part in ATTENTION_PARTS:
        values = [
            float(score.detail[part])
            for sample in batch.samples
            if (score := sample.scores.get("attention")) is not None and isinstance(score.detail.get(part), int | float)
        ]
        if values:
            metrics[f"reward/{part}"] = _mean(values)
    return metrics


def length_metrics(batch: Batch) -> dict[str, float]:
    """`length/*`, tokens: of responses, where a key does not say prompt."""
    lengths = [len(item.response_ids) for item in batch.tokens]
    return {
        "length/mean": _mean(lengths),
        "length/min": float(min(lengths)),
        "length/max": float(max(lengths)),
        "length/response_tokens": float(sum(lengths)),
        "length/prompt_tokens": float(sum(len(item.prompt_ids) for item in batch.tokens)),
        "length/prompt_mean": _mean([len(item.prompt_ids) for item in batch.tokens]),
        "length/truncated_share": float(batch.truncated.float().mean()),
    }


def version_metrics(batch: Batch, step: int) -> dict[str, float]:
    """`staleness/*`: steps between the policy that drew a token and the one that trains on it, mean over tokens."""
    spans = [span for sample in batch.samples for span in sample.policy_versions]
    tokens = sum(count for _, _, count in spans)
    return {
        "staleness/mean": sum((step - at) * count for _, at, count in spans) / max(1, tokens),
        "staleness/max": float(max((step - at for _, at, _ in spans), default=0)),
        "version/incarnation_max": float(max((incarnation for incarnation, _, _ in spans), default=0)),
    }


def kl_metrics(batch: Batch, reference: Tensor, coef: float) -> dict[str, float]:
    """`kl/*` of the policy that drew the batch to the reference, nats.

    kl/reference         mean over responses of the sum of k1 over their tokens
    kl/reference_token   mean of k1 over tokens; kl/reference_k3 the same with k3, which is never negative
    """
    per_token = k1(batch.behaviour, reference)[batch.mask]
    return {
        "kl/reference": float(kl_per_sequence(batch.behaviour, reference, batch.mask).mean()),
        "kl/reference_token": float(per_token.mean()),
        "kl/reference_k3": float(k3(batch.behaviour, reference)[batch.mask].mean()),
        "kl/coef": coef,
    }


def advantage_metrics(batch: Batch, advantages: Advantages, values: Tensor | None) -> dict[str, float]:
    """`advantage/*` over the tokens that carry loss, `policy/entropy_sampled`, and `value/*` before the update."""
    inside = advantages.advantages[advantages.loss_mask]
    metrics = {
        "advantage/mean": float(inside.mean()) if inside.numel() else 0.0,
        "advantage/std": float(inside.std(unbiased=False)) if inside.numel() else 0.0,
        # -log pi of a token drawn from pi is an unbiased estimate of the entropy, and costs no second pass over logits.
        "policy/entropy_sampled": float(-batch.behaviour[batch.mask].mean()),
        "policy/loss_tokens": float(advantages.loss_mask.sum()),
    }
    if values is not None:
        seen = values[advantages.value_mask]
        metrics |= {
            "value/mean": float(seen.mean()) if seen.numel() else 0.0,
            "value/explained_variance": explained_variance(values, advantages.returns, advantages.value_mask),
        }
    return metrics


def sample_figures(
    batch: Batch, advantages: Advantages, reference: Tensor, values: Tensor | None, entropy: Tensor
) -> dict[str, dict[str, Any]]:
    """What the sample log says of each sample beside its record, by sample id.

    `kl_tokens` and `entropy_tokens` have one number a response token (nats): the KL of the policy that drew it to the
    reference, and the entropy of the trained policy's distribution where the step's first epoch met it.
    """
    by_token = k1(batch.behaviour, reference)

    def tokens(figure: Tensor, row: int) -> list[float]:
        return [float(f"{value:.5g}") for value in figure[row][batch.mask[row]].tolist()]

    kl = torch.where(batch.mask, by_token, 0.0).sum(1)
    counts = advantages.loss_mask.sum(1).clamp(min=1)
    mean = advantages.advantages.sum(1) / counts
    return {
        sample.sample_id: {
            "kl_reference": float(kl[row]),
            "kl_tokens": tokens(by_token, row),
            "entropy_tokens": tokens(entropy, row),
            "advantage": float(mean[row]),
            **({} if values is None else {"value": float(values[row, 0])}),
        }
        for row, sample in enumerate(batch.samples)
    }


def _mean_std(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}/mean": _mean(values), f"{name}/std": statistics.pstdev(values)}


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0
