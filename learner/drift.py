"""Drift: what rollout engines recorded against the learner's own forward pass, before the step's first update.

Two programs compute the same policy: an engine that decodes and the learner that trains. Where they disagree,
importance ratios are wrong and the reward is another than the one that was meant; nothing else in a run shows it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from learner.batch import Batch
from learner.config import DriftSection
from learner.engine import Engine
from learner.microbatch import collate
from services.attention.capture import Recorder, attach, reduce_rows
from services.attention.config import CaptureSection, resolve_capture
from services.attention.modules import find_modules
from services.models import decoder_start_of, family_of
from services.records import Attention


class DriftExceeded(Exception):  # noqa: N818 - reads as what it says where it is raised
    """Rollouts and learner disagree by more than the recipe allows."""


@dataclass(frozen=True)
class Differences:
    """Largest absolute differences over responses, the mean of exp(learner's - recorded log-probability), a count."""

    logprob: float
    attention: float
    ratio: float
    responses: int

    def metrics(self) -> dict[str, float]:
        if self.responses == 0:
            return {"drift/responses": 0.0}
        return {
            "drift/responses": float(self.responses),
            "drift/logprob_max": self.logprob,
            "drift/attention_max": self.attention,
            "drift/ratio_mean": self.ratio,
        }


def watch_attention(lm: PreTrainedModel, capture: CaptureSection) -> Recorder:
    """Taps the captured layers of the learner's model, which must have been loaded with the capturing attention.

    To be called before the model's parameters are partitioned: it runs a forward pass to find the layers.
    """
    family = family_of(lm.config)
    start = decoder_start_of(lm) if family == "encoder-decoder" else None
    found = find_modules(lm, family, start)
    captured = resolve_capture(capture, len(found.modules), found.heads)
    return attach([found.modules[layer] for layer in captured.layers], captured, lm.device)


def choose(batch: Batch, share: float, step: int, order: Sequence[int]) -> list[int]:
    """Rows of the batch to recompute: of the responses that the weights of `step` drew whole, the first `share`
    (one at least) in `order`, a random number a row."""
    fresh = [
        row
        for row, sample in enumerate(batch.samples)
        if sample.attention is not None and all(at == step for _, at, _ in sample.policy_versions)
    ]
    if share == 0 or not fresh:
        return []
    return sorted(fresh, key=lambda row: order[row])[: max(1, math.ceil(share * len(batch.samples)))]


@torch.no_grad()
def differences(
    engine: Engine,
    recorder: Recorder,
    batch: Batch,
    rows: Sequence[int],
    *,
    temperature: float,
    pad_id: int,
    decoder_start_id: int | None,
) -> Differences:
    """Recomputes these rows, one response a forward pass, shared among the ranks. Collective.

    Every rank makes the same number of calls (ZeRO-3 gathers in them); what is computed twice counts once.
    """
    largest, summed = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for first in range(0, len(rows), engine.world_size):
        mine = first + engine.rank
        row = rows[min(mine, len(rows) - 1)]
        tokens = batch.tokens[row]
        prompt, response = len(tokens.prompt_ids), len(tokens.response_ids)
        inputs = collate([tokens], family=engine.family, pad_id=pad_id, decoder_start_id=decoder_start_id)
        with recorder.recording(prompt - 1 if engine.family == "decoder" else 0):
            output = engine.forward(inputs, temperature, chunks=1)
            captured = recorder.take()[:, :response, :prompt]
        if mine >= len(rows):
            continue
        attention = batch.samples[row].attention
        assert attention is not None
        gap = output.logprobs[0, :response].cpu().double() - batch.behaviour[row, :response].double()
        largest = torch.maximum(largest, torch.tensor([gap.abs().max().item(), _attention_gap(captured, attention)]))
        summed += torch.tensor([gap.exp().sum().item(), response], dtype=torch.float64)
    largest, summed = largest.to(engine.device), summed.to(engine.device)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    torch.distributed.all_reduce(summed)
    return Differences(
        float(largest[0]), float(largest[1]), float(summed[0]) / max(1.0, float(summed[1])), responses=len(rows)
    )


def check(found: Differences, section: DriftSection, step: int) -> None:
    """Raises DriftExceeded where a limit is passed."""
    for name, value, limit in (
        ("logprob", found.logprob, section.logprob_limit),
        ("attention", found.attention, section.attention_limit),
    ):
        if found.responses and limit is not None and not value <= limit:
            raise DriftExceeded(
                f"step {step}: drift/{name}_max is {value:.2e}, more than learner.drift.{name}_limit {limit:g}: "
                "the rollout engine and the learner do not compute the same policy. Look at drift/* of earlier steps: "
                "a jump points at the weights that were taken last, a steady value at dtype or kernels "
                "(policy.dtype, learner.dtype)"
            )


def _attention_gap(captured: Tensor, recorded: Attention) -> float:
    """max |difference| over M, C and X of rows [1, T, P]."""
    content, salient = torch.zeros(2, 1, captured.shape[-1], device=captured.device)
    content[0, list(recorded.content)] = 1.0
    salient[0, list(recorded.salient)] = torch.tensor(
        recorded.salient_weights, dtype=torch.float32, device=captured.device
    )
    computed = reduce_rows(captured, content, salient)[0].cpu().double().numpy()
    return max(
        float(np.abs(computed[:, column] - np.asarray(values)).max())
        for column, values in ((0, recorded.mass), (1, recorded.salient_mass), (3, recorded.peak))
    )
