"""The adapter of vLLM's model runner V2 (GPUs): where its requests, its steps and its captured layers are observed.

Requests and steps are seen where the runner tells its own `ModelState` of them, layers where their attention
implementation runs; each is wrapped on its instance and calls through. In a step that vLLM replays from a full CUDA
graph no Python runs: the graphs are recorded again once the layers are observed, with the capture's launches in them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rollout.vllm_capture.buffers import LayerShape
from rollout.vllm_capture.device_capture import DeviceCapture
from rollout.vllm_capture.placed_rows import StepTensors
from rollout.vllm_capture.refusals import refuse_device_layer
from rollout.vllm_capture.request import read_request
from rollout.vllm_capture.triton_kernels import INTERPRETED
from services.errors import UserError

Undo = Callable[[], None]


def start_v2(
    worker: Any,
    layers: Mapping[int, Any],
    shapes: Sequence[LayerShape],
    total: float,
    reduce: Callable[[Tensor], Tensor] | None,
) -> tuple[DeviceCapture, Undo]:
    """A capture of these layers, by number, of a worker whose runner is V2; and what takes it off again. After either
    `record_graphs` is to be called, on all ranks.

    Raises UserError where a layer's keys cannot be read, or there is no memory for the capture.
    """
    runner = worker.model_runner
    if runner.device.type == "cpu" and not INTERPRETED:
        raise UserError("attention is captured with model runner V2 on GPUs: set VLLM_USE_V2_MODEL_RUNNER=0 on a CPU")
    groups = [_group(runner, shape.name) for shape in shapes]
    sizes = [int(runner.block_tables.block_sizes[group]) for group in groups]
    for (number, layer), size in zip(layers.items(), sizes, strict=True):
        refuse_device_layer(number, layer, size, worker.vllm_config.model_config.dtype)
    try:
        capture = DeviceCapture(
            shapes,
            [runner.block_tables.block_tables[group].gpu for group in groups],
            total=total,
            dtype=worker.vllm_config.model_config.dtype,
            slots=runner.max_num_reqs,
            drafts=runner.num_speculative_steps,
            longest=runner.max_model_len,
            device=runner.device,
            reduce=reduce,
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"no memory for the attention capture of {runner.max_num_reqs} requests of {runner.max_model_len} tokens: "
            "lower rollout.max_batch_rows, rollout.vllm.max_context or vLLM's share of the GPU's memory"
        ) from error
    undo: list[Undo] = []

    def take_off() -> None:
        while undo:
            undo.pop()()

    try:
        undo += _observe_requests(runner, capture)
        undo += _observe_steps(runner, capture)
        for layer, shape, size in zip(layers.values(), shapes, sizes, strict=True):
            undo += _observe_layer(runner, layer, shape, size, capture)
    except BaseException:
        take_off()
        raise
    return capture, take_off


def record_graphs(worker: Any) -> None:
    """Records vLLM's full CUDA graphs again, if it has any, as vLLM itself does when its expert parallelism changes."""
    from vllm.config import set_current_vllm_config
    from vllm.utils.gc_utils import freeze_gc_heap
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    runner = worker.model_runner
    if runner.cudagraph_manager is None or not runner.cudagraph_manager.graphs:
        return
    drafting = vars(runner.speculator).values() if runner.speculator is not None else ()
    managers = [runner.cudagraph_manager, *(each for each in drafting if isinstance(each, CudaGraphManager))]
    torch.accelerator.synchronize()
    before = [dict(manager.graphs) for manager in managers]  # held: a pool of graphs may not become empty
    for manager in managers:
        manager.release_graphs()
    try:
        with set_current_vllm_config(worker.vllm_config), worker._get_cudagraph_capture_context():
            runner.capture_model()
    except BaseException:
        for manager in managers:  # what has been recorded writes to a capture that there will not be
            manager.release_graphs()
        raise
    del before
    freeze_gc_heap()  # as vLLM had it after its warm-up: recording has thawed it


def _wrap(target: Any, name: str, made: Callable[[Any], Any]) -> Undo:
    wrapped = vars(target).get(name)
    setattr(target, name, made(getattr(target, name)))
    return (lambda: delattr(target, name)) if wrapped is None else (lambda: setattr(target, name, wrapped))


def _observe_requests(runner: Any, capture: DeviceCapture) -> list[Undo]:
    """Slots are the runner's: a request enters one when it is scheduled, also after a preemption, and leaves it."""
    state = runner.model_state

    def adding(call: Any) -> Any:
        def add_request(slot: int, request: Any) -> Any:
            result = call(slot, request)
            parameters = request.sampling_params
            wish = read_request(None if parameters is None else parameters.extra_args)
            room = runner.max_model_len - request.prompt_len
            most = room if parameters is None or parameters.max_tokens is None else min(room, parameters.max_tokens)
            capture.enter(request.req_id, slot, request.prompt_len, most, wish)
            return result

        return add_request

    def removing(call: Any) -> Any:
        def remove_request(id: str) -> Any:
            capture.leave(id)
            return call(id)

        return remove_request

    def finishing(call: Any) -> Any:
        def finish_requests(scheduler_output: Any) -> Any:
            result = call(scheduler_output)
            capture.finish(list(scheduler_output.finished_req_ids))
            return result

        return finish_requests

    return [
        _wrap(state, "add_request", adding),
        _wrap(state, "remove_request", removing),
        _wrap(runner, "finish_requests", finishing),
    ]


def _observe_steps(runner: Any, capture: DeviceCapture) -> list[Undo]:
    """`preprocess_state` and `postprocess_state` run in real steps only; `prepare_attn` also where vLLM warms up,
    records a graph, or keeps step with other ranks, and then no row may be written."""
    state = runner.model_state
    real = False

    def before(call: Any) -> Any:
        def preprocess_state(batch: Any, *args: Any) -> Any:
            nonlocal real
            real = True
            capture.place(
                StepTensors(batch.idx_mapping, batch.query_start_loc, batch.seq_lens, runner.req_states.total_len.gpu),
                batch.idx_mapping_np,
                batch.seq_lens_cpu_upper_bound[: batch.num_reqs].numpy(),
            )
            return call(batch, *args)

        return preprocess_state

    def preparing(call: Any) -> Any:
        def prepare_attn(batch: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal real
            if not real:
                capture.place_none(batch.num_reqs)
            real = False
            return call(batch, *args, **kwargs)

        return prepare_attn

    def after(call: Any) -> Any:
        def postprocess_state(*args: Any, **kwargs: Any) -> Any:
            capture.keep_dense()
            return call(*args, **kwargs)

        return postprocess_state

    return [
        _wrap(state, "preprocess_state", before),
        _wrap(state, "prepare_attn", preparing),
        _wrap(state, "postprocess_state", after),
    ]


def _observe_layer(runner: Any, layer: Any, shape: LayerShape, block_size: int, capture: DeviceCapture) -> list[Undo]:
    """After the attention of a layer: its queries, and its keys as the cache holds them by then."""
    undo: list[Undo] = []
    if layer.get_attn_backend().get_name() == "CPU_ATTN":
        # Its kernel packs keys in an order of its own: they are kept a second time, plain.
        blocks = runner.kv_cache_config.num_blocks
        shadow = torch.zeros((blocks, shape.key_heads, block_size, shape.width), dtype=layer.kv_cache.dtype)

        def keys_of(kv_cache: Tensor, key: Tensor, metadata: Any) -> Tensor:
            del kv_cache
            at = metadata.slot_mapping[: metadata.num_actual_tokens]
            shadow[at // block_size, :, at % block_size] = key[: len(at)]
            return shadow

        def copying(call: Any) -> Any:
            def update_requests(scheduler_output: Any) -> Any:
                result = call(scheduler_output)
                for source, destination in scheduler_output.kv_cache_block_copies or ():
                    shadow[destination] = shadow[source]
                return result

            return update_requests

        undo.append(_wrap(runner, "update_requests", copying))
    else:

        def keys_of(kv_cache: Tensor, key: Tensor, metadata: Any) -> Tensor:
            del key, metadata
            return kv_cache[..., : shape.width]

    def observing(call: Any) -> Any:
        def forward(
            attention: Any, query: Any, key: Any, value: Any, kv_cache: Any, metadata: Any, *args: Any, **kwargs: Any
        ) -> Any:
            result = call(attention, query, key, value, kv_cache, metadata, *args, **kwargs)
            if metadata is not None:  # None: a run to warm up
                capture.attend_layer(shape.name, query, keys_of(kv_cache, key, metadata))
            return result

        return forward

    return [*undo, _wrap(layer.impl, "forward", observing)]


def _group(runner: Any, name: str) -> int:
    groups = runner.kv_cache_config.kv_cache_groups
    return next(number for number, group in enumerate(groups) if name in group.layer_names)
