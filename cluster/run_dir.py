"""The run directory: what stands where, who may write to it, and how it is cut back to a commit.

The layout is a public contract (docs/run-directory.md). One driver writes it; a lock file held for the driver's life
keeps a second one out. `metrics.jsonl` and `samples/` may run ahead of the last commit; a resume cuts them back to it.
"""

import fcntl
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from cluster.files import append_line, cut_lines, drop_torn_line, read_jsonl, write_atomically
from learner.commit import sync
from services.errors import UserError
from services.records import Group, Sample

log = logging.getLogger(__name__)

LOOK_S = 0.5
"""How often a directory that is in use is looked at again."""


class RunDir:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.events = path / "events.jsonl"
        self.status = path / "status.json"
        self.samples = path / "samples"
        self.maps = path / "samples" / "maps"
        self.bad_batches = path / "bad_batches"
        self.checkpoints = path / "checkpoints"
        self.policy = path / "policy"
        self.policy_best = path / "policy-best"
        self.salience = path / "salience.json"
        self.summary = path / "summary.json"
        self.redis = path / "redis"
        self.steps_done: int | None = None
        """As the driver counts them; every event says it."""
        self._lock: IO[str] | None = None
        self._appending = threading.Lock()  # the thread that keeps Redis up writes events, too

    def lock(self, wait_s: float = 0.0) -> None:
        """Creates the directory and takes it for this process; another driver's end is waited for `wait_s`.

        Raises:
            UserError: another driver is using it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / ".lock").open("a+")
        except OSError as error:
            raise UserError(f"run directory {self.path}: cannot be written: {error.strerror}") from error
        ends, said = time.monotonic() + wait_s, False
        while not _taken(handle, self.path):
            handle.seek(0)
            owner = handle.read().strip() or "another process"
            if time.monotonic() >= ends:
                handle.close()
                raise UserError(
                    f"run directory {self.path}: in use by {owner}; stop it first or choose another directory"
                )
            if not said:
                log.warning("run directory %s: in use by %s; waiting %.0f s for its end", self.path, owner, wait_s)
                said = True
            time.sleep(LOOK_S)
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {os.uname().nodename}")
        handle.flush()
        self._lock = handle
        drop_torn_line(self.events)

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def event(self, kind: str, **fields: Any) -> None:
        """Appends to events.jsonl and waits until it is on disk: restarts are counted by it. Any thread may call it.

        Raises:
            OSError: the disk is full, or the like; then nothing of the event is there.
        """
        at = {} if self.steps_done is None else {"at_step": self.steps_done}
        line = json.dumps({"time": time.time(), "event": kind, **at, **fields}, ensure_ascii=False)
        with self._appending:
            append_line(self.events, line)

    def run_id(self) -> str | None:
        """The run's name for itself, of its first start; None where there was none."""
        starts = (event for event in read_jsonl(self.events) if event.get("event") == "start")
        return next((str(event["run_id"]) for event in starts), None)

    def last_incarnation(self) -> int:
        """The incarnation of the run's last start; 0 where there was none."""
        return max(
            (int(event["incarnation"]) for event in read_jsonl(self.events) if event.get("event") == "start"), default=0
        )

    def write_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends to metrics.jsonl, as `event` does: a commit that contains the step must not outlive its line."""
        append_line(self.metrics, json.dumps({"step": step, **dict(sorted(metrics.items()))}))

    def write_samples(self, step: int, groups: Sequence[Group], extra: Mapping[str, Mapping[str, Any]]) -> None:
        """One shard a step; `extra` adds the learner's figures to a sample, by its id. Dense maps go to files.

        All of it is on the disk when this returns: a power cut must not empty the shard of a step that is committed.
        """
        self.samples.mkdir(exist_ok=True)
        shard = self.samples / f"step_{step:06d}.jsonl"
        with shard.open("w", encoding="utf-8") as file:
            for group in groups:
                for sample in group.samples:
                    row = map_to_file(sample, self.maps / f"step_{step:06d}", self.path).model_dump(mode="json")
                    file.write(
                        json.dumps({"step": step, **row, **extra.get(sample.sample_id, {})}, ensure_ascii=False) + "\n"
                    )
        maps = self.maps / f"step_{step:06d}"
        for path in (shard, *maps.glob("*"), *(path for path in (maps, self.maps, self.samples) if path.exists())):
            sync(path)

    def write_bad_batch(self, step: int, groups: Sequence[Group], why: str) -> Path:
        """The samples of a batch that was not trained on, kept wherever the run goes back to; line one says why."""
        self.bad_batches.mkdir(exist_ok=True)
        path = self.bad_batches / f"step_{step:06d}.jsonl"
        rows = [{"step": step, "why": why}]
        rows += [sample.model_dump(mode="json") for group in groups for sample in group.samples]
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return path

    def cut_back(self, steps: int) -> None:
        """Removes what belongs to step `steps` and later: they are not in the commit that the run goes on from."""
        cut_lines(self.metrics, lambda row: int(row["step"]) < steps)
        for entry in [*self.samples.glob("step_*.jsonl"), *self.maps.glob("step_*")]:
            if int(entry.name.removeprefix("step_").removesuffix(".jsonl")) >= steps:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _taken(handle: IO[str], directory: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems have no locks
        handle.close()
        raise UserError(f"run directory {directory}: cannot be locked there: {error.strerror}") from error
    return True


def map_to_file(sample: Sample, directory: Path, relative_to: Path) -> Sample:
    """A sample's dense rows, where it holds them, go to a file in `directory`; the sample names it."""
    if sample.attention is None or sample.attention.map is None:
        return sample
    import numpy as np
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    name = sample.sample_id.replace(":", "_").replace("/", "_") + ".safetensors"
    save_file({"map": np.asarray(sample.attention.map, dtype=np.float32)}, directory / name)
    reference = str((directory / name).relative_to(relative_to))
    return sample.model_copy(
        update={"attention": sample.attention.model_copy(update={"map": None, "map_ref": reference})}
    )
