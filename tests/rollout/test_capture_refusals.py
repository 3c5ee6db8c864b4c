"""What cannot be captured inside vLLM is refused by layer, reason and way out."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rollout.vllm_capture.refusals import refuse_configuration, refuse_device_layer, refuse_layer
from services.errors import UserError


def layer(backend: str, cache: torch.Tensor) -> Any:
    return SimpleNamespace(
        num_kv_heads=2, head_size=64, kv_cache=cache, get_attn_backend=lambda: SimpleNamespace(get_name=lambda: backend)
    )


def test_keys_that_cannot_be_read_are_refused() -> None:
    whole = torch.zeros(3, 2, 16, 128)
    for backend in ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION", "CPU_ATTN"):
        refuse_device_layer(5, layer(backend, whole), 16, torch.float32)
    with pytest.raises(UserError, match=r"layer 5 has its keys in the order of TREE_ATTN.*FLASH_ATTN"):
        refuse_device_layer(5, layer("TREE_ATTN", whole), 16, torch.float32)
    with pytest.raises(UserError, match=r"layer 5 has a KV cache of \[2, 16, 128\].*\[2, 32, 128\].*block_size"):
        refuse_device_layer(5, layer("FLASH_ATTN", whole), 32, torch.float32)
    with pytest.raises(UserError, match=r"float32, where .* in torch\.bfloat16"):
        refuse_device_layer(5, layer("FLASH_ATTN", whole), 16, torch.bfloat16)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"parallel_config.use_ubatching": True}, "two batches that overlap in one step"),
        ({"parallel_config.pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"parallel_config.decode_context_parallel_size": 2}, "context parallelism"),
        ({"model_config.is_diffusion": True}, "a diffusion model"),
        ({"cache_config.cache_dtype": "fp8_e4m3"}, "a KV cache in fp8_e4m3"),
        ({"observability_config.jit_monitor_mode": "error"}, "jit_monitor_mode: error"),
    ],
)
def test_configurations_are_refused_by_reason(changed: dict[str, Any], reason: str | None) -> None:
    config = SimpleNamespace(
        model_config=SimpleNamespace(is_encoder_decoder=False, use_mla=False, is_diffusion=False),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            use_ubatching=False,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        observability_config=SimpleNamespace(jit_monitor_mode="warn"),
        use_v2_model_runner=True,
    )
    for path, value in changed.items():
        section, name = path.split(".")
        setattr(getattr(config, section), name, value)
    if reason is None:
        refuse_configuration(config)
        return
    with pytest.raises(UserError, match=f"with {reason}: use `rollout.engine: transformers`"):
        refuse_configuration(config)


class Attention:
    """A layer of vLLM's own class, as far as it is looked at."""

    def __init__(self, **changed: Any) -> None:
        self.impl = SimpleNamespace(sliding_window=(-1, -1), alibi_slopes=None, logits_soft_cap=0)
        self.num_kv_heads = 2
        self.sliding_window = None
        self.has_sink = False
        self.kv_sharing_target_layer_name = None
        self.kv_cache_dtype = "auto"
        self.attn_type = "decoder"
        for path, value in changed.items():
            setattr(self.impl if path.startswith("impl_") else self, path.removeprefix("impl_"), value)


class ChunkedLocalAttention(Attention):
    """Attends to a part of the earlier keys, and has no mark of it."""


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Attention(sliding_window=64), "a sliding window"),
        (Attention(impl_sliding_window=(63, 0)), "a sliding window"),
        (Attention(has_sink=True), "attention sinks"),
        (Attention(impl_sinks=torch.zeros(4)), "attention sinks"),
        (Attention(impl_alibi_slopes=[0.5]), "ALiBi"),
        (Attention(impl_logits_soft_cap=50.0), "soft-capped scores"),
        (Attention(kv_sharing_target_layer_name="model.layers.1"), "keys shared with another layer"),
        (Attention(kv_cache_dtype="fp8"), "a KV cache in fp8"),
        (Attention(attn_type="encoder_only"), "attention of kind encoder_only"),
        (ChunkedLocalAttention(), "ChunkedLocalAttention, which is not known"),
        (SimpleNamespace(kv_cache=None), "SimpleNamespace"),
        (None, "no attention"),
    ],
)
def test_layers_are_refused_by_what_their_attention_is(layer: Any, reason: str) -> None:
    with pytest.raises(UserError, match=f"decoder layer 7 has {reason}.*rollout.engine: transformers"):
        refuse_layer(7, layer)


def test_a_layer_that_attends_to_all_earlier_keys_is_captured() -> None:
    refuse_layer(7, Attention())
