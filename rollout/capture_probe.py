"""Finding the attention modules to capture in any architecture, and proving on a probe that capture is exact.

A model whose attention bypasses transformers' attention interface, or adds what the capture does not know (sinks,
soft-capped scores, linear layers), would give wrong rows in silence: here it is refused when the engine is built.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rollout.engine import Family
from rollout.policy_runner import Runner, pad_prompts
from services.attention.capture import CAPTURE, listing_calls, use_attention
from services.attention.config import CapturedLayers
from services.errors import UserError

_LENGTHS = (7, 4)
_STEPS = 2
_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""On A[t, j]. bfloat16: the model drifts between two kernels; the probe tells a wrong row from rounding."""


@dataclass(frozen=True)
class AttentionModules:
    """The modules whose attention on the prompt can be captured, one a decoder layer, and their query heads."""

    modules: tuple[nn.Module, ...]
    heads: int


@torch.inference_mode()
def find_modules(model: PreTrainedModel, family: Family, decoder_start: int | None) -> AttentionModules:
    """The decoder's self-attention modules, or an encoder-decoder's cross-attention modules, in layer order.

    Raises UserError where the model does not attend through transformers' attention interface.
    """
    ids = torch.tensor([_probe_prompts(model)[0]], device=model.device)
    with listing_calls() as calls:
        if family == "encoder-decoder":
            inputs = torch.full((1, _STEPS), decoder_start or 0, device=model.device)
            model(input_ids=ids, decoder_input_ids=inputs, use_cache=False)
            found = [call for call in calls if call.queries == _STEPS and call.keys == ids.shape[1]]
        else:
            model(input_ids=ids, use_cache=False)
            found = [call for call in calls if call.queries == call.keys == ids.shape[1]]
    modules = tuple(call.module for call in found)
    heads = {call.heads for call in found}
    expected = _decoder_layers(model, family)
    if len(modules) != expected or len(set(modules)) != expected or len(heads) != 1:
        raise _refused(model, f"{len(modules)} of its {expected} decoder layers attend through the attention interface")
    return AttentionModules(modules, heads.pop())


@torch.inference_mode()
def verify_capture(runner: Runner, captured: CapturedLayers) -> None:
    """Compares a ragged probe, its prefill and a decode step, with eager attention on each prompt alone.

    Raises UserError where they differ: this model's attention cannot be captured.
    """
    model = runner.model
    prompts = _probe_prompts(model)
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
                raise _refused(model, f"captured rows differ from its own attention by {error:.1e}")
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
        raise _refused(model, "it does not give its attention weights")
    total = torch.zeros((len(response), len(prompt)), dtype=torch.float64, device=model.device)
    for layer, weights in zip(captured.layers, captured.weights, strict=True):
        heads = torch.tensor(weights, dtype=torch.float64, device=model.device)
        total += torch.einsum("h,htj->tj", heads, attentions[layer][0, :, start:, : len(prompt)].double())
    return total / captured.total


def _probe_prompts(model: PreTrainedModel) -> list[list[int]]:
    """Two prompts of distinct ids below the vocabulary's size."""
    embedding: Any = model.get_input_embeddings()
    size = int(embedding.weight.shape[0])
    return [[(3 + 5 * i + 11 * row) % size for i in range(length)] for row, length in enumerate(_LENGTHS)]


def _decoder_layers(model: PreTrainedModel, family: Family) -> int:
    config = model.config
    if family == "encoder-decoder":
        for name in ("num_decoder_layers", "decoder_layers"):
            count = getattr(config, name, None)
            if isinstance(count, int):
                return count
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def _refused(model: PreTrainedModel, why: str) -> UserError:
    return UserError(f"policy.model: the attention of a {model.config.model_type} model cannot be captured: {why}")
