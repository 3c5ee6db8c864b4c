"""One run, step by step, from its first lease to its last commit.

    batch (scored groups in lease order) -> learner -> weights -> gate -> metrics -> evaluation -> commit

The driver decides when; the parts do the work. It holds no state that a restart would miss: what is trained stands in
the committed manifest, what is under way in the ledger.

The order of a commit: every rank writes its part, the manifest and COMMITTED follow, then the ledger is told. A crash
between any two of these leaves either the old commit or the new one as the truth.
"""

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.config import Config
from cluster.evaluator import NAME as EVALUATOR
from cluster.evaluator import Evaluation, Evaluator
from cluster.feed import Feed
from cluster.history import History
from cluster.learners import LearnerGroup, start_learners
from cluster.parts import start_rewards, start_rollouts, wait_for_rollouts
from cluster.plan import parts_of
from cluster.progress import RunProgress
from cluster.recovery import Recovery
from cluster.run_dir import RunDir
from cluster.signals import Stopped, StopRequest
from cluster.summary import write_summary
from cluster.supervise import POLL_S, Supervisor
from cluster.training_data import TrainingData
from cluster.weight_rounds import WeightRounds
from learner.commit import begin_checkpoint, commit_checkpoint, prune_checkpoints
from services.errors import Deadline
from services.records import PolicyVersion
from services.stream.ledger import Ledger
from services.telemetry import Telemetry
from services.weights import MANIFEST

log = logging.getLogger(__name__)

KEEP_VERSIONS = 2
"""Published sets of weights that are kept: the newest, and the one that an actor may still be reading."""

FAILURE_SLACK = 2
"""Batches of prompts with their payload in the ledger beyond the admission limit, to stand in for failed groups."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `stopped` by a signal or not, the steps done, and the steps that the last commit holds."""

    stopped: str | None
    steps: int
    committed_steps: int
    seconds: float

    @property
    def has_commit(self) -> bool:
        return self.committed_steps > 0


class Training:
    """One run, from its first lease to its last commit."""

    def __init__(
        self,
        config: Config,
        run: RunDir,
        history: History,
        data: TrainingData,
        ledger: Ledger,
        supervisor: Supervisor,
        stop: StopRequest,
        weights_dir: Path,
        url: str,
        telemetry: Telemetry,
        console: Console,
        check_stream: Callable[[], None],
    ) -> None:
        self.config = config
        self.run = run
        self.history = history
        self.data = data
        self.ledger = ledger
        self.supervisor = supervisor
        self.stop = stop
        self.weights_dir = weights_dir
        self.url = url
        self.telemetry = telemetry
        self.console = console
        self.check_stream = check_stream
        self.parts = parts_of(config)
        self.feed = Feed(
            data.splits.train,
            seed=config.run.seed,
            epochs=config.run.epochs,
            steps=config.run.steps,
            groups_per_step=config.run.groups_per_step,
        )
        self.recovery = Recovery(ledger, self.feed, history, run, window=self._window(), lease_s=config.rollout.lease_s)
        self.started = time.monotonic()
        self.open_step: int | None = None
        """The step that is begun and not yet recorded."""
        self.rounds: WeightRounds | None = None
        """The transfers of `cluster.weights: collective`; None where weights go by files."""
        self.last_commit_s = 0.0
        self._busy_before = 0.0

    def run_to_the_end(self) -> Outcome:
        with RunProgress(self.console, self.feed.total_steps, self.history.steps_done) as self.progress:
            try:
                self._start(self.config.model_dump(mode="json"))
                while self.history.steps_done < self.feed.total_steps and self._step(self.history.steps_done):
                    pass
                self._finish()
                stopped = None
            except Stopped as signal:
                stopped = str(signal)
                self._commit_in_grace()
            finally:
                self.telemetry.close()
        outcome = Outcome(
            stopped, self.history.steps_done, self.history.committed_steps, round(time.monotonic() - self.started, 3)
        )
        self.run.event(
            "stopped" if stopped else "finished", signal=stopped, steps=outcome.steps, committed=outcome.committed_steps
        )
        write_summary(
            self.run, self.config, outcome.stopped, outcome.committed_steps, outcome.seconds, self.ledger.counts()
        )
        return outcome

    # Coming up

    def _start(self, tree: dict[str, Any]) -> None:
        self._reconcile()
        tick = self._tick
        self.progress.phase("starting")
        # The rollout actors come up beside the learner: building an engine takes as long as loading the policy.
        start_rollouts(
            self.supervisor, self.parts["rollout"], self.config, self.data.idf_text, self.url, self.history.run_id
        )
        checkpoint = self.history.checkpoint
        self.learners: LearnerGroup = start_learners(
            self.supervisor,
            self.parts["learner"],
            self.config,
            tree,
            str(self.run.path),
            total_steps=self.feed.total_steps,
            resume=None if checkpoint is None else str(checkpoint),
            tick=tick,
        )
        start_rewards(self.supervisor, self.parts, self.config, self.url, self.history.run_id, tick)
        wait_for_rollouts(self.supervisor, self.config.cluster.start_s, tick)
        if self.config.cluster.weights == "collective":
            self.rounds = WeightRounds(self.supervisor, self.learners, self.ledger, self.run, self.config)
        self._open_gate(self.history.steps_done)
        self.evaluator = (
            Evaluator(self.supervisor, self.parts["evaluator"], self.config, self.data, tick)
            if self.config.evaluation.every
            else None
        )

    def _reconcile(self) -> None:
        """The ledger becomes the projection of the manifest, before any lease."""
        done = sum(len(groups) for groups in self.history.steps.values()) + len(self.history.failed)
        self.ledger.claim()
        self.feed.register(self.ledger, done + self._window())
        report = self.ledger.reconcile(self.history.steps, self.history.failed)
        self.run.event("reconciled", **report)

    def _window(self) -> int:
        return (self.config.run.max_staleness + 1 + FAILURE_SLACK) * self.config.run.groups_per_step

    def _open_gate(self, step: int) -> float:
        """Publishes the learner's weights as version `step`, lets groups be leased under them; returns seconds."""
        began = time.monotonic()
        version = PolicyVersion(self.history.incarnation, step)
        self.progress.phase("publishing weights")
        limit = self.feed.admission_limit(step, self.config.run.max_staleness)
        if self.rounds is not None:
            self._feed_prompts(step)
            self.rounds.publish(version, limit)
            return time.monotonic() - began
        manifest = self.learners.call(
            "publish",
            tuple(version),
            str(self._published(step)),
            what="the weights to be published",
            seconds=self.config.cluster.publish_s,
        )
        self._feed_prompts(step)
        self.ledger.open_gate(version, manifest, limit)
        published = sorted(self.weights_dir.iterdir(), key=lambda path: path.stat().st_mtime)
        for old in published[:-KEEP_VERSIONS]:
            shutil.rmtree(old, ignore_errors=True)
        return time.monotonic() - began

    def _published(self, step: int) -> Path:
        return self.weights_dir / f"v{self.history.incarnation}_{step}"

    def _feed_prompts(self, step: int) -> None:
        done = sum(len(groups) for groups in self.history.steps.values()) + len(self.history.failed)
        self.feed.register(self.ledger, done + self._window())
        if step < self.feed.total_steps:
            self.feed.top_up(self.ledger, self._window())

    # One step

    def _step(self, step: int) -> bool:
        """One step; False where the prompts are used up."""
        began = time.monotonic()
        groups = self._wait_for_batch(step)
        batch_at = time.monotonic()
        if not groups:
            return False
        self.progress.phase("training")
        self.open_step = step
        result = self.learners.call(
            "train_step",
            step,
            groups,
            self.url,
            self.history.run_id,
            what=f"step {step} to train",
            seconds=self.config.cluster.step_s,
        )
        trained_at = time.monotonic()
        self.history.steps[step] = groups
        publish_s = self._open_gate(step + 1)
        self._record(step, result, began=began, batch_at=batch_at, trained_at=trained_at, publish_s=publish_s)
        self.open_step = None
        if (step + 1) % self.config.checkpoint.every == 0:
            self._commit()
        return True

    def _wait_for_batch(self, step: int) -> list[str]:
        """The groups of a step, in lease order; empty where none are left.

        Raises:
            Deadline: no group was generated, scored or failed for `cluster.batch_s`.
        """
        size = self.config.run.groups_per_step
        oldest = step - self.config.run.max_staleness
        last_counts: dict[str, int] = {}
        moved = time.monotonic()
        while True:
            groups = self.ledger.take(step, size, final=self.feed.all_registered, oldest_step=oldest)
            if groups is not None and self.recovery.hold(step, groups):
                return groups
            counts = self.ledger.counts()
            if counts != last_counts:
                if counts.get("failed") != last_counts.get("failed"):
                    self._note_failures()
                    self._feed_prompts(step)
                last_counts, moved = counts, time.monotonic()
            self.progress.phase(
                f"waiting for the batch: {counts.get('scored', 0)} scored, {counts.get('generated', 0)} generated, "
                f"{counts.get('leased', 0)} leased"
            )
            if time.monotonic() - moved > self.config.cluster.batch_s:
                raise Deadline(
                    waited_for=f"the batch of step {step} ({counts})",
                    who="the rollout actors and the scoring workers",
                    seconds=self.config.cluster.batch_s,
                )
            self.ledger.expire_leases()
            if self.rounds is not None and self._catch_up(step, self.rounds):
                moved = time.monotonic()
            self.ledger.wait_scored(int(POLL_S * 1000))
            self._tick()
            self.supervisor.check()

    def _catch_up(self, step: int, rounds: WeightRounds) -> bool:
        """Weights for actors that came up since they were sent; whether there were any."""
        self.open_step = step  # a signal meanwhile must not ask the learner for a commit
        caught_up = rounds.catch_up()
        self.open_step = None
        return caught_up

    def _note_failures(self) -> None:
        for row in self.ledger.list("failed"):
            if row.group_id not in self.history.failed and row.failure is not None:
                self.history.failed[row.group_id] = row.failure
                self.run.event("group_failed", group_id=row.group_id, failure=row.failure.kind, code=row.failure.code)

    def _record(
        self,
        step: int,
        result: dict[str, Any],
        *,
        began: float,
        batch_at: float,
        trained_at: float,
        publish_s: float,
    ) -> None:
        metrics: dict[str, float] = dict(result["metrics"])
        now = time.monotonic()
        counters = self.supervisor.rollout_counters()
        busy = sum(counter["busy_s"] for counter in counters)
        wall = max(now - began, 1e-9)
        counts = self.ledger.counts()
        metrics |= {
            "time_s": now - self.started,
            "time/step_s": wall,
            "time/wait_batch_s": batch_at - began,
            "time/train_s": trained_at - batch_at,
            "time/publish_s": publish_s,
            "throughput/tokens_per_s": metrics.get("length/response_tokens", 0.0) / wall,
            "idle/learner": (batch_at - began) / wall,
            "idle/rollouts": max(0.0, 1 - max(0.0, busy - self._busy_before) / (wall * max(1, len(counters)))),
            "queue/generated": counts.get("generated", 0),
            "queue/scored": counts.get("scored", 0),
            "ledger/failed": len(self.history.failed),
            "incarnation": self.history.incarnation,
        }
        self._busy_before = busy
        assert self.recovery.batch is not None
        self.run.write_samples(step, self.recovery.batch[1], result["samples"])
        if self.evaluator is not None and (step + 1) % self.config.evaluation.every == 0:
            metrics |= self._evaluate(step)
        self.run.write_metrics(step, metrics)
        self.telemetry.write(step, metrics)
        self.progress.step(step, metrics)

    def _evaluate(self, step: int) -> dict[str, float]:
        assert self.evaluator is not None
        began = time.monotonic()
        self.progress.phase("evaluating")
        rounds = self.rounds
        evaluation: Evaluation
        if rounds is None:
            evaluation = self.evaluator.evaluate(str(self._published(step + 1) / MANIFEST))
        else:
            offer = rounds.offer_to(EVALUATOR)
            evaluation = self.evaluator.evaluate(offer.model_dump_json(), lambda: rounds.serve(offer))
        if evaluation.better_than(self.history.best.get("value")):
            self._export(self.run.policy_best)
            self.history.best = {"value": evaluation.value, "step": step}
        return {**evaluation.metrics, "time/evaluation_s": time.monotonic() - began}

    def _export(self, directory: Path) -> None:
        """Writes the policy beside its place and then swaps: a reader never finds half a model."""
        partial = directory.with_name(directory.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        self.learners.call(
            "export", str(partial), what="the policy to be written", seconds=self.config.checkpoint.timeout_s
        )
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)

    # Commits

    def _commit(self) -> None:
        began = time.monotonic()
        self.progress.phase("writing a checkpoint")
        steps = self.history.steps_done
        partial = begin_checkpoint(self.run.path, steps)
        self.open_step = steps  # nothing else may be asked of the learner while it writes
        self.learners.call(
            "save_checkpoint", str(partial), what=f"checkpoint step_{steps}", seconds=self.config.checkpoint.timeout_s
        )
        self.open_step = None
        self._note_failures()
        commit_checkpoint(partial, self.history.manifest())
        uncommitted = range(self.history.committed_steps, steps)
        self.history.committed_steps = steps  # from here on it is the truth, whatever becomes of the ledger
        self.ledger.commit({step: self.history.steps[step] for step in uncommitted})
        prune_checkpoints(self.run.path, self.config.checkpoint.keep)
        self.last_commit_s = time.monotonic() - began
        self.run.event("committed", step=steps)

    def _commit_in_grace(self) -> None:
        """After a signal: the unfinished step is left for the replay; finished ones are committed if there is time."""
        if self.open_step is not None:
            # The learner's weights hold a part of it, or its line is not written: only the last commit is whole.
            self.history.steps.pop(self.open_step, None)
            return
        left = self.stop.grace_left(self.config.cluster.stop_s)
        if self.history.steps_done == self.history.committed_steps or left < 2 * self.last_commit_s:
            return
        self.stop.heeded = True  # the commit's own waits must not stop at it
        self._commit()

    def _finish(self) -> None:
        if self.history.steps_done > self.history.committed_steps:
            self._commit()
        self.progress.phase("writing the policy")
        self._export(self.run.policy)

    def _tick(self) -> None:
        self.stop.check()
        self.check_stream()
        self.recovery.look()
