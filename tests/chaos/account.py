"""What a disturbed run came to: is every prompt there once, and is nothing left behind?"""

import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cluster.config import Config
from cluster.run_dir import RunDir
from cluster.training_data import load_training_data
from learner.checkpoint import read_state
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

    `disagreements`: what other witnesses say against the manifest. The learner counts its updates in its own part of
    the commit, which it takes up itself where it goes on: one trained again shows there alone.
    """
    commit = latest_committed(run).commit
    assert commit is not None, "no commit"
    steps = {int(step): list(groups) for step, groups in commit.manifest["steps"].items()}
    failed: dict[str, dict[str, str]] = commit.manifest["failed"]
    times = Counter(group for groups in steps.values() for group in groups)
    expected = expected_groups(run)
    accounted = set(times) | set(failed)
    return {
        "groups": len(expected),
        "failed": len(failed),
        "lost": len(expected - accounted),
        "unknown": len(accounted - expected),
        "trained_twice": sum(count > 1 for count in times.values()) + len(set(times) & set(failed)),
        "steps": len(steps),
        "disagreements": list(disagreements(run, commit.path, steps, failed)),
    }


def disagreements(
    run: Path, commit: Path, steps: dict[int, list[str]], failed: dict[str, dict[str, str]]
) -> Iterator[str]:
    """Every step of a recipe of one update a step, with the samples that the recipe asks for."""
    config = Config.model_validate(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
    if sorted(steps) != list(range(len(steps))):
        yield "the manifest leaves steps out"
    if (updates := read_state(commit).updates) != len(steps):
        yield f"the learner has made {updates} updates in {len(steps)} steps"
    if [int(row["step"]) for row in rows(run / "metrics.jsonl")] != sorted(steps):
        yield "metrics.jsonl has other steps than the manifest"
    shards = {path.name for path in (run / "samples").glob("*.jsonl")}
    if shards != {f"step_{step:06d}.jsonl" for step in steps}:
        yield "samples/ has other steps than the manifest"
    for step, groups in steps.items():
        found = [row["sample_id"] for row in rows(run / "samples" / f"step_{step:06d}.jsonl")]
        if sorted(found) != sorted(f"{group}:{k}" for group in groups for k in range(config.rollout.samples)):
            yield f"step {step}: the samples recorded are not those of the manifest"
    if unnamed := [group for group, why in failed.items() if not (why["kind"] and why["code"])]:
        yield f"failed without a reason: {unnamed}"
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    ledger = {state: count for state, count in summary["ledger"].items() if count}
    told = {"committed": sum(map(len, steps.values())), "failed": len(failed)}
    if (summary["ended"], ledger) != ("finished", {state: count for state, count in told.items() if count}):
        yield f"the summary says {summary['ended']} and {ledger}"


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
