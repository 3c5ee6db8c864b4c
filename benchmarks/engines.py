"""RL steps a minute with vLLM against those with the transformers engine: the quickstart's own recipe, in one program.

The quickstart's small policy is built and fine-tuned once; then runs of its recipe follow, engines in turn, each run
from that same policy on one Ray cluster. A step's time is that from one line of metrics.jsonl to the next; a run's
first two steps are not counted. Each engine has the actors and threads that the quickstart gives it.

Every step trains on what it sampled, and rewards differ between engines only by their random numbers, so the work of a
step is the same but for the lengths of responses, which are printed.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.common import Options, finish, parse_options
from cluster.driver import train
from cluster.files import read_jsonl
from cluster.quickstart import config_of, prepare
from cluster.ray_runtime import ray_cluster
from cluster.recipe import apply_overrides, resolve
from cluster.run_dir import RunDir

NAME = "engines"
FILLING = 2
"""Steps at a run's beginning that are not counted."""
FULL = ("vllm", "transformers", "transformers", "vllm", "vllm", "transformers")
QUICK = ("vllm", "transformers")
STEPS = 10


def figures(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> dict[str, float]:
    """The results, from the lines of metrics.jsonl of each run, by engine."""
    results: dict[str, float] = {}
    wall: dict[str, float] = {}
    for engine, of_engine in runs.items():
        walls = [
            row["time_s"] - before["time_s"]
            for run in of_engine
            for before, row in zip(run[FILLING - 1 :], run[FILLING:], strict=False)
        ]
        counted = [row for run in of_engine for row in run[FILLING:]]
        wall[engine] = median(walls)
        results[f"steps_per_minute_{engine}"] = 60 / wall[engine]
        for key, name in (
            ("time/wait_batch_s", "wait_s"),
            ("time/train_s", "train_s"),
            ("time/publish_s", "publish_s"),
        ):
            results[f"{name}_{engine}"] = median(row[key] for row in counted)
        results[f"response_tokens_{engine}"] = median(row["length/mean"] for row in counted)
    return {"vllm_speedup": wall["transformers"] / wall["vllm"], **results}


def measure(options: Options, root: Path) -> dict[str, float]:
    console = Console(stderr=True)
    start = config_of(root, steps=STEPS, engine="vllm", family="decoder")
    found: dict[str, list[list[dict[str, Any]]]] = {}
    with ray_cluster(start.cluster):
        prepare(root, start, "decoder", console)
        order = QUICK if options.quick else FULL
        for place, engine in enumerate(order):
            console.print(f"run {place + 1} of {len(order)}: {engine}", highlight=False)
            config = config_of(root, steps=STEPS, engine=engine, family="decoder")
            still = ["evaluation.every=0", "run.trackers=[]", f"checkpoint.every={10 * STEPS}"]
            config = resolve(apply_overrides(config.model_dump(mode="json"), still), NAME)
            outcome = train(config, root / f"run{place}", resume="never", console=console)
            if outcome.stopped:
                raise KeyboardInterrupt
            found.setdefault(engine, []).append(list(read_jsonl(RunDir(root / f"run{place}").metrics)))
    return figures(found)


def main() -> None:
    options = parse_options(NAME, "RL steps a minute: vLLM against the transformers engine.")
    with tempfile.TemporaryDirectory(prefix="attune-engines-") as root:
        results = measure(options, Path(root))
    finish(NAME, options, results)


if __name__ == "__main__":
    main()
