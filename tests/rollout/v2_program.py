"""vLLM's own model runner V2 on a CPU: its Triton kernels, and those of the capture, run in Triton's interpreter.

    python tests/rollout/v2_program.py ASKED ANSWERED

Both are JSON. ASKED is a list of runs, each in a vLLM of its own: {"llm": its arguments, "section": the attention
section, "triton": whether Triton's attention replaces the CPU's, "ahead": whether steps are scheduled ahead, "calls":
lists of (prompt ids, sampling parameters), "again": whether to generate them once more when the capture is stopped};
what a run switches on stays on for those after it. ANSWERED becomes a list of a mapping for each run: "started",
"answers" (for each request its tokens, their log-probabilities, statistics [T, 4] and dense rows [T, P], or None where
they are not kept), "without" (the same, stopped), "report", "runner" and "scheduler".
"""

import gc
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

os.environ |= {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}

from triton.backends import backends  # reads the environment

# vLLM takes Triton on a CPU for usable where it has a CPU backend; the interpreter needs none.
backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False))  # pyright: ignore[reportArgumentType]


def schedule_ahead() -> None:
    """A step is scheduled before the last one's tokens are known, as on a GPU: vLLM's CPU platform forbids it."""
    from vllm.platforms.cpu import CpuPlatform

    platform: Any = CpuPlatform
    check = platform.check_and_update_config

    def kept(config: Any) -> None:
        check(config)
        config.scheduler_config.async_scheduling = True

    platform.check_and_update_config = staticmethod(kept)


def take_whole_masks() -> None:
    """The interpreter's loads and stores refuse a mask of integers, which vLLM's n-gram kernel has."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    builder: Any = InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def boolean(mask: Any) -> Any:
        return TensorHandle(mask.data.astype(bool), mask.dtype)

    builder.create_masked_load = lambda self, at, mask, *rest, **more: load(self, at, boolean(mask), *rest, **more)
    builder.create_masked_store = lambda self, at, value, mask, *rest: store(self, at, value, boolean(mask), *rest)


def run(asked: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm: Any = LLM(
        **{
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "enforce_eager": True,
            "block_size": 32,
            "logprobs_mode": "processed_logprobs",
            "worker_extension_cls": "rollout.vllm_capture.extension.CaptureExtension",
            **asked["llm"],
        }
    )
    runner = _worker(llm).model_runner
    (started,) = llm.collective_rpc("attune_capture_start", args=(asked["section"],))
    answers = [_answers(llm, call) for call in asked["calls"]]
    report = llm.collective_rpc("attune_capture_report")[0]
    llm.collective_rpc("attune_capture_stop")
    llm.reset_prefix_cache()
    answer = {
        "started": started,
        "answers": answers,
        "without": [_answers(llm, call) for call in asked["calls"]] if asked.get("again") else None,
        "report": report,
        "runner": type(runner).__mro__[1].__module__,
        "scheduler": type(llm.llm_engine.engine_core.engine_core.scheduler).__name__,
    }
    del llm, runner
    cleanup_dist_env_and_memory()
    gc.collect()
    return answer


def _worker(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker


def _answers(llm: Any, call: list[tuple[list[int], dict[str, Any]]]) -> list[tuple[Any, ...]]:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids, _ in call]
    parameters = [SamplingParams(logprobs=0, detokenize=False, **given) for _, given in call]
    outputs = [each.outputs[0] for each in llm.generate(prompts, parameters, use_tqdm=False)]
    wishes: list[Any] = [(given.get("extra_args") or {}).get("attune") for _, given in call]
    started = hasattr(_worker(llm), "_attune_capture")
    asking = [i for i, wish in enumerate(wishes) if wish is not None and started]
    keys, lengths = [wishes[i]["key"] for i in asking], [len(outputs[i].token_ids) for i in asking]
    fetched: dict[int, Any] = {}
    if asking:
        fetched = dict(zip(asking, llm.collective_rpc("attune_capture_pop", args=(keys, lengths))[0], strict=True))
    answers: list[tuple[Any, ...]] = []
    for i, output in enumerate(outputs):
        tokens = list(output.token_ids)
        logprobs = [step[token].logprob for step, token in zip(output.logprobs, tokens, strict=True)]
        statistics = dense = None
        if i in fetched:
            statistics = np.frombuffer(fetched[i]["statistics"], np.float32).reshape(-1, 4).tolist()
            if fetched[i]["dense"] is not None:
                dense = np.frombuffer(fetched[i]["dense"], np.float32).reshape(len(tokens), -1).tolist()
        answers.append((tokens, logprobs, statistics, dense))
    return answers


def use_triton_attention() -> None:
    """GPU attention on the CPU: keys lie in the paged cache as they do there. It asks what kind of GPU runs it."""
    import torch
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend")
    torch.cuda.get_device_capability = lambda *_: (9, 0)


if __name__ == "__main__":
    take_whole_masks()
    runs = json.loads(Path(sys.argv[1]).read_text())
    answered: list[dict[str, Any]] = []
    for each in runs:
        if each.get("triton"):
            use_triton_attention()
        if each.get("ahead"):
            schedule_ahead()
        answered.append(run(each))
    Path(sys.argv[2]).write_text(json.dumps(answered))
