"""Synchronous against one step ahead: wall time of a step, and who waits, of one recipe in one program.

The same small policy on the same generated questions is trained with `run.max_staleness` 0 and 1, in turn, on one Ray
cluster. Rollout actors and learner ranks get half of the cores each (one thread an actor): generating one batch while
another one trains can only pay where the two do not share their cores.

Wall time of a step is the time from one line of metrics.jsonl to the next. A run's first two steps, in which the
pipeline fills, and its last, beside which nothing is left to generate, are not counted. Shares of idle time are over
the time of the steps that are counted; those without a suffix are of the one-step-ahead mode.

`limit` is what overlapping could give at best: (t_generate + t_train) / max(t_generate, t_train), of the synchronous
run's own waits, t_train with the publishing of weights.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.common import Options, finish, parse_options
from cluster.config import Config
from cluster.driver import train
from cluster.files import read_jsonl
from cluster.quickstart import VOCABULARY
from cluster.ray_runtime import ray_cluster
from cluster.recipe import apply_overrides, resolve
from cluster.run_dir import RunDir
from cluster.small_model import build_small_policy
from services.text.sources import load_prompts
from services.text.tokenizer import train_tokenizer

NAME = "pipeline"
FILLING = 2
"""Steps at a run's beginning that are not counted."""
DRAINING = 1
"""Steps at its end that are not counted."""


@dataclass(frozen=True)
class Size:
    """How much is measured: steps of a run, the runs' `max_staleness` in turn, and the batch."""

    steps: int
    runs: tuple[int, ...]
    groups_per_step: int
    max_tokens: int
    prompts: int


FULL = Size(steps=13, runs=(0, 1, 1, 0), groups_per_step=16, max_tokens=48, prompts=2000)
QUICK = Size(steps=6, runs=(0, 1), groups_per_step=8, max_tokens=32, prompts=400)


def recipe(size: Size, policy: Path, actors: int) -> Config:
    """The recipe that both modes run; checkpoints, evaluation and trackers would only be noise."""
    return resolve(
        {
            "run": {
                "name": NAME,
                "seed": 0,
                "epochs": 4,
                "steps": size.steps,
                "groups_per_step": size.groups_per_step,
                "trackers": [],
            },
            "data": {"source": "generated:qa", "limit": size.prompts},
            "salience": {"content": "user"},
            "policy": {"model": str(policy), "family": "decoder"},
            "rollout": {"actors": actors, "samples": 4, "max_tokens": size.max_tokens},
            "learner": {"ranks": actors, "advantage": "grpo", "minibatches": 2, "kl": {"place": "loss"}},
            "checkpoint": {"every": 10 * size.steps},
            "evaluation": {"every": 0},
        },
        NAME,
    )


def figures(runs: Mapping[int, Sequence[Sequence[Mapping[str, Any]]]]) -> dict[str, float]:
    """The results, from the lines of metrics.jsonl of each run, by the run's `max_staleness` (0 and 1).

    Raises:
        ValueError: a run has too few steps to count any.
    """
    steps = {staleness: [step for run in of_mode for step in _counted(run)] for staleness, of_mode in runs.items()}
    wall = {staleness: median(step["wall_s"] for step in counted) for staleness, counted in steps.items()}
    generate = median(step["time/wait_batch_s"] for step in steps[0])
    learn = median(step["time/train_s"] + step["time/publish_s"] for step in steps[0])
    return {
        "one_step_ahead_speedup": wall[0] / wall[1],
        "limit": (generate + learn) / max(generate, learn),
        "seconds_a_step_synchronous": wall[0],
        "seconds_a_step_one_step_ahead": wall[1],
        "generate_s": generate,
        "train_s": learn,
        "idle_share_learner": _share(steps[1], "idle/learner"),
        "idle_share_rollouts": _share(steps[1], "idle/rollouts"),
        "idle_share_learner_synchronous": _share(steps[0], "idle/learner"),
        "idle_share_rollouts_synchronous": _share(steps[0], "idle/rollouts"),
        "steps_counted": min(len(counted) for counted in steps.values()),
    }


def _counted(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if len(rows) <= FILLING + DRAINING:
        raise ValueError(f"a run of {len(rows)} steps has none to count: more than {FILLING + DRAINING} are needed")
    return [
        {**row, "wall_s": row["time_s"] - before["time_s"]}
        for before, row in zip(rows[FILLING - 1 :], rows[FILLING : len(rows) - DRAINING], strict=False)
    ]


def _share(steps: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(step[key] * step["time/step_s"] for step in steps) / sum(step["time/step_s"] for step in steps)


def build_policy(quick: bool, size: Size, directory: Path) -> None:
    """An untrained policy: its responses run to `max_tokens`, so that both modes do the same work."""
    prompts = load_prompts(recipe(size, directory, 1).data).train
    tokenizer = train_tokenizer([prompt.text or "" for prompt in prompts], VOCABULARY, "decoder")
    if not quick:
        build_small_policy(tokenizer, "decoder", directory, seed=0)
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tiny: Any = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(tiny).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def measure(options: Options, root: Path) -> dict[str, float]:
    size = QUICK if options.quick else FULL
    actors = max(1, min(4, len(os.sched_getaffinity(0)) // 2))
    build_policy(options.quick, size, root / "policy")
    config = recipe(size, root / "policy", actors)
    found: dict[int, list[list[dict[str, Any]]]] = {}
    console = Console(stderr=True)
    with ray_cluster(config.cluster):
        for place, staleness in enumerate(size.runs):
            console.print(f"run {place + 1} of {len(size.runs)}: max_staleness {staleness}", highlight=False)
            mode = resolve(apply_overrides(config.model_dump(mode="json"), [f"run.max_staleness={staleness}"]), NAME)
            outcome = train(mode, root / f"run{place}", resume="never", console=console)
            if outcome.stopped:
                raise KeyboardInterrupt
            found.setdefault(staleness, []).append(list(read_jsonl(RunDir(root / f"run{place}").metrics)))
    return {**figures(found), "rollout_actors": actors, "learner_ranks": actors}


def main() -> None:
    options = parse_options(NAME, "Wall time of a step: synchronous against one step ahead.")
    with tempfile.TemporaryDirectory(prefix="attune-pipeline-") as root:
        results = measure(options, Path(root))
    finish(NAME, options, results)


if __name__ == "__main__":
    main()
