"""The learner's part of a checkpoint, and the policy out of one.

    engine/        DeepSpeed's: weights, value function, optimiser state, a file a rank
    learner.json   what else a step leaves to the next: running standardiser, KL controller, count of updates
    model/         configuration and tokenizer, so that a checkpoint alone is enough to export the policy

There is no random state to keep: nothing is drawn in a forward pass (dropout is off), and everything that is drawn
elsewhere is seeded by the run's seed and the step. `learner.commit` makes a checkpoint of the directory.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learner.commit import NOT_SHARED, NoSpace, Written, is_full_disk, written
from learner.engine import Engine
from learner.ppo import TrainerState
from learner.publish import BUCKET_BYTES, ShardWriter, buckets_of, published_tensors, save_model_files
from services.errors import UserError

SCHEMA_VERSION = 1

FULL_BYTES = 2**20
"""A disk with less than this left, when a write has failed, is full."""


@dataclass(frozen=True)
class LearnerState:
    """What learner.json holds. `names` are the tensors that the policy is published as."""

    updates: int
    world_size: int
    dtype: str
    names: tuple[str, ...]
    trainer: TrainerState


def save_checkpoint(engine: Engine, trainer: TrainerState, tokenizer: Any, directory: str | Path) -> Written:
    """Writes the learner's part into `directory`, and says what is there then.

    Collective; the driver commits it when every rank has returned, and what they wrote is what it sees.

    Raises:
        NoSpace: this rank found the disk full.
        UserError: the run has no directory here.
    """
    path = Path(directory)
    try:
        path.mkdir(exist_ok=True)  # without parents: they are there wherever the driver's directory is seen
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} is not there on {os.uname().nodename}. {NOT_SHARED}") from error
    try:
        _save(engine, trainer, tokenizer, path)
        return written(path)
    except (OSError, RuntimeError) as error:
        # torch's writer says that a write failed, not why.
        if is_full_disk(error) or shutil.disk_usage(path).free < FULL_BYTES:
            raise NoSpace(f"the disk of {path} is full: {error}") from error
        raise


def _save(engine: Engine, trainer: TrainerState, tokenizer: Any, path: Path) -> None:
    engine.save(str(path))
    if engine.rank != 0:
        return
    names = list(published_tensors(engine.lm))
    state = {
        "schema_version": SCHEMA_VERSION,
        "updates": engine.updates_done,
        "world_size": engine.world_size,
        "dtype": engine.section.dtype,
        "names": names,
        "trainer": trainer.to_dict(),
    }
    (path / "learner.json").write_text(json.dumps(state, indent=1))
    (path / "model").mkdir(exist_ok=True)
    save_model_files(engine.lm, tokenizer, path / "model")


def load_checkpoint(engine: Engine, directory: str | Path) -> TrainerState:
    """Restores the engine and returns the rest of the state. Collective.

    Training goes on bit for bit on the same number of ranks; on another one the weights and moments are the same, and
    what follows differs by the order of the sums alone.

    Raises:
        UserError: it holds no learner state, or was written in another dtype.
    """
    state = read_state(directory)
    if engine.section.dtype != state.dtype:
        raise UserError(
            f"learner.dtype is {engine.section.dtype}, but {directory} was written with {state.dtype}; "
            f"resume with learner.dtype={state.dtype}, or export the checkpoint and start a new run from it"
        )
    engine.load(str(directory), updates_done=state.updates, ranks=state.world_size)
    return state.trainer


def read_state(directory: str | Path) -> LearnerState:
    """learner.json of a checkpoint. UserError: it is missing or of another version."""
    path = Path(directory) / "learner.json"
    if not path.is_file():
        raise UserError(f"{directory} is not a learner's checkpoint: learner.json is missing")
    state = json.loads(path.read_text())
    if state.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema_version is {state.get('schema_version')!r}, this version reads {SCHEMA_VERSION}"
        )
    return LearnerState(
        updates=state["updates"],
        world_size=state["world_size"],
        dtype=state["dtype"],
        names=tuple(state["names"]),
        trainer=TrainerState.from_dict(state["trainer"]),
    )


def export_policy(checkpoint: str | Path, directory: str | Path, bucket_bytes: int = BUCKET_BYTES) -> None:
    """Writes the policy of a checkpoint as a Hugging Face model directory, in one process and without ranks.

    Takes the memory of the whole model in float32. Call it on what `learner.commit.read_commit` has verified.
    """
    source, target = Path(checkpoint), Path(directory)
    state = read_state(source)
    target.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source / "model", target, dirs_exist_ok=True)
    tensors = _policy_tensors(source, state)
    buckets = buckets_of([(name, t.numel() * t.element_size()) for name, t in tensors.items()], bucket_bytes)
    shards = ShardWriter(target, len(buckets))
    for names in buckets:
        shards.write({name: tensors[name] for name in names})
    shards.finish()


def _policy_tensors(checkpoint: Path, state: LearnerState) -> dict[str, Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    merged: Any = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag="engine")
    dtype = getattr(torch, state.dtype)
    return dict(_named(merged, state.names, dtype))


def _named(merged: Mapping[str, Tensor], names: tuple[str, ...], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        tensor = merged[f"lm.{name}"]
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor
