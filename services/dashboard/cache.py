"""Where indexes are kept: outside of every run, for this user alone, and only as long as their runs are there."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from services.dashboard.layout import RunFiles


@dataclass
class Place:
    """A directory of one index, held by one process; `own` where it is this process's alone and goes with it."""

    directory: Path
    lock: IO[str]
    own: bool

    def leave(self) -> None:
        self.lock.close()
        if self.own:
            shutil.rmtree(self.directory, ignore_errors=True)


def cache_root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "attune" / "dashboard"


def place_of(run: RunFiles, root: Path | None = None) -> Place:
    """The index's directory of a run; a temporary one where another process holds that."""
    root = root or cache_root()
    name = hashlib.blake2b(str(run.path).encode(), digest_size=12).hexdigest()
    directory = root / name
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)  # prompts stand in it
    lock = (directory / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        directory = Path(tempfile.mkdtemp(prefix="attune-dashboard-"))
        return Place(directory, (directory / "lock").open("w"), own=True)
    (directory / "run").write_text(str(run.path), encoding="utf-8")
    return Place(directory, lock, own=False)


def sweep(root: Path | None = None) -> None:
    """Removes the indexes of runs that are gone."""
    for note in (root or cache_root()).glob("*/run"):
        if not Path(note.read_text(encoding="utf-8")).is_dir():
            shutil.rmtree(note.parent, ignore_errors=True)
