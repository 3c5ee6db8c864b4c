"""A model's shape from its config.json alone: it is built on torch's meta device, where a tensor has no bytes."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig

from cluster.memory import Shape
from services.errors import UserError
from services.models import family_of, load_config
from services.models_config import PolicySection

INNER = ("intermediate_size", "d_ff", "ffn_dim", "decoder_ffn_dim", "n_inner")
WIDTH = ("head_dim", "d_kv")


def shape_of(policy: PolicySection) -> Shape:
    """The policy's shape. Raises UserError where there is no such model, or its configuration does not say."""
    config = load_config(policy)
    loader: Any = AutoModelForSeq2SeqLM if family_of(config) == "encoder-decoder" else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model = loader.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"policy.model: {policy.model}: its configuration builds no model: {error}") from error
    return _shape(config, model)


def _shape(config: PreTrainedConfig, model: Any) -> Shape:
    text: Any = config.get_text_config(decoder=True)
    both = family_of(config) == "encoder-decoder"
    hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
    decoder = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None)
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    encoder = getattr(config, "encoder_layers", None) or text.num_hidden_layers
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=int(decoder) if both and decoder else int(text.num_hidden_layers),
        hidden=hidden,
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=_first(text, WIDTH) or hidden // heads,
        inner=_first(text, INNER) or 4 * hidden,
        vocabulary=int(text.vocab_size),
        encoder_layers=int(encoder) if both else 0,
        head=0 if output is None or output.weight is embedding.weight else output.weight.numel(),
        mlp_kept=_mlp_kept(text),
        scores=not getattr(model, "_supports_sdpa", False),
    )


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    found = [value for name in names if isinstance(value := getattr(config, name, None), int)]
    return found[0] if found else None


def _mlp_kept(config: Any) -> int:
    """ReLU's output is all that its backward pass needs; anything else keeps what it is made from, step by step."""
    names = ("feed_forward_proj", "hidden_act", "activation_function")
    named = [value for name in names if isinstance(value := getattr(config, name, None), str)]
    return 1 if named and named[0] == "relu" else 4


def saved_parameters(directory: str | Path) -> int | None:
    """Elements of the safetensors files of a model directory, by their headers; None where there are none."""
    files = sorted(Path(directory).glob("*.safetensors")) if Path(directory).is_dir() else []
    return sum(_elements(file) for file in files) if files else None


def _elements(file: Path) -> int:
    """The header of a safetensors file: 8 bytes of its length, then JSON, a shape a tensor."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(struct.unpack("<Q", opened.read(8))[0]))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
