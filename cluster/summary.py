"""The last word of a run: an event, and summary.json, what the run came to, from its own files."""

import json
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.config import Config
from cluster.files import read_jsonl, write_atomically
from cluster.run_dir import RunDir

WINDOW = 10
"""Steps that the first and the last figures are means over: single steps are noisy."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `stopped` by a signal or not, the steps done, and the steps that the last commit holds."""

    stopped: str | None
    steps: int
    committed_steps: int
    seconds: float

    @property
    def has_commit(self) -> bool:
        return self.committed_steps > 0


def say_end(run: RunDir, config: Config, outcome: Outcome, ledger: Mapping[str, int]) -> None:
    """`ledger`: groups by state."""
    kind = "stopped" if outcome.stopped else "finished"
    run.event(kind, signal=outcome.stopped, steps=outcome.steps, committed=outcome.committed_steps)
    write_summary(run, config, outcome.stopped, outcome.committed_steps, outcome.seconds, ledger)


def said_finished(run: RunDir, committed_steps: int) -> bool:
    """Whether summary.json is of a run that finished with so many steps."""
    try:
        found = json.loads(run.summary.read_text(encoding="utf-8"))
        return (found["ended"], found["committed_steps"]) == ("finished", committed_steps)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_summary(
    run: RunDir, config: Config, stopped: str | None, committed_steps: int, seconds: float, ledger: Mapping[str, int]
) -> None:
    steps, first, last = 0, list[dict[str, Any]](), deque[dict[str, Any]](maxlen=WINDOW)
    for row in read_jsonl(run.metrics):  # of a long run they are not held
        steps += 1
        last.append(row)
        if steps <= WINDOW:
            first.append(row)
    summary = {
        "name": config.run.name,
        "ended": "stopped" if stopped else "finished",
        "signal": stopped,
        "steps": steps,
        "committed_steps": committed_steps,
        "seconds_this_start": seconds,
        "starts": sum(1 for event in read_jsonl(run.events) if event.get("event") == "start"),
        "ledger": dict(ledger),
        "first": _mean(first),
        "last": _mean(last),
    }
    write_atomically(run.summary, json.dumps(summary, indent=2) + "\n")


def _mean(rows: Collection[dict[str, Any]]) -> dict[str, float]:
    keys = {key for row in rows for key, value in row.items() if isinstance(value, int | float) and key != "step"}
    result: dict[str, float] = {}
    for key in sorted(keys):
        values = [float(row[key]) for row in rows if isinstance(row.get(key), int | float)]
        result[key] = sum(values) / len(values)
    return result
