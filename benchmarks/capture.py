"""vLLM with capture against vLLM without, and against transformers with `output_attentions`, side by side.

One model of over 50M parameters (float32, grouped-query attention), random weights and prompts, 32 requests at once.
A round times generation without capture, with the last layer and with the last three, in turn; the ratios are medians
of the rounds' own. Every response has the same length. transformers' eager attention runs in a process of its own,
which vLLM has not touched, with as many threads. Peak memory is resident memory (GiB), of vLLM's process by what ran in
it so far.

The 32 prompts differ from each other, so that every one of them has to be computed. `groups` is the same with four
prompts of eight samples each, as a policy is rolled out: vLLM computes each prompt once, `generate` eight times.

`limit` is what reading the captured layers' keys once more would cost if bytes were all: bytes of a decode step without
capture (weights, keys and values of all layers at the mean context) over the same with it. `eager_limit` is what
`eager_ratio` would be if vLLM's time were that of the matrix products alone, at the rate that this machine reaches on a
large one.
"""

import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import Options, finish, parse_options

NAME = "capture"
PROMPT, RESPONSE, REQUESTS = 256, 128, 32
LAYERS, WIDTH, HEADS, KEY_HEADS, FEED_FORWARD, VOCABULARY = 12, 576, 9, 3, 1536, 16000
VARIANTS = (0, 1, 3)
GROUP = 8
"""Samples of a prompt, as in recipes/cagsr-qa.yaml."""


@dataclass(frozen=True)
class Shape:
    """So many requests at once, `samples` of each prompt; lengths in tokens."""

    requests: int
    prompt: int
    response: int
    samples: int = 1

    @property
    def prompts(self) -> int:
        return self.requests // self.samples


GRID = (Shape(8, 64, 32), Shape(32, 64, 32), Shape(8, 1024, 32), Shape(32, 1024, 32))


def main() -> None:
    options = parse_options(NAME, "Throughput with and without attention capture.")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    threads = os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with TemporaryDirectory() as directory:
        parameters = build_model(Path(directory))
        finish(NAME, options, measure(directory, parameters, options))


def build_model(directory: Path) -> int:
    """Writes the model; returns its number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=FEED_FORWARD,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KEY_HEADS,
            max_position_embeddings=2048,
        )
    )
    model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())


def measure(directory: str, parameters: int, options: Options) -> dict[str, Any]:
    llm = start(directory)
    shape = Shape(REQUESTS, PROMPT, RESPONSE)
    rounds = 2 if options.quick else 5
    generate(llm, Shape(REQUESTS, 32, 8), 0, seed=10_000)  # warm up
    seconds: dict[int, list[float]] = {variant: [] for variant in VARIANTS}
    peak: dict[int, float] = {}
    for number in range(rounds):
        for variant in VARIANTS[number % 3 :] + VARIANTS[: number % 3]:  # no variant is always the first
            seconds[variant].append(generate(llm, shape, variant, seed=number))
            peak.setdefault(variant, peak_gib())
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
        eager_s, eager_peak = apart.submit(eager, directory, shape, 1 if options.quick else 3).result()
    tokens = shape.requests * shape.response
    rate = matmul_flops_per_s()
    groups = Shape(REQUESTS, PROMPT, RESPONSE, GROUP)
    return {
        "parameters": parameters,
        "shape": vars(shape),
        "rounds": rounds,
        "tokens_per_s_off": tokens / median(seconds[0]),
        "tokens_per_s_on": tokens / median(seconds[1]),
        "tokens_per_s_on_3_layers": tokens / median(seconds[3]),
        "tokens_per_s_eager": tokens / median(eager_s),
        "on_off_ratio": ratio(seconds, 1),
        "on_off_limit": byte_limit(parameters, shape, 1),
        "on_off_ratio_3_layers": ratio(seconds, 3),
        "on_off_limit_3_layers": byte_limit(parameters, shape, 3),
        "eager_ratio": median(eager_s) / median(seconds[1]),
        "eager_limit": median(eager_s) * rate / matmul_flops(parameters, shape),
        "groups": grown(llm, groups, rounds, median(eager_s)),
        "groups_eager_limit": median(eager_s) * rate / matmul_flops(parameters, groups),
        "matmul_flops_per_s": rate,
        "peak_memory_off": peak[0],
        "peak_memory_on": peak[1],
        "peak_memory_on_3_layers": peak[3],
        "peak_memory_eager": eager_peak,
        "grid": [grown(llm, each, 1 if options.quick else 3) for each in GRID[: 2 if options.quick else 4]],
    }


def ratio(seconds: dict[int, list[float]], captured: int) -> float:
    """Throughput with capture over that without, the median of the rounds."""
    return median(off / on for off, on in zip(seconds[0], seconds[captured], strict=True))


def grown(llm: Any, shape: Shape, rounds: int, eager_s: float | None = None) -> dict[str, Any]:
    """The last layer's cost at another shape; `eager_s` is what transformers takes for it."""
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for number in range(rounds):
        for variant in (0, 1) if number % 2 else (1, 0):
            seconds[variant].append(generate(llm, shape, variant, seed=77 + number))
    against = {} if eager_s is None else {"eager_ratio": eager_s / median(seconds[1])}
    return {**vars(shape), "on_off_ratio": ratio(seconds, 1), **against}


def byte_limit(parameters: int, shape: Shape, captured: int) -> float:
    """Share of throughput left if a decode step cost its bytes alone: the captured layers' keys are read once more."""
    context = shape.prompt + shape.response / 2
    keys = 4 * shape.requests * context * KEY_HEADS * (WIDTH // HEADS)
    step = 4 * parameters + 2 * LAYERS * keys
    return step / (step + captured * keys)


def matmul_flops(parameters: int, shape: Shape) -> float:
    """Of every weight once a token, but for the input embedding; the output head for response tokens alone, a prompt
    once for all its samples.
    """
    embedding = VOCABULARY * WIDTH
    layers = parameters - 2 * embedding
    prompts, responses = shape.prompts * shape.prompt, shape.requests * shape.response
    return 2.0 * (prompts * layers + responses * (layers + embedding))


def matmul_flops_per_s() -> float:
    """The rate of a large matrix product in float32."""
    import torch

    rows, inner, columns = 4096, WIDTH, 2 * FEED_FORWARD
    left, right = torch.randn(rows, inner), torch.randn(columns, inner)
    seconds: list[float] = []
    for _ in range(12):
        began = time.perf_counter()
        torch.nn.functional.linear(left, right)
        seconds.append(time.perf_counter() - began)
    return 2.0 * rows * inner * columns / median(seconds[2:])


def start(directory: str) -> Any:
    from vllm import LLM

    return LLM(
        directory,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=REQUESTS,
        max_model_len=2048,
        block_size=32,
        kv_cache_memory_bytes=2**30,
        enable_prefix_caching=True,
        worker_extension_cls="rollout.vllm_capture.extension.CaptureExtension",
    )


def prompts(shape: Shape, seed: int) -> list[list[int]]:
    import numpy as np

    drawn = np.random.default_rng(seed).integers(3, VOCABULARY, (shape.prompts, shape.prompt)).tolist()
    return [ids for ids in drawn for _ in range(shape.samples)]


def generate(llm: Any, shape: Shape, captured: int, *, seed: int) -> float:
    """Seconds of one call that generates every request's response, and fetches what was captured."""
    from vllm import SamplingParams

    from rollout.vllm_capture.request import extra_args

    ids = prompts(shape, seed)
    parameters = [
        SamplingParams(
            temperature=1.0,
            max_tokens=shape.response,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
            extra_args=extra_args(str(i), range(shape.prompt), range(3), [1.0] * 3) if captured else None,
        )
        for i in range(shape.requests)
    ]
    if captured:
        started = llm.collective_rpc("attune_capture_start", args=({"last_layers": captured},))[0]
        if "refused" in started:
            raise RuntimeError(started["refused"])
    llm.reset_prefix_cache()  # no variant finds the prompts of the one before
    began = time.perf_counter()
    llm.generate([{"prompt_token_ids": each} for each in ids], parameters, use_tqdm=False)
    if captured:
        keys = [str(i) for i in range(shape.requests)]
        llm.collective_rpc("attune_capture_pop", args=(keys, [shape.response] * shape.requests))
    seconds = time.perf_counter() - began
    if captured:
        llm.collective_rpc("attune_capture_stop")
    return seconds


def eager(directory: str, shape: Shape, rounds: int) -> tuple[list[float], float]:
    """Seconds of each call of transformers' `generate` that returns every attention map, and peak memory (GiB)."""
    import torch
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    ids = torch.tensor(prompts(shape, 0))
    seconds: list[float] = []
    for _ in range(rounds):
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=shape.response,
                min_new_tokens=shape.response,
                do_sample=True,
                output_attentions=True,
                return_dict_in_generate=True,
                pad_token_id=0,
            )
        seconds.append(time.perf_counter() - began)
    return seconds, peak_gib()


def peak_gib() -> float:
    """Largest resident memory of this process so far (GiB); it only grows."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
