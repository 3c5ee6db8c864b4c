"""The worker extension: what vLLM's workers can do once `worker_extension_cls` names this class.

    llm = LLM(model, worker_extension_cls="rollout.vllm_capture.extension.CaptureExtension")
    llm.collective_rpc("attune_capture_start")

Its methods are called by `collective_rpc`, take and return plain values, and run between two steps.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rollout.vllm_capture.buffers import LayerShape
from rollout.vllm_capture.capture import Capture
from rollout.vllm_capture.refusals import refuse_configuration, refuse_layer, refuse_version
from rollout.vllm_capture.runner_v1 import observe_layers, observe_steps
from rollout.vllm_capture.seeded_cpu import keep_discarded_generators
from rollout.vllm_plugin import register
from rollout.vllm_receive import receive_weights
from rollout.vllm_weights import reload_weights
from services.attention.config import CaptureSection, resolve_capture
from services.errors import UserError
from services.transfer.offer import is_offer
from services.weights import Corrupt, read_manifest, read_published

register()  # this module is imported by every worker, before it makes its weight-transfer engine


class CaptureExtension:
    """Mixed into vLLM's worker; every name begins with `attune`, since the worker refuses one it has itself."""

    if TYPE_CHECKING:
        vllm_config: Any
        model_runner: Any
        _attune_capture: Capture
        _attune_undo: list[Callable[[], None]]

    def attune_capture_start(self, section: dict[str, Any] | None = None) -> dict[str, Any]:
        """Starts capturing; `section` is an `attention` section, by default the last layer's heads.

        Returns what is captured and its cost: {"layers": [...]} or {"refused": why}, which no worker raises, because
        an error in a worker ends the engine.
        """
        if getattr(self, "_attune_undo", []):
            return {"refused": "attention is being captured already: call attune_capture_stop first"}
        try:
            return self._attune_start(CaptureSection.model_validate(section or {}))
        except UserError as error:
            return {"refused": str(error)}

    def attune_capture_stop(self) -> None:
        """Captures no more, and frees what the capture holds; it may be started again."""
        for take_off in self._attune_undo:
            take_off()
        self._attune_undo = []
        del self._attune_capture

    def attune_capture_pop(self, keys: Sequence[str], tokens: Sequence[int]) -> list[dict[str, Any]]:
        """Statistics of many finished requests: float32 bytes of [T, 4], and of dense rows [T, P] or None."""
        return [
            {
                "statistics": fetched.statistics.tobytes(),
                "dense": None if fetched.dense is None else fetched.dense.tobytes(),
            }
            for fetched in self._attune_capture.pop(keys, tokens)
        ]

    def attune_capture_report(self) -> dict[str, int]:
        """Bytes that the capture holds on this worker, and how many requests came back after a preemption."""
        return {**self._attune_capture.nbytes, "preempted": self._attune_capture.preempted}

    def attune_load_weights(self, published: str, owner: str = "") -> dict[str, Any]:
        """Replaces the weights by published ones: a manifest's, once every bucket is verified, or an offer's.

        Returns {"version": (incarnation, step)}, or {"refused": why, "kind": the error's name, "torn": whether a
        tensor was replaced already}.
        """
        if is_offer(published):
            return receive_weights(self, published, owner)
        try:
            manifest = read_manifest(published)
            tensors = read_published(published)
        except (Corrupt, FileNotFoundError) as error:
            return {"refused": str(error), "kind": type(error).__name__, "torn": False}
        try:
            reload_weights(self.model_runner, tensors)
        except (ValueError, KeyError) as error:
            return {"refused": f"{published}: {error}", "kind": "ValueError", "torn": True}
        return {"version": [manifest.version.incarnation, manifest.version.step]}

    def _attune_start(self, section: CaptureSection) -> dict[str, Any]:
        import vllm
        from vllm.distributed import (
            get_tensor_model_parallel_rank,
            get_tensor_model_parallel_world_size,
            tensor_model_parallel_all_reduce,
        )
        from vllm.model_executor.models.utils import extract_layer_index

        config = self.vllm_config
        refuse_version(vllm.__version__)
        refuse_configuration(config)
        text = config.model_config.hf_text_config
        captured = resolve_capture(section, int(text.num_hidden_layers), int(text.num_attention_heads))
        found = {
            extract_layer_index(name): layer
            for name, layer in config.compilation_config.static_forward_context.items()
            if hasattr(layer, "kv_cache")
        }
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        shapes: list[LayerShape] = []
        for number, weights in zip(captured.layers, captured.weights, strict=True):
            layer = found.get(number)
            refuse_layer(number, layer)
            assert layer is not None
            local = layer.num_heads
            shapes.append(
                LayerShape(
                    layer.layer_name,
                    local,
                    layer.num_kv_heads,
                    layer.head_size,
                    float(layer.impl.scale),
                    weights[rank * local : (rank + 1) * local],
                )
            )
        runner = self.model_runner
        table = runner.input_batch.block_table[0]
        self._attune_capture = Capture(
            shapes,
            total=captured.total,
            dtype=config.model_config.dtype,
            most_requests=config.scheduler_config.max_num_seqs,
            longest=config.model_config.max_model_len,
            block_size=table.block_size,
            copied_block_size=config.cache_config.block_size,
            paged_tokens=runner.kv_cache_config.num_blocks * config.cache_config.block_size,
            reduce=None if ranks == 1 else tensor_model_parallel_all_reduce,
        )
        if runner.device.type == "cpu" and not hasattr(self, "_attune_seeded"):
            keep_discarded_generators(runner)
            self._attune_seeded = True
        self._attune_undo = [
            observe_steps(runner, self._attune_capture),
            observe_layers([found[number] for number in captured.layers], self._attune_capture),
        ]
        key_bytes = (
            sum(s.key_heads * s.width for s in shapes) * torch.empty(0, dtype=config.model_config.dtype).itemsize
        )
        return {"layers": list(captured.layers), "bytes_a_key": 2 * key_bytes, "bytes_a_token": 16}
