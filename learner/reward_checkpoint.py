"""What a training of a model that scores leaves behind as it goes, so that a killed one goes on where it was.

    work/checkpoints/step_N   after N updates: the engine's state, and `Progress` in the manifest (`learner.commit`)
    work/kept_N               the best weights so far, those of N updates, as a model directory
    work/metrics.jsonl        a line an evaluation

A checkpoint is written after every evaluation, and names the weights that were best by then: those are removed only
when a later one is committed that names others. Nothing is drawn in a forward pass, and what an epoch holds is a
function of the seed, so what goes on from a checkpoint comes to the same as what was never interrupted.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from learner.commit import (
    Written,
    begin_checkpoint,
    check_written,
    commit_checkpoint,
    prune_checkpoints,
    read_commit,
    sync,
    sync_all,
    written,
)
from learner.engine import Engine, texts_of_ranks
from learner.publish import export
from learner.reward_training import Progress, Report


class TrainingFiles:
    """The files of one training under `work`. Every method but `report` is collective."""

    def __init__(self, engine: Engine, tokenizer: Any, work: str | Path) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._work = Path(work)
        self._metrics = self._work / "metrics.jsonl"
        if engine.rank == 0:
            self._work.mkdir(parents=True, exist_ok=True)

    def load(self, checkpoint: str) -> Progress:
        """Puts the engine where the checkpoint was written, and cuts the lines of what came after it.

        UserError: it is damaged.
        """
        manifest = read_commit(checkpoint).manifest
        progress = Progress(**manifest["progress"])
        self._engine.load(checkpoint, updates_done=progress.updates, ranks=manifest["ranks"])
        if self._engine.rank == 0 and self._metrics.exists():
            lines = self._metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            partial = self._metrics.with_suffix(".partial")
            partial.write_text("".join(lines[: progress.reports]), encoding="utf-8")
            sync(partial)
            partial.replace(self._metrics)
        return progress

    def report(self, each: Report) -> None:
        """Adds a line; rank 0 alone writes."""
        if self._engine.rank == 0:
            with self._metrics.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(asdict(each)) + "\n")

    def keep(self) -> None:
        """Writes the weights as they are, to the disk: the next commit names them, and those before them go."""
        directory = self._kept(self._engine.updates_done)
        export(self._engine, self._tokenizer, directory)
        if self._engine.rank == 0:
            sync_all(directory)

    def save(self, progress: Progress) -> None:
        """Commits where the training stands; earlier checkpoints, and weights that are no longer the best, go.

        UserError: what the ranks wrote is not what rank 0 sees: the directory is not shared.
        """
        directory = self._work / "checkpoints" / f"step_{progress.updates}.partial"
        if self._engine.rank == 0:
            begin_checkpoint(self._work, progress.updates)
        torch.distributed.barrier()
        self._engine.save(str(directory))
        parts = texts_of_ranks(json.dumps(asdict(written(directory))), self._engine.device)
        if self._engine.rank == 0:
            check_written(directory, ((f"rank {rank}", Written(**json.loads(part))) for rank, part in enumerate(parts)))
            commit_checkpoint(directory, {"progress": asdict(progress), "ranks": self._engine.world_size})
            prune_checkpoints(self._work, keep=1)
            best = self._kept(progress.kept.get("updates"))
            for path in self._work.glob("kept_*"):
                if path != best:
                    shutil.rmtree(path)

    def finish(self, updates: int, directory: str | Path) -> None:
        """Copies the weights that were kept after so many updates, and the lines, to a model directory."""
        if self._engine.rank == 0:
            shutil.copytree(self._kept(updates), directory)
            training = Path(directory) / "training"
            training.mkdir()
            shutil.copyfile(self._metrics, training / "metrics.jsonl")

    def _kept(self, updates: int | None) -> Path:
        return self._work / f"kept_{updates}"
