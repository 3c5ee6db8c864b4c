"""What a run directory holds, as a reader sees it (docs/run-directory.md), and which runs a directory has.

Read-only throughout: the run does not know that it is watched.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from services.errors import UserError

MOST_RUNS = 1000
DEPTH = 3
"""How deep below the directory that is shown runs are looked for."""
TAIL_BYTES = 256 * 2**10
SILENT_S = 30.0
"""A driver that lives says so every second; past this it is taken for gone, or for stuck."""

State = Literal["running", "silent", "finished", "stopped", "failed", "unknown"]


@dataclass(frozen=True)
class RunFiles:
    """Where one run's files are; `name` is its path below the directory that is shown."""

    name: str
    path: Path

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    def shard(self, step: int) -> Path:
        return self.path / "samples" / f"step_{step:06d}.jsonl"


def is_run(path: Path) -> bool:
    return (path / "events.jsonl").is_file() or (path / "metrics.jsonl").is_file()


def find_runs(root: Path) -> list[RunFiles]:
    """The run that `root` is, or the runs below it, by name.

    Raises:
        UserError: there is no such directory.
    """
    root = root.resolve()
    if not root.is_dir():
        raise UserError(f"{root}: is no directory; give a run directory or a directory of runs")
    if is_run(root):
        return [RunFiles(root.name, root)]
    found: list[RunFiles] = []
    level = [root]
    for _ in range(DEPTH):
        below = [child for parent in level for child in _directories(parent)]
        level = [child for child in below if not is_run(child)]
        found += [RunFiles(str(child.relative_to(root)), child) for child in below if is_run(child)]
        if len(found) >= MOST_RUNS:
            break
    return sorted(found[:MOST_RUNS], key=lambda run: run.name)


def _directories(parent: Path) -> list[Path]:
    try:
        return [child for child in parent.iterdir() if child.is_dir() and not child.name.startswith(".")]
    except OSError:
        return []


def last_lines(path: Path, most: int) -> list[dict[str, Any]]:
    """The last whole rows of a JSONL file, without reading all of it; no more than its last 256 KiB hold."""
    lines: list[bytes] = []
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            for length in (16 * 2**10, TAIL_BYTES):
                begin = max(0, size - length)
                file.seek(begin)
                data = file.read(length)
                lines = data[: data.rfind(b"\n") + 1].splitlines()[1 if begin else 0 :]
                if len(lines) >= most or not begin:
                    break
    except OSError:
        return []
    rows = [parsed(line) for line in lines[-most:]]
    return [row for row in rows if row is not None]


def parsed(line: bytes) -> dict[str, Any] | None:
    """The object of a line; None where it is damaged."""
    try:
        row: Any = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None  # pyright: ignore[reportUnknownVariableType]


def encoded(value: Any) -> bytes:
    """JSON for a browser, which knows no NaN: what is not finite becomes null."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str, allow_nan=False).encode(
            "utf-8", "replace"
        )
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), default=str).encode(
            "utf-8", "replace"
        )


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in cast(dict[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in cast(list[Any], value)]
    return value


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        return parsed(path.read_bytes())
    except OSError:
        return None


def read_config(run: RunFiles) -> dict[str, Any]:
    """The recipe as resolved; empty where it is not there yet."""
    try:
        tree: Any = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}  # pyright: ignore[reportUnknownVariableType]


def status_of(run: RunFiles) -> dict[str, Any] | None:
    """What the driver said last of each part, with `age_s`, by this machine's clock."""
    status = read_json(run.status)
    if status is not None and isinstance(status.get("time"), int | float):
        status["age_s"] = max(0.0, time.time() - float(status["time"]))
    return status


def state_of(events: list[dict[str, Any]], status: dict[str, Any] | None) -> State:
    """Whether the run is going on, from its last word in events.jsonl and the age of status.json."""
    for event in reversed(events):
        kind = event.get("event")
        if kind == "finished":
            return "finished"
        if kind == "stopped":
            return "stopped"
        if kind == "ended":
            return "failed"
        if kind == "start":
            break
    if status is None or "age_s" not in status:
        return "unknown"
    return "running" if status["age_s"] < SILENT_S else "silent"


def listing(run: RunFiles) -> dict[str, Any]:
    """One line of the list of runs: cheap, whatever the run's size."""
    rows = last_lines(run.metrics, 1)
    last = rows[-1] if rows else {}
    events = last_lines(run.events, 1000)
    status = status_of(run)
    total = None if status is None else status.get("total_steps")
    return {
        "name": run.name,
        "state": state_of(events, status),
        "steps": int(last["step"]) + 1 if "step" in last else 0,
        "total_steps": total,
        "reward": last.get("reward/mean"),
        "last_s": _modified(run.metrics),
    }


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
