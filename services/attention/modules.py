"""Finding the attention modules of a transformers model, in any architecture, by watching a forward pass."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from services.attention.capture import listing_calls
from services.errors import UserError

Family = Literal["decoder", "encoder-decoder"]

_STEPS = 2


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
    ids = torch.tensor([probe_prompt(model, 7)], device=model.device)
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
        raise refused(model, f"{len(modules)} of its {expected} decoder layers attend through the attention interface")
    return AttentionModules(modules, heads.pop())


def probe_prompt(model: PreTrainedModel, length: int, row: int = 0) -> list[int]:
    """Distinct ids below the vocabulary's size; another `row` gives others."""
    embedding: Any = model.get_input_embeddings()
    size = int(embedding.weight.shape[0])
    return [(3 + 5 * i + 11 * row) % size for i in range(length)]


def _decoder_layers(model: PreTrainedModel, family: Family) -> int:
    config: Any = model.config
    if family == "encoder-decoder":
        for name in ("num_decoder_layers", "decoder_layers"):
            count = getattr(config, name, None)
            if isinstance(count, int):
                return count
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def refused(model: PreTrainedModel, why: str) -> UserError:
    """The error that names a model whose attention cannot be captured, and why."""
    return UserError(f"policy.model: the attention of a {model.config.model_type} model cannot be captured: {why}")
