"""The worker extension: what vLLM's workers can do once `worker_extension_cls` names this class.

    llm = LLM(model, worker_extension_cls="rollout.vllm_capture.extension.CaptureExtension")
    llm.collective_rpc("attune_capture_start")

Its methods are called by `collective_rpc`, take and return plain values, and run between two steps.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rollout.vllm_capture.buffers import LayerShape
from rollout.vllm_capture.capture import Capture, KeptSet
from rollout.vllm_capture.refusals import refuse_configuration, refuse_layer, refuse_version
from rollout.vllm_capture.runner_v1 import start_v1
from rollout.vllm_plugin import register
from rollout.vllm_receive import receive_weights
from rollout.vllm_weights import reload_weights
from services.attention.config import CaptureSection, resolve_capture
from services.errors import UserError
from services.transfer.offer import is_offer
from services.weights import Corrupt, read_manifest, read_published

if TYPE_CHECKING:
    from rollout.vllm_capture.device_capture import DeviceCapture

register()  # this module is imported by every worker, before it makes its weight-transfer engine


def _packed(kept: Sequence[KeptSet]) -> dict[str, bytes]:
    return {
        "ids": b"".join(each.ids.tobytes() for each in kept),
        "sizes": np.array([len(each.ids) for each in kept], dtype=np.int32).tobytes(),
        "log_mass": np.array([each.log_mass for each in kept], dtype=np.float32).tobytes(),
    }


class CaptureExtension:
    """Mixed into vLLM's worker; every name begins with `attune`, since the worker refuses one it has itself."""

    if TYPE_CHECKING:
        vllm_config: Any
        model_runner: Any
        _attune_capture: Capture | DeviceCapture
        _attune_undo: Callable[[], None]

    def attune_capture_start(self, section: dict[str, Any] | None = None) -> dict[str, Any]:
        """Starts capturing; `section` is an `attention` section, by default the last layer's heads.

        Returns {"layers": what is captured, "kept_sets": whether top-k's and top-p's can be had}, or {"refused": why,
        "here": whether it is this worker that refuses, or another one}. No worker raises it: vLLM would take the other
        workers' answers for those of its next call.
        """
        before = hasattr(self, "_attune_capture")
        answer: dict[str, Any]
        try:
            if before:
                raise UserError("attention is being captured already: call attune_capture_stop first")
            answer = self._attune_start(CaptureSection.model_validate(section or {}))
        except UserError as error:
            answer = {"refused": str(error), "here": True}
        except Exception as error:  # whatever a device has no room for
            answer = {"refused": f"the capture does not start: {type(error).__name__}: {error}", "here": True}
        if not self._attune_agreed("refused" not in answer):  # else the ranks that go on would wait for this one
            answer = answer if "refused" in answer else {"refused": "another rank refuses", "here": False}
            if not before:
                self._attune_take_off()
            return answer
        try:
            self._attune_record()
        except BaseException:
            self._attune_take_off()
            raise
        return answer

    def attune_capture_stop(self) -> None:
        """Captures no more, and frees what the capture holds; it may be started again."""
        self._attune_take_off()
        self._attune_record()

    def attune_capture_pop(self, keys: Sequence[str], tokens: Sequence[int]) -> list[dict[str, Any]]:
        """Statistics of many finished requests: float32 bytes of [T, 4], of dense rows [T, P] or None; `kept` (or None)
        as {"ids": int32 bytes of all sets in a row, "sizes": int32 bytes [T], "log_mass": float32 bytes [T]};
        `capture_s`, the time (s) that capturing took this worker so far, the same in all."""
        popped = self._attune_capture.pop(keys, tokens)
        return [
            {
                "statistics": fetched.statistics.tobytes(),
                "dense": None if fetched.dense is None else fetched.dense.tobytes(),
                "kept": None if fetched.kept is None else _packed(fetched.kept),
                "capture_s": self._attune_capture.time.seconds,
            }
            for fetched in popped
        ]

    def attune_capture_report(self) -> dict[str, int]:
        """Bytes that the capture holds on this worker, and how many requests came back after a preemption."""
        return {**self._attune_capture.nbytes, "preempted": self._attune_capture.preempted}

    def attune_load_weights(self, published: str, owner: str = "") -> dict[str, Any]:
        """Replaces the weights by published ones: a manifest's, once every bucket is verified, or an offer's.

        Returns {"version": (incarnation, step)}, or {"refused": why, "kind": the error's name, "torn": whether a
        tensor was replaced already}.
        """
        from vllm.config import set_current_vllm_config

        if is_offer(published):
            return receive_weights(self, published, owner)
        try:
            manifest = read_manifest(published)
            tensors = read_published(published)
        except (Corrupt, FileNotFoundError) as error:
            return {"refused": str(error), "kind": type(error).__name__, "torn": False}
        try:
            with set_current_vllm_config(self.vllm_config):
                reload_weights(self.model_runner, tensors)
        except (Corrupt, FileNotFoundError) as error:  # removed between the look at it and the load, by a newer version
            return {"refused": str(error), "kind": type(error).__name__, "torn": True}
        except (ValueError, KeyError, torch.OutOfMemoryError) as error:
            return {"refused": f"{published}: {error}", "kind": "ValueError", "torn": True}
        return {"version": [manifest.version.incarnation, manifest.version.step]}

    def _attune_take_off(self) -> None:
        if hasattr(self, "_attune_capture"):
            self._attune_undo()
            del self._attune_undo, self._attune_capture

    def _attune_record(self) -> None:
        """The CUDA graphs of a V2 runner, with the capture in them or without."""
        if self.vllm_config.use_v2_model_runner:
            from rollout.vllm_capture.runner_v2 import record_graphs

            record_graphs(self)

    def _attune_agreed(self, willing: bool) -> bool:
        """Whether every tensor-parallel rank is willing."""
        from vllm.distributed import get_tp_group

        unwilling = torch.tensor([int(not willing)])
        if get_tp_group().world_size > 1:
            torch.distributed.all_reduce(unwilling, group=get_tp_group().cpu_group)
        return not unwilling.item()

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
        drafting: set[str] = getattr(getattr(self.model_runner, "speculator", None), "draft_attn_layer_names", set())
        found = {
            extract_layer_index(name): layer
            for name, layer in config.compilation_config.static_forward_context.items()
            if hasattr(layer, "kv_cache") and name not in drafting
        }
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        layers: dict[int, Any] = {}
        shapes: list[LayerShape] = []
        for number, weights in zip(captured.layers, captured.weights, strict=True):
            layer = found.get(number)
            refuse_layer(number, layer)
            assert layer is not None
            local = layer.num_heads
            layers[number] = layer
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
        reduce = None if ranks == 1 else tensor_model_parallel_all_reduce
        if config.use_v2_model_runner:
            # V1 has no need of triton.
            from rollout.vllm_capture.runner_v2 import start_v2

            start = start_v2
        else:
            start = start_v1
        self._attune_capture, self._attune_undo = start(self, layers, shapes, captured.total, reduce)
        # V2 draws on the device, and where drafts are verified another sampler does.
        says = not config.use_v2_model_runner and config.speculative_config is None
        return {"layers": list(captured.layers), "kept_sets": says}
