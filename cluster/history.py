"""What a run already came to: which commit it goes on from, and the manifest of the next one.

The committed manifest is the truth (invariant 1). It is cumulative, so that an older commit can be pruned: the group
ids of every step it contains, the groups that failed and why, the best evaluation so far.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.config import Config
from cluster.run_dir import RunDir
from learner.commit import Commit, latest_committed, read_commit, set_aside_after
from learner.config import LearnerSection
from services.errors import UserError
from services.records import Failure, epoch_of
from services.stream.account import Settled

log = logging.getLogger(__name__)

FIXED = (
    ("run", "seed"),
    ("run", "groups_per_step"),
    ("data",),
    ("policy",),
    ("rollout", "samples"),
    ("rollout", "temperature"),
    ("rollout", "top_p"),
    ("rollout", "top_k"),
    ("rollout", "truncation"),
)
"""What a resumed run may not change: lease order, batches and the meaning of what is committed, or is not yet and will
be trained on as it was sampled, hang on it."""


class Steps(Mapping[int, list[str]]):
    """The group ids of steps 0 .. n-1, in the order in which they were trained on.

    Each step as text: they are all that a driver holds more of with every step, and lists of strings are four times as
    large.
    """

    def __init__(self, steps: Mapping[int, Sequence[str]] | None = None) -> None:
        """Raises ValueError where a step is left out."""
        self._texts: list[str] = []
        self.groups = 0
        """Of all steps."""
        for step, groups in sorted((steps or {}).items()):
            self[step] = groups

    def __getitem__(self, step: int) -> list[str]:
        if not 0 <= step < len(self._texts):
            raise KeyError(step)
        return json.loads(self._texts[step])

    def __setitem__(self, step: int, groups: Sequence[str]) -> None:
        if step != len(self._texts):
            raise ValueError(f"step {step} does not follow {len(self._texts)} steps")
        self._texts.append(json.dumps(list(groups)))
        self.groups += len(groups)

    def forget_from(self, step: int) -> None:
        """As if this step and what follows it had not been."""
        self.groups -= sum(len(self[later]) for later in range(step, len(self)))
        del self._texts[step:]

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self._texts)))

    def __len__(self) -> int:
        return len(self._texts)


@dataclass
class History:
    """The steps that are in the trained weights: committed ones, and those done since."""

    run_id: str
    incarnation: int
    steps: Steps = field(default_factory=Steps)
    failed: dict[str, Failure] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    """Of the evaluation that chose policy-best: `step`, `value`, and `measure`, what that is of."""
    revisions: dict[int, list[str]] = field(default_factory=dict)
    """Those of the reward's recipe, interventions among them, by the first step that they scored."""
    skipped: dict[int, str] = field(default_factory=dict)
    """Steps whose batch was not trained on, and why (`learner.bad_batch`)."""
    checkpoint: Path | None = None
    committed_steps: int = 0
    committed_failures: int = 0
    """How many of `failed` the last commit holds."""

    @property
    def steps_done(self) -> int:
        return len(self.steps)

    @property
    def groups_done(self) -> int:
        return self.steps.groups

    def note_revisions(self, step: int, revisions: Sequence[str]) -> bool:
        """Under which revisions of the reward's recipe a step was scored; True where they are not the last step's."""
        before = self.revisions[max(self.revisions)] if self.revisions else None
        if before == list(revisions):
            return False
        self.revisions[step] = list(revisions)
        return before is not None

    def skipped_in_a_row(self) -> int:
        """Steps at the end of what is done that were skipped, one after the other."""
        count = 0
        while self.steps_done - 1 - count in self.skipped:
            count += 1
        return count

    def epochs_committed(self) -> int:
        """Epochs of which every group is committed or has failed: batches are taken in lease order, epoch by epoch."""
        return epoch_of(self.steps[self.committed_steps - 1][-1]) if self.committed_steps else 0

    def settled(self, epochs: int) -> Settled:
        """How many groups of the first `epochs` epochs are committed, and how many have failed."""
        committed = (group for step in range(self.committed_steps) for group in self.steps[step])
        return Settled(
            epochs,
            committed=sum(epoch_of(group) < epochs for group in committed),
            failed=sum(epoch_of(group) < epochs for group in self.failed),
        )

    def best_by(self, measure: str) -> tuple[float | None, str | None]:
        """The best value so far by this measure, None where there is none; and why the one there is does not count."""
        before = self.best.get("measure", measure)  # commits of older versions do not say
        if before != measure:
            return None, f"it was chosen by {before}, and the recipe now chooses by {measure}"
        return self.best.get("value"), None

    def manifest(self) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "run_id": self.run_id,
            "incarnation": self.incarnation,
            "step": self.steps_done,
            "steps": self.steps,
            "failed": {group: failure.model_dump(mode="json") for group, failure in self.failed.items()},
            "best": self.best,
            "revisions": {str(step): revisions for step, revisions in self.revisions.items()},
            "skipped": {str(step): why for step, why in self.skipped.items()},
        }


def open_history(run: RunDir, config: Config, resume: str, run_id: str) -> History:
    """Decides what the run goes on from; changes nothing yet, but notes in events.jsonl what it passed over.

    `resume` is `auto` (the newest valid commit, or the beginning), `never` (a new run in an empty directory), or the
    path of a committed checkpoint of this run.

    Raises:
        UserError: `never` with a run there already, a checkpoint that is not one, or a recipe that this run cannot go
            on with.
    """
    exists = run.last_incarnation() > 0
    if resume == "never" and exists:
        raise UserError(
            f"run directory {run.path}: holds a run already; --resume auto goes on with it, or choose another"
        )
    commit: Commit | None = None
    if resume in ("auto", "never"):
        latest = latest_committed(run.path)
        commit = latest.commit
        for problem in latest.problems:
            log.error("%s; the commit before it is used", problem)
            run.event("checkpoint_refused", problem=problem)
    else:
        commit = read_commit(Path(resume).absolute())
        if Path(resume).resolve().parent != run.checkpoints.resolve():
            raise UserError(f"--resume {resume}: is no checkpoint of the run in {run.path}; give --run-dir too")
    if exists:
        _check_recipe(run, config)
    history = History(run_id=run_id, incarnation=run.last_incarnation() + 1)
    if commit is not None:
        manifest = commit.manifest
        history.run_id = manifest["run_id"]
        history.steps = Steps({int(step): groups for step, groups in manifest["steps"].items()})
        history.failed = {group: Failure.model_validate(failure) for group, failure in manifest["failed"].items()}
        history.best = dict(manifest["best"])
        history.revisions = {int(step): list(found) for step, found in manifest.get("revisions", {}).items()}
        history.skipped = {int(step): why for step, why in manifest.get("skipped", {}).items()}
        history.checkpoint = commit.path
        history.committed_steps = history.steps_done
        history.committed_failures = len(history.failed)
    return history


def begin_incarnation(run: RunDir, history: History, prompts: Mapping[str, Any]) -> None:
    """Cuts the run directory back to what the run goes on from, and notes that it does.

    Later checkpoints first: cut off in between, the next start must not go on from one whose steps have lost their
    lines.

    `prompts` is the fingerprint of the training prompts: the next start is refused with others.
    """
    run.steps_done = history.steps_done
    for aside in set_aside_after(run.path, history.steps_done):
        log.warning("a checkpoint that the run does not go on from is set aside: %s", aside)
        run.event("checkpoint_set_aside", path=str(aside))
    run.cut_back(history.steps_done)
    run.event(
        "start",
        run_id=history.run_id,
        incarnation=history.incarnation,
        step=history.steps_done,
        prompts=dict(prompts),
    )


def _check_recipe(run: RunDir, config: Config) -> None:
    before = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    now = config.model_dump(mode="json")
    for path in FIXED:
        old, new = _at(before, path), _at(now, path)
        if old != new:
            key = ".".join(path)
            raise UserError(
                f"{key}: the run in {run.path} was started with {old!r}, the recipe now says {new!r}; a resumed run "
                "cannot change it: choose another run directory"
            )
    old, new = _value_function(before.get("learner")), _value_function(now["learner"])
    if old is not None and old != new:
        raise UserError(
            f"learner: the run in {run.path} was started with value function {old!r}, the recipe now asks for {new!r}; "
            "a resumed run cannot change it: choose another run directory"
        )
    changed = sorted(_changed(before, now, ()))
    if changed:
        run.event("recipe_changed", keys=changed)


def _value_function(learner: Any) -> str | None:
    """The value function that is trained, `none` where there is none; None where the section is of another version."""
    try:
        section = LearnerSection.model_validate(learner)
    except ValidationError:
        return None
    return section.value_function if section.needs_values else "none"


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _changed(before: Any, now: Any, path: tuple[str, ...]) -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            key for name in {**before, **now} for key in _changed(before.get(name), now.get(name), (*path, str(name)))
        ]
    return [] if before == now else [".".join(path)]
