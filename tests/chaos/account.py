"""What a disturbed run came to: is every prompt there once, and is nothing left behind?"""

import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from cluster.config import Config
from cluster.run_dir import RunDir
from cluster.training_data import load_training_data
from learner.commit import latest_committed
from services.records import group_id_of
from tests.chaos.watch import SHARED, Watch, rows

GONE_S = 60.0
"""Seconds in which everything that a run started has ended after it."""


def expected_groups(run: Path) -> set[str]:
    """Every group of the epoch, from the recipe and its prompts."""
    config = Config.model_validate(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
    prompts = load_training_data(config, RunDir(run)).splits.train
    return {group_id_of(epoch, prompt.prompt_id) for epoch in range(config.run.epochs) for prompt in prompts}


def prompts_of(run: Path) -> dict[str, int]:
    """Of the epoch's groups: how many are lost, how many are in two committed steps; and the steps.

    What was trained is read twice: from the manifest, and from the samples that the steps recorded.
    """
    commit = latest_committed(run).commit
    steps: dict[int, list[str]] = {}
    failed: set[str] = set()
    if commit is not None:
        steps = {int(step): list(groups) for step, groups in commit.manifest["steps"].items()}
        failed = set(commit.manifest["failed"])
    times = Counter(group for groups in steps.values() for group in groups)
    recorded: Counter[str] = Counter()
    for step in steps:
        found = {row["group_id"] for row in rows(run / "samples" / f"step_{step:06d}.jsonl")}
        recorded.update(found)
        assert found == set(steps[step]), f"step {step}: the samples recorded are not those of the manifest"
    twice = {group for group, count in (times | recorded).items() if count > 1} | (set(times) & failed)
    expected = expected_groups(run)
    return {
        "groups": len(expected),
        "failed": len(failed),
        "lost": len(expected - set(times) - failed),
        "unknown": len(set(times) | failed) - len((set(times) | failed) & expected),
        "trained_twice": len(twice),
        "steps": len(steps),
        "lines": len(rows(run / "metrics.jsonl")),
    }


def left_behind(watch: Watch) -> dict[str, Any]:
    """Processes that are there 60 s after the end, and shared memory that has the run or a process of it in its name,
    or that a process of it mapped."""
    end = time.monotonic() + GONE_S
    while time.monotonic() < end and watch.alive():
        time.sleep(0.5)
    pids = {str(pid) for pid, _ in watch.seen}
    shared = [
        entry.name
        for entry in SHARED.iterdir()
        if entry.name in watch.mapped
        or watch.run_id() in entry.name
        or pids & set(entry.name.replace("_", "-").split("-"))
    ]
    alive = watch.alive()
    return {"orphans": len(alive), "shared_memory": len(shared), "left": [str(p) for p in alive] + shared}


def times_of(deaths: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Median and worst time (s) to progress again, by kind of death and over all."""
    found: dict[str, dict[str, Any]] = {}
    for kind in (*sorted({str(death["kind"]) for death in deaths}), "all"):
        times = [float(d["progress_s"]) for d in deaths if kind in (d["kind"], "all") and d["progress_s"] is not None]
        found[kind] = {
            "kills": sum(1 for death in deaths if kind in (death["kind"], "all")),
            "median_s": round(statistics.median(times), 1) if times else None,
            "worst_s": round(max(times), 1) if times else None,
        }
    return found
