"""The model directories that a run leaves, policy/ and policy-best/, and the mark in each that says what it holds.

A model is written beside its place, as `NAME.partial`; `seal` brings it to the disk and writes the mark last, and
`put_in_place` swaps. So a partial with a mark is whole, and what stands in place without the mark that the last commit
calls for is the model of some other step, however whole it looks.
"""

import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.history import History
from cluster.run_dir import RunDir
from learner.commit import free_name, read_manifest, sync
from services.errors import UserError

log = logging.getLogger(__name__)

MARK = "attune.json"
POLL_S = 0.1


def policy_mark(run: RunDir, history: History) -> dict[str, Any]:
    """What policy/ holds once the run is done: its last commit, named by the incarnation that wrote it, too.

    Raises:
        UserError: the commit is damaged.
    """
    steps = history.committed_steps
    manifest = read_manifest(run.checkpoints / f"step_{steps}") if steps else history.manifest()
    return {key: manifest[key] for key in ("run_id", "incarnation", "step")}


def best_mark(history: History) -> dict[str, Any]:
    """What policy-best/ holds: the model after so many steps, and the figure that chose it. A best there must be."""
    return {"run_id": history.run_id, "step": int(history.best["step"]) + 1, "value": history.best["value"]}


def partial_of(directory: Path) -> Path:
    return directory.with_name(directory.name + ".partial")


def seal(directory: Path, mark: Mapping[str, Any]) -> None:
    """Brings every file of a model to the disk, and then the mark: a power cut leaves no mark on a torn model."""
    for path in (*directory.rglob("*"), directory):
        sync(path)
    (directory / MARK).write_text(_text(mark), encoding="utf-8")
    sync(directory / MARK)
    sync(directory)


def is_marked(directory: Path, mark: Mapping[str, Any]) -> bool:
    """Whether a directory holds the model that `mark` describes, whole."""
    try:
        return (directory / MARK).read_bytes() == _text(mark).encode()
    except OSError:
        return False


def put_in_place(directory: Path) -> None:
    """Swaps the sealed partial of `directory` in: a reader never finds half a model."""
    replaced = directory.with_name(directory.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if directory.exists():
        directory.rename(replaced)
    partial_of(directory).rename(directory)
    sync(directory.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def take_best(run: RunDir, history: History) -> None:
    """Puts the best model in place where the last commit names it and it is written, but not there yet."""
    if history.best and is_marked(partial_of(run.policy_best), best_mark(history)):
        put_in_place(run.policy_best)


def settle_best(run: RunDir, history: History, timeout_s: float, tick: Callable[[], None]) -> None:
    """Makes policy-best/ the model that the commit names which the run goes on from.

    After a crash it is, or waits beside its place. After a start from an older commit it may be of a step that is gone:
    then it is set aside, and the best is written again from the commit that was kept of it; where there is none, the
    best is forgotten and the next evaluation is the first.
    """
    take_best(run, history)
    shutil.rmtree(partial_of(run.policy_best), ignore_errors=True)
    if history.best and is_marked(run.policy_best, best_mark(history)):
        return
    if run.policy_best.exists():
        aside = free_name(run.policy_best.with_name(f"{run.policy_best.name}.aside"))
        run.policy_best.rename(aside)
        log.warning("the best policy is not of the commit that the run goes on from, and is set aside: %s", aside)
        run.event("policy_best_set_aside", path=str(aside))
    if history.best:
        try:
            _write_best_again(run, history, timeout_s, tick)
        except UserError as error:
            log.warning("the best policy, of step %d, is lost: %s", int(history.best["step"]), error)
            run.event("best_forgotten", best=history.best, why=str(error))
            history.best = {}


def _write_best_again(run: RunDir, history: History, timeout_s: float, tick: Callable[[], None]) -> None:
    mark = best_mark(history)
    checkpoint, partial = run.checkpoints / f"step_{mark['step']}", partial_of(run.policy_best)
    read_manifest(checkpoint)
    # In a process of its own: it takes the memory of the whole model, and torch, which the driver does without.
    command = [sys.executable, "-m", "cluster", "export", str(checkpoint), str(partial)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            said = _wait(process, timeout_s, tick)
        finally:
            process.kill()
    if process.returncode != 0:
        raise UserError(f"{checkpoint} could not be exported: {said}")
    seal(partial, mark)
    put_in_place(run.policy_best)


def _wait(process: subprocess.Popen[str], timeout_s: float, tick: Callable[[], None]) -> str:
    """What a process says until its end; UserError where that does not come in time."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            return process.communicate(timeout=POLL_S)[0].strip()
        except subprocess.TimeoutExpired:
            tick()
    raise UserError(f"its export did not end within {timeout_s:.0f} s")


def _text(mark: Mapping[str, Any]) -> str:
    return json.dumps({"schema_version": 1, **mark}) + "\n"
