"""A stage that trains a model directory on the learner's ranks: `attune sft`, `attune reward-model`."""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster.config import Config
from cluster.learners import learner_environment
from cluster.plan import nodes_of_ray, parts_of, place
from cluster.ray_runtime import ray_cluster, wait_all
from learner.commit import sync, sync_all
from learner.worker import LearnerWorker
from services.errors import Deadline, UserError

POLL_S = 0.5


def refuse_existing(out: Path) -> None:
    """UserError where `out` is there already, and no empty directory."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file, allowed is a directory that is empty or not there yet")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out}: is there already and not empty; choose another")


def train_on_ranks(
    config: Config,
    out: Path,
    method: str,
    arguments: Sequence[Any],
    *,
    what: str,
    finish: Callable[[Path, Any], None] | None = None,
    progress: Callable[[], object] | None = None,
) -> Any:
    """Calls `method` of every rank with (address, port, *arguments, directory), and returns rank 0's answer.

    The ranks have `cluster.step_s` for it; where `progress` is given, whenever its value changes they have it anew. The
    directory is `OUT.writing`, which becomes `out` when `finish(directory, answer)` has returned: a directory of
    the name `out` is a whole model. Arguments go through Ray's object store once.
    """
    part = parts_of(config)["learner"]
    partial = out.with_name(out.name + ".writing")
    shutil.rmtree(partial, ignore_errors=True)
    tree = config.model_dump(mode="json")
    with ray_cluster(config.cluster) as ray:
        place([part], nodes_of_ray(ray.nodes()))
        options = {**part.options(), "runtime_env": {"env_vars": learner_environment(config)}, "max_restarts": 0}
        actor = ray.remote(LearnerWorker).options(**options)
        ranks = [actor.remote(tree, rank, part.count, str(out.parent)) for rank in range(part.count)]
        names = [f"learner-{rank}" for rank in range(part.count)]
        try:
            address, port = wait_all(
                ray,
                [ranks[0].address.remote()],
                seconds=config.cluster.start_s,
                what="the learner's address",
                who=names[:1],
            )[0]
            shared = [ray.put(argument) for argument in arguments]
            references = [
                getattr(rank, method).remote(address, port, *shared, str(partial.resolve())) for rank in ranks
            ]
            answer = answers(
                ray, references, names, seconds=config.cluster.step_s, what=what, progress=progress or (lambda: None)
            )[0]
        finally:
            for rank in ranks:
                ray.kill(rank, no_restart=True)
    if finish is not None:
        finish(partial, answer)
    sync_all(partial)
    if out.exists():
        out.rmdir()
    partial.rename(out)
    sync(out.parent)
    return answer


def answers(
    ray: Any,
    references: Sequence[Any],
    names: Sequence[str],
    *,
    seconds: float,
    what: str,
    progress: Callable[[], object],
) -> list[Any]:
    """The answers of all ranks, with so many seconds from one change of `progress` to the next.

    Raises:
        Deadline: nothing changed for so long; names who did not answer.
        UserError: of a rank. Any rank's error ends the wait at once: the others may be waiting for that rank.
    """
    seen, since = progress(), time.monotonic()
    while True:
        ready, pending = ray.wait(list(references), num_returns=len(references), timeout=POLL_S)
        try:
            ray.get(ready)
        except Exception as error:
            cause = getattr(error, "cause", None)
            raise (cause if isinstance(cause, UserError) else error) from None
        if not pending:
            return ray.get(list(references))
        now = progress()
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > seconds:
            late = [name for name, reference in zip(names, references, strict=True) if reference in pending]
            raise Deadline(waited_for=what, who=", ".join(late), seconds=seconds)
