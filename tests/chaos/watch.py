"""What can be seen of a run from outside: its processes, its steps and commits, and the moments worth a kill."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from cluster.files import read_jsonl
from services.weights import MANIFEST

TITLES = {
    "rollout": "ray::RolloutWorker",
    "scoring_worker": "ray::ScoringActor",
    "reward_server": "ray::RewardActor",
    "model": "ray::ModelActor",
    "learner": "ray::LearnerWorker",
}
SHARED = Path("/dev/shm")
TAIL_BYTES = 32_768


@dataclass
class Watch:
    """Looks at a run directory and at the processes below its driver. `seen` has every process that ever was there,
    `mapped` every file of shared memory that one of them was seen to map, by name."""

    run: Path
    driver: psutil.Process | None = None
    seen: dict[tuple[int, float], psutil.Process] = field(default_factory=dict)
    mapped: set[str] = field(default_factory=set)
    _run_id: str | None = None
    _looked: float = 0.0

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Those that can be killed, by kind."""
        found: dict[str, list[psutil.Process]] = {kind: [] for kind in (*TITLES, "redis", "driver")}
        if self.driver is None or not self.driver.is_running():
            return found
        found["driver"].append(self.driver)
        for process in [self.driver, *self.driver.children(recursive=True)]:
            try:
                self.seen[process.pid, process.create_time()] = process
                self.mapped |= shared_by(process.pid)
                line = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if "redis-server" in line and "launch_redis" not in line:
                found["redis"].append(process)
            for kind, title in TITLES.items():
                if line.startswith(title):
                    found[kind].append(process)
        return found

    def look(self) -> None:
        """Takes note of the processes, once a second."""
        if time.monotonic() - self._looked >= 1.0:
            self._looked = time.monotonic()
            self.processes()

    def alive(self) -> list[psutil.Process]:
        """Of all that were ever seen, those that are there."""
        return [process for process in self.seen.values() if is_alive(process)]

    # The run

    def steps(self) -> set[tuple[int, int]]:
        """(incarnation, step) of every line of metrics.jsonl."""
        return {(int(row["incarnation"]), int(row["step"])) for row in rows(self.run / "metrics.jsonl")}

    def events(self) -> list[dict[str, Any]]:
        return rows(self.run / "events.jsonl")

    def run_id(self) -> str:
        if self._run_id is None:
            self._run_id = next((str(e["run_id"]) for e in self.events() if e["event"] == "start"), None)
        return self._run_id or "none"

    def published(self) -> list[Path]:
        """What drivers of the run have in shared memory."""
        return list(SHARED.glob(f"attune-{self.run_id()}-*"))

    # Moments. Some last for milliseconds: only the ends of the files are read.

    def between_step_and_commit(self) -> bool:
        """A step is trained and recorded, and no commit holds it."""
        newest = last_row(self.run / "metrics.jsonl", lambda _: True)
        commit = last_row(self.run / "events.jsonl", lambda event: event["event"] == "committed")
        return newest is not None and int(newest["step"]) + 1 > (0 if commit is None else int(commit["step"]))

    def in_mid_checkpoint(self) -> bool:
        return any((self.run / "checkpoints").glob("step_*.partial/engine"))

    def in_mid_transfer(self) -> bool:
        """Weights are being written: their directory is there, and the manifest, written last, is not."""
        return any(
            not (version / MANIFEST).exists() for directory in self.published() for version in directory.glob("v*")
        )


def rows(path: Path) -> list[dict[str, Any]]:
    try:
        return list(read_jsonl(path))
    except (OSError, json.JSONDecodeError):  # being replaced
        return []


def last_row(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
    """The last wanted row among those at the end of a JSONL file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return None
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:  # cut at its beginning
            continue
        if wanted(row):
            return row
    return None


def shared_by(pid: int) -> set[str]:
    """Names of the files of shared memory that a process maps and that still have one."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # ended
        return set()
    paths = (line[line.index("/") :] for line in lines if f" {SHARED}/" in line)
    return {Path(path).relative_to(SHARED).parts[0] for path in paths if not path.endswith(" (deleted)")}


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def wait_until(condition: Callable[[], bool], seconds: float, pause_s: float = 0.002) -> bool:
    """Whether it came true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(pause_s)
    return False
