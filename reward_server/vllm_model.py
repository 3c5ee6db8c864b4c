"""A judge's model in a vLLM engine of this process: log-probabilities of its next token. Needs vLLM.

vLLM batches by itself and keeps the keys of common beginnings: a judge is asked everything twice, with the same rubric
and the same conversation before the answers.
"""

import os
from collections.abc import Sequence
from typing import Any

from reward_server.local_model import load_config, model_revision
from reward_server.runner import ModelFacts, ModelSpec, Output, Row
from services.errors import UserError
from services.models import max_context_of

CPU_CACHE_MIB = 1024
BLOCK_SIZE_CPU = 32  # The CPU kernels know blocks of multiples of 32 only.
NEXT = 1  # A position of the context is the answer's.


class VllmModel:
    """A `reward_server.runner.ModelRunner` for the task `choice`. Raises UserError for what an operator can get wrong,
    vLLM's refusals of a model among it."""

    lanes = 1

    def __init__(self, spec: ModelSpec) -> None:
        config = load_config(spec)
        self._llm = _start(spec)
        longest: int = self._llm.llm_engine.model_config.max_model_len
        self.facts = ModelFacts(
            task=spec.task,
            revision=model_revision(spec, config),
            max_tokens=min(longest, max_context_of(config) or longest) - NEXT,
            labels=(),
        )

    def run(self, rows: Sequence[Row]) -> list[Output]:
        from vllm import SamplingParams

        asked = [
            SamplingParams(max_tokens=NEXT, temperature=0.0, logprob_token_ids=list(row.choices), detokenize=False)
            for row in rows
        ]
        prompts: list[Any] = [{"prompt_token_ids": list(row.ids)} for row in rows]
        answers = self._llm.generate(prompts, asked, use_tqdm=False)
        return [[_chosen(answer, row)] for answer, row in zip(answers, rows, strict=True)]


def _chosen(answer: Any, row: Row) -> list[float]:
    listed = answer.outputs[0].logprobs[0]
    return [float(listed[choice].logprob) for choice in row.choices]


def _start(spec: ModelSpec) -> Any:
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    try:
        from vllm.platforms import current_platform

        on_cpu = current_platform.is_cpu()
        if on_cpu:
            # An engine process of its own would import vLLM once more and share the cores with this one.
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM
    except ImportError as error:
        raise UserError(
            f"{spec.field}.engine: vllm is not installed: pip install 'attune[gpu]' (or 'attune[cpu]' without a GPU)"
        ) from error
    arguments: dict[str, Any] = {"dtype": spec.dtype, "enforce_eager": on_cpu}
    cache = spec.kv_cache_mib or (CPU_CACHE_MIB if on_cpu else None)
    if cache is not None:
        arguments["kv_cache_memory_bytes"] = cache * 2**20
    if on_cpu:
        arguments["block_size"] = BLOCK_SIZE_CPU
    if spec.max_tokens is not None:
        arguments["max_model_len"] = spec.max_tokens + NEXT
    try:
        return LLM(
            model=spec.model,
            revision=spec.revision,
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            logprobs_mode="raw_logprobs",
            generation_config="vllm",  # the model's own sampling defaults are no part of a judge's distribution
            trust_remote_code=False,
            disable_log_stats=True,
            **arguments,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{spec.field}.model: vLLM does not start with {spec.model}: {error}") from error
