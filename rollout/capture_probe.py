"""Proving on a probe that capture is exact for a model.

A model whose attention bypasses transformers' attention interface, or adds what the capture does not know (sinks,
soft-capped scores, linear layers), would give wrong rows in silence: here it is refused when the engine is built.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rollout.policy_runner import Runner, pad_prompts
from services.attention.capture import CAPTURE, use_attention
from services.attention.config import CapturedLayers
from services.attention.modules import probe_prompt, refused

_LENGTHS = (7, 4)
_STEPS = 2
_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""On A[t, j]. bfloat16: the model drifts between two kernels; the probe tells a wrong row from rounding."""


@torch.inference_mode()
def verify_capture(runner: Runner, captured: CapturedLayers) -> None:
    """Compares a ragged probe, its prefill and a decode step, with eager attention on each prompt alone.

    Raises UserError where they differ: this model's attention cannot be captured.
    """
    model = runner.model
    prompts = [probe_prompt(model, length, row) for row, length in enumerate(_LENGTHS)]
    running, _, first = runner.begin(pad_prompts(prompts, runner.padding_side, model.device), _STEPS)
    follow = [prompt[1] for prompt in prompts]
    _, second = runner.step(running, torch.tensor(follow, device=model.device))
    offsets = pad_prompts(prompts, runner.padding_side, model.device).offsets
    use_attention(model, "eager")
    try:
        for row, prompt in enumerate(prompts):
            reference = eager_rows(runner, prompt, [follow[row], 0], captured)
            span = slice(offsets[row], offsets[row] + len(prompt))
            error = max(
                float((rows[row, span] - expected).abs().max())
                for rows, expected in zip((first, second), reference, strict=True)
            )
            if not error <= _BOUNDS.get(model.dtype, 5e-2):
                raise refused(model, f"captured rows differ from its own attention by {error:.1e}")
    finally:
        use_attention(model, CAPTURE)


def eager_rows(runner: Runner, prompt: Sequence[int], response: Sequence[int], captured: CapturedLayers) -> Tensor:
    """A[t, :] [T, P] from `output_attentions` of a model in eager mode, without padding or cache: the definition."""
    model = runner.model
    if runner.family == "encoder-decoder":
        inputs = [runner.decoder_start, *response[:-1]]
        out: Any = model(
            input_ids=torch.tensor([list(prompt)], device=model.device),
            decoder_input_ids=torch.tensor([inputs], device=model.device),
            output_attentions=True,
            use_cache=False,
        )
        attentions, start = out.cross_attentions, 0
    else:
        ids = torch.tensor([[*prompt, *response[:-1]]], device=model.device)
        out = model(input_ids=ids, output_attentions=True, use_cache=False)
        attentions, start = out.attentions, len(prompt) - 1
    if not attentions or any(attentions[layer] is None for layer in captured.layers):
        raise refused(model, "it does not give its attention weights")
    total = torch.zeros((len(response), len(prompt)), dtype=torch.float64, device=model.device)
    for layer, weights in zip(captured.layers, captured.weights, strict=True):
        heads = torch.tensor(weights, dtype=torch.float64, device=model.device)
        total += torch.einsum("h,htj->tj", heads, attentions[layer][0, :, start:, : len(prompt)].double())
    return total / captured.total
