"""The adapter of vLLM's model runner V1 (the CPU build): where its steps and its captured layers are observed.

Nothing in vLLM is replaced: the runner's `_update_states` and the `forward` of each captured layer's attention
implementation are wrapped on their instances, and call through. Each function here returns what takes its wrapper off.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rollout.vllm_capture.buffers import LayerShape
from rollout.vllm_capture.capture import BatchEntry, Capture
from rollout.vllm_capture.request import read_request
from rollout.vllm_capture.seeded_cpu import keep_discarded_generators
from services.errors import UserError


def start_v1(
    worker: Any,
    layers: Mapping[int, Any],
    shapes: Sequence[LayerShape],
    total: float,
    reduce: Callable[[Tensor], Tensor] | None,
) -> tuple[Capture, Callable[[], None]]:
    """A capture of these layers, by number, of a worker whose runner is V1; and what takes it off again.

    Raises UserError on a GPU, where the runner is V2 unless it was switched off.
    """
    config, runner = worker.vllm_config, worker.model_runner
    if runner.device.type != "cpu":
        raise UserError("attention is captured with model runner V1 on CPUs only: set VLLM_USE_V2_MODEL_RUNNER=1")
    table = runner.input_batch.block_table[0]
    capture = Capture(
        shapes,
        total=total,
        dtype=config.model_config.dtype,
        most_requests=config.scheduler_config.max_num_seqs,
        longest=config.model_config.max_model_len,
        block_size=table.block_size,
        copied_block_size=config.cache_config.block_size,
        paged_tokens=runner.kv_cache_config.num_blocks * config.cache_config.block_size,
        reduce=reduce,
    )
    if runner.device.type == "cpu" and not hasattr(worker, "_attune_seeded"):
        keep_discarded_generators(runner)
        worker._attune_seeded = True
    undo = (
        observe_steps(runner, capture),
        observe_layers(list(layers.values()), capture),
        observe_draws(runner, capture),
    )

    def take_off() -> None:
        for each in undo:
            each()

    return capture, take_off


def observe_steps(runner: Any, capture: Capture) -> Callable[[], None]:
    """Tells the capture of every step before it runs, once the runner's batch is what will be computed."""
    update_states = runner._update_states

    def observed(scheduler_output: Any) -> Any:
        capture.finish(list(scheduler_output.finished_req_ids))
        capture.resume(scheduler_output.scheduled_cached_reqs.resumed_req_ids)
        if scheduler_output.kv_cache_block_copies:
            capture.copy_blocks(scheduler_output.kv_cache_block_copies)
        deferred = update_states(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens:
            _begin(runner, capture, scheduler_output)
        return deferred

    runner._update_states = observed
    return lambda: delattr(runner, "_update_states")


def observe_draws(runner: Any, capture: Capture) -> Callable[[], None]:
    """Gives the capture what top-k and top-p leave of each step's distribution, where a request asks for it.

    The sampler must return processed log-probabilities: those that are finite say which tokens it kept.
    """
    sampler = runner.sampler.topk_topp_sampler
    forward = sampler.forward

    def observed(logits: Any, generators: Any, k: Any, p: Any) -> Any:
        if not capture.draws_truncated:
            return forward(logits, generators, k, p)
        whole = torch.logsumexp(logits.float(), dim=-1)
        tokens, logprobs = forward(logits, generators, k, p)
        if logprobs is not None:
            drawn = tokens.long().unsqueeze(-1)
            # A token that was drawn was kept, so its logit stands as it was, masked in place or not.
            log_mass = (logits.gather(-1, drawn).float() - logprobs.gather(-1, drawn)).squeeze(-1) - whole
            capture.keep_sets(torch.isfinite(logprobs), log_mass)
        return tokens, logprobs

    sampler.forward = observed
    return lambda: setattr(sampler, "forward", forward)


def observe_layers(layers: Sequence[Any], capture: Capture) -> Callable[[], None]:
    """Gives the capture the queries and keys of the captured `Attention` layers."""
    undo = [_observe_layer(layer, capture) for layer in layers]

    def take_off() -> None:
        for each in undo:
            each()

    return take_off


def _observe_layer(layer: Any, capture: Capture) -> Callable[[], None]:
    impl, name = layer.impl, layer.layer_name
    forward = impl.forward

    def observed(
        attention: Any, query: Any, key: Any, value: Any, kv_cache: Any, metadata: Any, *args: Any, **kwargs: Any
    ) -> Any:
        result = forward(attention, query, key, value, kv_cache, metadata, *args, **kwargs)
        if metadata is not None:  # None: a run to warm up
            capture.attend_layer(name, query, key, metadata.slot_mapping[: metadata.num_actual_tokens])
        return result

    impl.forward = observed
    return lambda: delattr(impl, "forward")


def _begin(runner: Any, capture: Capture, scheduler_output: Any) -> None:
    batch = runner.input_batch
    count = batch.num_reqs
    ids: list[str] = batch.req_ids
    scheduled = np.array([scheduler_output.num_scheduled_tokens[id] for id in ids], dtype=np.int64)
    prompts = batch.num_prompt_tokens[:count].astype(np.int64)

    def entry(i: int) -> BatchEntry:
        request = runner.requests[ids[i]]
        parameters = request.sampling_params
        wish = read_request(None if parameters is None else parameters.extra_args)
        return BatchEntry(int(prompts[i]), wish, batch.block_table[0].block_table.np[i].astype(np.int64))

    capture.begin(
        entry,
        ids,
        batch.num_computed_tokens_cpu[:count].astype(np.int64),
        scheduled,
        batch.num_tokens_no_spec[:count].astype(np.int64) - prompts,
    )
