"""Committed checkpoints: what makes a directory of files the truth about a run (invariant 1).

    checkpoints/step_N/   engine/  learner.json  manifest.json  COMMITTED

A checkpoint is written as `step_N.partial`. `commit_checkpoint` brings every file of it to the disk, lists size and
SHA-256 of each in manifest.json, writes COMMITTED (the SHA-256 of manifest.json) last, and renames the directory. A
directory without COMMITTED, or one whose files are not those the manifest lists, is no checkpoint: it is reported and
passed over, never half used.

Nothing here knows what the files hold, and nothing heavy is imported: the driver calls it without torch.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.errors import UserError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
COMMITTED = "COMMITTED"
RESHARDED = "{}.for_{}_ranks"
"""A commit as so many ranks read it: for as long as they do."""
SEEN_S = 90.0
"""Seconds after which what another machine has written is seen here: NFS may show a listing that is a minute old."""
LOOK_EVERY_S = 1.0
NOT_SHARED = "The run directory must be on storage that all nodes of the cluster share (--run-dir)"
_STEP = re.compile(r"step_(\d+)")


class NoSpace(Exception):  # noqa: N818 - reads as what it says where it is raised
    """A checkpoint was not written for want of room on the disk. The commits that are there stay valid."""


@dataclass(frozen=True)
class Written:
    """What a rank found in the directory of a checkpoint when it had written its part: bytes by relative name."""

    node: str
    files: dict[str, int]


@dataclass(frozen=True)
class Commit:
    """A checkpoint that was verified. `manifest` is what the driver gave to `commit_checkpoint`, and `files`."""

    path: Path
    step: int
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Latest:
    """The newest valid commit, if there is one, and what was passed over on the way to it (one line each)."""

    commit: Commit | None
    problems: tuple[str, ...]


def begin_checkpoint(run_dir: str | Path, step: int) -> Path:
    """An empty `checkpoints/step_N.partial`; what an earlier attempt left there is removed."""
    directory = Path(run_dir) / "checkpoints" / f"step_{step}.partial"
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    return directory


def written(directory: str | Path) -> Written:
    """What this process sees in the directory of a checkpoint, its own files at their full size."""
    path = Path(directory)
    files = {file.relative_to(path).as_posix(): file.stat().st_size for file in path.rglob("*") if file.is_file()}
    return Written(os.uname().nodename, files)


def check_written(directory: str | Path, parts: Iterable[tuple[str, Written]]) -> None:
    """Compares what the ranks (by name) wrote with what is here, before it is made a commit.

    Raises:
        UserError: a file is missing here or shorter, for SEEN_S: the ranks wrote somewhere else.
    """
    wrote = list(parts)
    end = time.monotonic() + SEEN_S
    while True:
        try:
            return _compare(directory, written(directory), wrote)
        except UserError:
            if time.monotonic() >= end:
                raise
        time.sleep(LOOK_EVERY_S)


def _compare(directory: str | Path, here: Written, parts: Iterable[tuple[str, Written]]) -> None:
    for rank, part in parts:
        for name, size in sorted(part.files.items()):
            found = here.files.get(name)
            if found is None or found < size:
                lacks = "it is not there" if found is None else f"it has {found} bytes there"
                raise UserError(
                    f"{directory} is no checkpoint: {rank} on {part.node} wrote {size} bytes of {name}, and on "
                    f"{here.node} {lacks}. {NOT_SHARED}; the commits that are there stay valid"
                )


def commit_checkpoint(directory: str | Path, manifest: Mapping[str, Any]) -> Path:
    """Makes `step_N.partial` the checkpoint `step_N`, and returns its path.

    Raises:
        ValueError: the directory is not named step_N.partial, or `manifest` holds the reserved key `files`.
        OSError: the disk is full, or the like, or `step_N` is there already: what a run does not go on from is set
            aside before (`set_aside_after`). Then `step_N.partial` is no checkpoint, and earlier ones are untouched.
    """
    partial = Path(directory)
    if not (partial.name.endswith(".partial") and _STEP.fullmatch(partial.name.removesuffix(".partial"))):
        raise ValueError(f"a checkpoint that is being written is named step_N.partial, got {partial}")
    if "files" in manifest:
        raise ValueError("manifest: the key `files` is written by commit_checkpoint")
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(partial.rglob("*")):
        name = path.relative_to(partial).as_posix()
        if path.is_file() and name not in (MANIFEST, COMMITTED):
            files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            sync(path)
    sum_ = _write_json(partial / MANIFEST, {**manifest, "files": files})
    _write(partial / COMMITTED, sum_ + "\n")
    for path in (*(p for p in partial.rglob("*") if p.is_dir()), partial):
        sync(path)
    final = partial.with_name(partial.name.removesuffix(".partial"))
    partial.rename(final)
    sync(final.parent)
    return final


def replace_manifest(directory: str | Path, manifest: Mapping[str, Any]) -> None:
    """Gives a committed checkpoint another manifest over the same files, which are not looked at.

    COMMITTED names both while the one takes the other's place: cut off at any point, the checkpoint is valid with the
    manifest that stands there.

    Raises:
        UserError: it is no committed checkpoint.
        OSError: the disk is full, or the like; the checkpoint is valid with the manifest that it had.
    """
    path = Path(directory)
    files = read_manifest(path)["files"]
    beside = path / f"{MANIFEST}.partial"
    old, new = _sha256(path / MANIFEST), _write_json(beside, {**manifest, "files": files})
    _replace(path / COMMITTED, f"{old}\n{new}\n")
    beside.replace(path / MANIFEST)
    sync(path)
    _replace(path / COMMITTED, new + "\n")


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a committed checkpoint. That it is the one that was committed is verified, the files are not.

    Raises:
        UserError: what is wrong with it.
    """
    path = Path(directory)
    try:
        if not path.is_dir() or _STEP.fullmatch(path.name) is None:
            raise UserError(f"{path} is not a checkpoint: expected a directory checkpoints/step_N of a run")
        for name in (COMMITTED, MANIFEST):
            if not (path / name).is_file():
                raise UserError(f"{path} is not a committed checkpoint: {name} is missing")
        text = (path / MANIFEST).read_bytes()
        if hashlib.sha256(text).hexdigest().encode() not in (path / COMMITTED).read_bytes().split():
            raise UserError(f"{path} is damaged: {MANIFEST} is not the one that was committed")
    except OSError as error:
        raise UserError(f"{path} is damaged: it cannot be read: {error}") from error
    return json.loads(text)


def latest_manifest(run_dir: str | Path) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """The manifest of a run's newest commit, and what was passed over on the way to it (one line each)."""
    problems: list[str] = []
    root = Path(run_dir) / "checkpoints"
    for step in sorted(_steps(root), reverse=True):
        try:
            return read_manifest(root / f"step_{step}"), tuple(problems)
        except UserError as error:  # one that is pruned meanwhile, too
            problems.append(str(error))
    return None, tuple(problems)


def read_commit(directory: str | Path) -> Commit:
    """A committed checkpoint, every file of it verified against the manifest.

    Raises:
        UserError: what is wrong with it, and the file concerned.
    """
    path = Path(directory)
    manifest = read_manifest(path)
    try:
        for name, entry in manifest["files"].items():
            file = path / name
            if not file.is_file():
                raise UserError(f"{path} is damaged: {name} is missing")
            if file.stat().st_size != entry["bytes"]:
                raise UserError(
                    f"{path} is damaged: {name} has {file.stat().st_size} bytes, {entry['bytes']} were committed"
                )
            if _sha256(file) != entry["sha256"]:
                raise UserError(f"{path} is damaged: the SHA-256 of {name} is not the committed one")
    except OSError as error:
        raise UserError(f"{path} is damaged: it cannot be read: {error}") from error
    return Commit(path=path, step=int(path.name.removeprefix("step_")), manifest=manifest)


def latest_committed(run_dir: str | Path) -> Latest:
    """The newest checkpoint of a run that is committed and undamaged.

    Raises:
        UserError: there are checkpoints, and none that can be used. Nothing is begun anew over what may be all that is
            left of hours.
    """
    problems: list[str] = []
    root = Path(run_dir) / "checkpoints"
    for step in sorted(_steps(root), reverse=True):
        try:
            return Latest(read_commit(root / f"step_{step}"), tuple(problems))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(
            f"no commit of {run_dir} can be used: {'; '.join(problems)}. Put one back from a copy; to begin again at "
            f"step 0, move {root} away: metrics and samples that are there are removed then"
        )
    return Latest(None, ())


def set_aside_after(run_dir: str | Path, step: int) -> list[Path]:
    """Renames the checkpoints of later steps than a run goes on from to `step_N.aside`, and returns where they are.

    They are damaged, or the run was told to go on from before them. Left in place they would count as the newest: what
    the run commits from now on would be pruned in their stead, and the next resume would take up what was left behind.
    Nobody but their owner removes them: what is damaged may be all that is left of hours. The newest goes first: cut
    off at any point, the run stands at one of its commits, nearer to the one asked for.
    """
    root = Path(run_dir) / "checkpoints"
    moved: list[Path] = []
    for later in sorted(_steps(root), reverse=True):
        if later > step:
            aside = free_name(root / f"step_{later}.aside")
            (root / f"step_{later}").rename(aside)
            moved.append(aside)
    if moved:
        sync(root)
    return moved


def free_name(path: Path) -> Path:
    """`path`, or where something stands there the first of `path-2`, `path-3` and so on that is free."""
    names = (path.with_name(f"{path.name}{suffix}") for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    return next(name for name in names if not name.exists())


def needed_bytes(run_dir: str | Path, least: int) -> int:
    """About how much the next checkpoint takes: as the newest one did, and `least` at least."""
    root = Path(run_dir) / "checkpoints"
    for step in sorted(_steps(root), reverse=True):
        sizes = [path.stat().st_size for path in (root / f"step_{step}").rglob("*") if path.is_file()]
        return max(least, sum(sizes))
    return least


def check_space(run_dir: str | Path, needed: int) -> None:
    """Raises NoSpace where the disk of the run has less than `needed` bytes left, and says how much is missing."""
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise NoSpace(
            f"the disk of {run_dir} is full: a checkpoint takes {_size(needed)}, {_size(free)} are left, "
            f"{_size(needed - free)} are missing; the commits that are there stay valid"
        )


def is_full_disk(error: BaseException) -> bool:
    """Whether an error while files were written is the disk's: no space left, or the user's quota used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def give_up_checkpoint(run_dir: str | Path, step: int) -> None:
    """Removes what was written of a checkpoint that did not become one, so that its space is free again."""
    shutil.rmtree(Path(run_dir) / "checkpoints" / f"step_{step}.partial", ignore_errors=True)


def prune_checkpoints(run_dir: str | Path, keep: int, best: int | None = None) -> list[Path]:
    """Removes all committed checkpoints but the newest `keep` (0: none is removed) and that of step `best`.

    With them what an earlier removal left, which has no COMMITTED any more. What cannot be removed now is logged, and
    tried again the next time: the commit before is done, and nothing of the run hangs on it.
    """
    root = Path(run_dir) / "checkpoints"
    steps = sorted(_steps(root))
    committed = [step for step in steps if (root / f"step_{step}" / COMMITTED).is_file()]
    if not keep or not committed:
        return []
    kept = {*committed[-keep:], *(step for step in committed if step == best)}
    doomed = [root / f"step_{step}" for step in steps if step < committed[-1] and step not in kept]
    return [path for path in doomed if _remove(path)]


def clear_unfinished(run_dir: str | Path) -> None:
    """Removes what a killed run was writing, of any step, or cut for other ranks; where no checkpoint is written."""
    directory = Path(run_dir) / "checkpoints"
    for path in [*directory.glob("step_*.partial"), *directory.glob(RESHARDED.format("step_*", "*"))]:
        shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(directory: Path) -> None:
    """Waits until every file below a directory, and its name, are on the disk."""
    for path in (*directory.rglob("*"), directory, directory.parent):
        sync(path)


def _remove(path: Path) -> bool:
    try:
        # Without the marker first: a removal that is cut short must not leave a checkpoint that looks damaged.
        (path / COMMITTED).unlink(missing_ok=True)
        shutil.rmtree(path)
    except OSError as error:  # somebody reads it on a network file system, for one
        log.warning("an old checkpoint is not removed yet: %s", error)
        return False
    return True


def _size(amount: int) -> str:
    return f"{amount / 2**30:.2f} GiB" if amount >= 2**30 else f"{amount / 2**20:.2f} MiB"


def _steps(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    return [int(match[1]) for path in root.iterdir() if (match := _STEP.fullmatch(path.name))]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_json(path: Path, tree: Mapping[str, Any]) -> str:
    """Brings it to the disk, and returns its SHA-256. Piece by piece: it names every group of the run."""
    sum_ = hashlib.sha256()
    with path.open("wb") as file:
        for piece in _pieces(tree):
            file.write(piece.encode())
            sum_.update(piece.encode())
    sync(path)
    return sum_.hexdigest()


def _pieces(tree: Mapping[str, Any]) -> Iterator[str]:
    """An object as JSON. A mapping in it that is no dict is asked for one item after the other, each a line."""
    encoder = json.JSONEncoder(indent=1, sort_keys=True)
    for place, key in enumerate(sorted(tree)):
        yield f"{',' if place else '{'}\n {json.dumps(key)}: "
        if isinstance(tree[key], dict) or not isinstance(tree[key], Mapping):
            yield from encoder.iterencode(tree[key])
            continue
        yield "{"
        for number, (name, value) in enumerate(tree[key].items()):
            yield f"{',' if number else ''}\n  {json.dumps(str(name))}: {json.dumps(value)}"
        yield "\n }"
    yield "\n}\n"


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    sync(path)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    _write(partial, text)
    partial.replace(path)
    sync(path.parent)
