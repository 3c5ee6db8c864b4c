"""A commit of a run: the step from which on what was trained is the truth (invariant 1).

Every rank writes its part, the manifest and COMMITTED follow, then the ledger is told. A crash between any two of these
leaves either the old commit or the new one as the truth.
"""

from cluster.batches import Batches
from cluster.history import History
from cluster.learners import LearnerGroup
from cluster.model_dirs import take_best
from cluster.run_dir import RunDir
from cluster.running import PartFailed
from learner.checkpoint_config import CheckpointSection
from learner.commit import (
    NoSpace,
    begin_checkpoint,
    check_space,
    check_written,
    commit_checkpoint,
    give_up_checkpoint,
    is_full_disk,
    needed_bytes,
    prune_checkpoints,
    replace_manifest,
)

LEAST_BYTES = 12
"""Of a checkpoint, a parameter: its float32 master and Adam's two moments."""


def commit(run: RunDir, section: CheckpointSection, history: History, learners: LearnerGroup, batches: Batches) -> None:
    """Commits the steps that are done: checkpoint, manifest, ledger; removes the checkpoints that are kept no more.

    Raises:
        NoSpace: the disk is full, and by how much. The commit before is the truth, as with the next ones.
        UserError: what the ranks wrote is not what the driver sees: the run directory is not shared.
        PartFailed, OSError: what the learner, or the disk, said while the checkpoint was written.
        LedgerBehind: the commit is valid, and the ledger cannot be told of it.
    """
    steps = history.steps_done
    _write(run, section, history, learners, batches)
    uncommitted = range(history.committed_steps, steps)
    history.committed_steps = steps  # from here on it is the truth, whatever becomes of the ledger
    history.committed_failures = len(history.failed)
    take_best(run, history)
    batches.commit({step: history.steps[step] for step in uncommitted})
    best = history.best.get("step") if section.keep_best else None
    prune_checkpoints(run.path, section.keep, None if best is None else int(best) + 1)
    run.event("committed", step=steps)


def _write(run: RunDir, section: CheckpointSection, history: History, learners: LearnerGroup, batches: Batches) -> None:
    steps = history.steps_done
    needed = needed_bytes(run.path, learners.parameters * LEAST_BYTES)
    check_space(run.path, needed)
    partial = begin_checkpoint(run.path, steps)
    try:
        parts = learners.answers(
            "save_checkpoint", str(partial), what=f"checkpoint step_{steps}", seconds=section.timeout_s
        )
        check_written(partial, zip((rank.name for rank in learners.ranks), parts, strict=True))
        batches.note_failures()
        commit_checkpoint(partial, history.manifest())
    except (PartFailed, OSError) as error:
        if isinstance(error.__cause__, NoSpace) or is_full_disk(error):
            give_up_checkpoint(run.path, steps)
            check_space(run.path, needed)  # says how much is missing
        raise


def commit_failures(run: RunDir, history: History) -> None:
    """What failed after the last commit goes into it: no step follows whose commit would hold it.

    Where no step was ever trained there is no commit to hold it: events.jsonl alone names the groups.
    """
    if history.committed_steps == 0 or history.committed_failures == len(history.failed):
        return
    replace_manifest(run.checkpoints / f"step_{history.committed_steps}", history.manifest())
    history.committed_failures = len(history.failed)
    run.event("failures_committed", step=history.committed_steps, failed=len(history.failed))
