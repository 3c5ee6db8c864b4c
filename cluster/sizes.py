"""`attune doctor` without a recipe: which sizes of models this machine can train, and what the others lack."""

from collections.abc import Mapping
from typing import Any

from cluster.config import Config
from cluster.doctor import DRIVER_BYTES, Report
from cluster.health import Finding, enough, look_at_ports, look_at_redis, look_at_versions
from cluster.machine import Machine
from cluster.memory import Shape
from cluster.needs import files_of, needs_of
from cluster.plan import parts_of
from cluster.ray_runtime import OBJECT_STORE_BYTES
from rollout.cache_size import CPU_CACHE_BYTES

LADDER: Mapping[str, tuple[int, int, int, int, int, int, int, bool]] = {
    "5 M (the quickstart)": (4, 256, 4, 4, 64, 1024, 4096, True),
    "0.1 B": (12, 768, 12, 12, 64, 3072, 50257, True),
    "0.5 B": (24, 896, 14, 2, 64, 4864, 151936, True),
    "1.5 B": (28, 1536, 12, 2, 128, 8960, 151936, True),
    "3 B": (36, 2048, 16, 2, 128, 11008, 151936, True),
    "7 B": (28, 3584, 28, 4, 128, 18944, 152064, False),
    "14 B": (48, 5120, 40, 8, 128, 13824, 152064, False),
    "32 B": (64, 5120, 40, 8, 128, 27648, 152064, False),
    "70 B": (80, 8192, 64, 8, 128, 28672, 128256, False),
}
"""Decoders of usual shapes: layers, hidden, heads, key heads, head width, inner width, vocabulary, tied."""

PROMPT, RESPONSE = 512, 512


def ladder_shape(name: str) -> Shape:
    layers, hidden, heads, kv_heads, width, inner, vocabulary, tied = LADDER[name]
    table = vocabulary * hidden
    attention = 2 * hidden * heads * width + 2 * hidden * kv_heads * width
    block = attention + 3 * hidden * inner + 2 * hidden
    parameters = layers * block + hidden + table * (1 if tied else 2)
    head = 0 if tied else table
    return Shape(parameters, layers, hidden, heads, kv_heads, width, inner, vocabulary, head=head)


def ladder_tree(machine: Machine) -> dict[str, dict[str, Any]]:
    """The recipe that the sizes are tried with: all GPUs but one train, in bfloat16; without, one rank on the CPU."""
    gpus = len(machine.gpus)
    training: dict[str, Any] = {"ranks": max(1, gpus - 1)}
    cluster: dict[str, Any] = {}
    dtype = "float32"
    vllm: dict[str, Any] = {"max_context": PROMPT + RESPONSE}
    if gpus:
        dtype = "bfloat16"
        training |= {"dtype": dtype, "gradient_checkpointing": True}
        cluster = {"learner_gpus": 1 if gpus > 1 else 0.5, "rollout_gpus": 1 if gpus > 1 else 0.5}
    if gpus == 1:  # vLLM cannot find it out beside the learner: an eighth of the GPU
        vllm["kv_cache_mib"] = min(CPU_CACHE_BYTES, machine.gpus[0] // 8) // 2**20
    return {
        "data": {"max_prompt_tokens": PROMPT},
        "policy": {"model": "-", "dtype": dtype},
        "rollout": {"engine": "vllm", "actors": 1, "max_tokens": RESPONSE, "vllm": vllm},
        "learner": {**training, "advantage": "grpo", "minibatches": 1},
        "cluster": cluster,
    }


def try_sizes(config: Config, machine: Machine) -> list[Finding]:
    """For every size whether this machine can train it, and what is missing where it cannot."""
    found: list[Finding] = []
    parts = parts_of(config)
    for name in LADDER:
        shape = ladder_shape(name)
        needs = needs_of(config, shape, parts, captured=1, context=PROMPT + RESPONSE)
        own = DRIVER_BYTES + OBJECT_STORE_BYTES + files_of(config, shape, 1, {}).published
        host = own + sum(need.bytes("host") * parts[part].count for part, need in needs.items())
        checks = [enough(name, host, machine.memory, "memory")]
        for part in ("learner", "rollout"):
            if parts[part].gpus:
                given = int(min(machine.gpus) * parts[part].gpus)
                checks.append(enough(name, needs[part].bytes("device"), given, f"GPU memory of a {part} actor"))
        short = [check for check in checks if check.status == "short"]
        found.append(short[0] if short else checks[-1])
    return found


def examine_machine(config: Config, machine: Machine) -> Report:
    """This machine alone: what it has, what is installed, and the sizes of models that it can train.

    `config` is that of `ladder_tree`. A size that does not fit is no fault: it is no part of the exit code.
    """
    found = [*look_at_versions(), look_at_redis(config), *look_at_ports()]
    return Report([machine], False, found, sizes=try_sizes(config, machine))
