"""One run, step by step, from its first lease to its last commit.

    batch (scored groups in lease order) -> learner -> weights -> gate -> metrics -> evaluation -> commit

The driver decides when; the parts do the work. It holds no state that a restart would miss: what is trained stands in
the committed manifest, what is under way in the ledger. So a learner that lost a rank is started again inside the run:
the run goes back to its last commit, under a new incarnation, by the very steps of a start with `--resume auto`.
"""

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.batches import Batches
from cluster.commits import commit, commit_failures
from cluster.config import Config
from cluster.distributions import failure_metrics, histograms
from cluster.evaluator import NAME as EVALUATOR
from cluster.evaluator import Evaluation, Evaluator
from cluster.flow import Flow
from cluster.history import History, begin_incarnation, open_history
from cluster.learners import start_learners
from cluster.model_dirs import best_mark, partial_of, policy_mark, put_in_place, seal, settle_best
from cluster.parts import RewardParts, start_rollouts, wait_for_rollouts
from cluster.plan import Part
from cluster.progress import RunProgress
from cluster.room import plan_with_room, room_for_learner
from cluster.run_dir import RunDir
from cluster.running import GoBack, LearnerDied, PartFailed
from cluster.signals import Stopped, StopRequest
from cluster.status import StatusFile
from cluster.step_record import Timing, ledger_metrics, reward_revisions, silent_sources
from cluster.summary import Outcome, say_end
from cluster.supervise import POLL_S, Supervisor
from cluster.training_data import TrainingData
from cluster.weight_rounds import WeightRounds
from learner.commit import clear_unfinished
from learner.errors import BadBatch
from reward_server.placement import placed_models
from services.records import PolicyVersion
from services.stream.errors import StreamLost
from services.stream.ledger import Ledger
from services.telemetry import CLOSE_S, Telemetry
from services.weights import MANIFEST

log = logging.getLogger(__name__)

KEEP_VERSIONS = 2
"""Published sets of weights that are kept: the newest, and the one that an actor may still be reading."""


def remove_older(weights_dir: Path) -> None:
    """Removes published sets of weights but the newest, by their versions: a clock may be set back meanwhile."""
    published = sorted(weights_dir.iterdir(), key=lambda path: [int(part) for part in path.name[1:].split("_")])
    for old in published[:-KEEP_VERSIONS]:
        shutil.rmtree(old, ignore_errors=True)


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
        self.batches = Batches(config, run, history, data, ledger)
        self.rewards: RewardParts | None = None
        self.evaluator: Evaluator | None = None
        self.started = time.monotonic()
        self.open_step: int | None = None
        """The step that is begun and not yet recorded."""
        self.rounds: WeightRounds | None = None
        """The transfers of `cluster.weights: collective`; None where weights go by files."""
        self.last_commit_s = 0.0
        placed = {} if config.reward.worker.url else placed_models(config.reward)
        self._flow = Flow({name: source.replicas for name, source in placed.items()})
        self._commit_s: dict[str, float] = {}
        self._silent: set[str] = set()

    def run_to_the_end(self) -> Outcome:
        total = self.batches.feed.total_steps
        self.status = StatusFile(self.run, total)
        with RunProgress(self.console, total, self.history.steps_done, self.status) as self.progress:
            try:
                while True:
                    try:
                        self._begin()
                        while self.history.steps_done < self.batches.feed.total_steps and self._step():
                            pass
                        self._finish()
                        break
                    except GoBack as fault:
                        self._go_back(fault)
                stopped = None
            except Stopped as signal:
                stopped = str(signal)
                self._commit_in_grace()
            except StreamLost:
                self.supervisor.watch()  # why it is down for good says more than that it is silent
                raise
            finally:
                self.telemetry.close(self._watching_s())
        outcome = Outcome(
            stopped, self.history.steps_done, self.history.committed_steps, round(time.monotonic() - self.started, 3)
        )
        self.status.end("stopped" if stopped else "finished")
        say_end(self.run, self.config, outcome, self.ledger.counts())
        return outcome

    def _watching_s(self) -> float:
        """Seconds that the trackers may take to end: after a signal there is the summary to write in the same grace."""
        if self.stop.signal_name is None:
            return CLOSE_S
        return max(0.0, min(CLOSE_S, self.stop.grace_left(self.config.cluster.stop_s) / 2))

    # Coming up, and coming up again

    def _begin(self) -> None:
        """Brings the run to the point where the manifest stands: the ledger, the learner, the gate."""
        clear_unfinished(self.run.path)
        self.batches.reconcile()  # before any tick: what the driver before left would look like a loss of this one's
        settle_best(self.run, self.history, self.config.checkpoint.timeout_s, self._tick)
        parts = self._plan()
        self.supervisor.planned["learner"] = parts["learner"]
        if self.rewards is None:
            self.progress.phase("starting")
            # What is started later than the rollout actors, whose missing ones start wherever there is room.
            later = ("scoring_worker", EVALUATOR)
            self.supervisor.planned |= {name: parts[name] for name in later if name in parts}
            # All come up side by side: building an engine takes as long as loading the policy.
            start_rollouts(
                self.supervisor, parts["rollout"], self.config, self.data.idf_text, self.url, self.history.run_id
            )
            self.rewards = RewardParts(self.supervisor, parts, self.config, self.url, self.history.run_id)
        # After a node was lost there may be more of them than the plan has: they would sit where the ranks have to go.
        self.supervisor.end_rollouts(len(self.supervisor.rollouts) - parts["rollout"].count)
        self._start_learners(parts["learner"])
        self.rewards.wait(self.config.cluster.start_s, self._tick)
        wait_for_rollouts(self.supervisor, parts["rollout"].count, self.config.cluster.start_s, self._tick)
        if self.config.cluster.weights == "collective":
            self.rounds = WeightRounds(self.supervisor, self.learners, self.ledger, self.run, self.config)
        self._flow.begin()
        self._open_gate(self.history.steps_done)
        if self.evaluator is None and self.config.evaluation.every:
            self.evaluator = Evaluator(self.supervisor, parts["evaluator"], self.config, self.data, self._tick)

    def _plan(self) -> dict[str, Part]:
        """The parts as the cluster can hold them now; after a node was lost, it is waited for."""
        wait_s = self.config.cluster.start_s if self.rewards is not None else 0.0
        return plan_with_room(self.config, self.supervisor, self._wait_for_room, wait_s)

    def _wait_for_room(self) -> None:
        self.progress.phase("waiting for the cluster to have room for the learner")
        self._tick()
        self.supervisor.check()

    def _start_learners(self, part: Part) -> None:
        checkpoint = self.history.checkpoint
        part, room = room_for_learner(self.config, self.supervisor, part, self._wait_for_room)
        if part.count < self.config.learner.ranks:
            log.warning("the learner goes on with %d of %d ranks", part.count, self.config.learner.ranks)
            self.run.event("fewer_ranks", ranks=part.count, wanted=self.config.learner.ranks)
        self.learners = start_learners(
            self.supervisor,
            part,
            self.config,
            self.config.model_dump(mode="json"),
            str(self.run.path),
            total_steps=self.batches.feed.total_steps,
            resume=None if checkpoint is None else str(checkpoint),
            tick=self._tick,
            room=room,
        )

    def _go_back(self, fault: GoBack) -> None:
        """To the last commit, as a start with `--resume auto` would: the same files, cut back the same way.

        Raises:
            GoBack: the fault, where it came once too often.
        """
        self.open_step = None
        self.rounds = None
        self.history = open_history(self.run, self.config, "auto", self.history.run_id)
        self.run.event("learner_died" if isinstance(fault, LearnerDied) else "ledger_behind", error=str(fault))
        self.ledger.close_gate()
        self.supervisor.stop_learners()
        pause = self.supervisor.budget.spend(fault.kind)
        if pause is None:
            raise fault
        log.warning("%s; the run goes back to step %d in %.1f s", fault, self.history.steps_done, pause)
        self.progress.phase(f"going back to the commit of step {self.history.steps_done}")
        end = time.monotonic() + pause
        while time.monotonic() < end:
            self._tick()
            self.supervisor.check()
            time.sleep(POLL_S)
        begin_incarnation(self.run, self.history, self.data.fingerprint)
        self.batches = Batches(self.config, self.run, self.history, self.data, self.ledger)
        self.progress.back_to(self.history.steps_done)

    def _open_gate(self, step: int) -> float:
        """Publishes the learner's weights as version `step`, lets groups be leased under them; returns seconds."""
        began = time.monotonic()
        version = PolicyVersion(self.history.incarnation, step)
        self.progress.phase("publishing weights")
        limit = self.batches.limit(step)
        if self.rounds is not None:
            self.batches.give_prompts(step)
            self.rounds.publish(version, limit)
            return time.monotonic() - began
        manifest = self.learners.call(
            "publish",
            tuple(version),
            str(self._published(step)),
            what="the weights to be published",
            seconds=self.config.cluster.publish_s,
        )
        self.batches.give_prompts(step)
        self.ledger.open_gate(version, manifest, limit)
        remove_older(self.weights_dir)
        return time.monotonic() - began

    def _published(self, step: int) -> Path:
        return self.weights_dir / f"v{self.history.incarnation}_{step}"

    # One step

    def _step(self) -> bool:
        """One step; False where the prompts are used up."""
        step = self.history.steps_done
        began = time.monotonic()
        groups = self.batches.wait(step, self._between_waits, self.progress.phase)
        batch_at = time.monotonic()
        if not groups:
            return False
        self.progress.phase("training")
        self.open_step = step
        result = self._train(step, groups)
        trained_at = time.monotonic()
        self.history.steps[step] = groups
        if result["bad"] is not None:
            self._skip(step, result["bad"])
        publish_s = self._open_gate(step + 1)
        self._record(step, result, began=began, batch_at=batch_at, trained_at=trained_at, publish_s=publish_s)
        self.open_step = None
        if (step + 1) % self.config.checkpoint.every == 0:
            self._commit()
        return True

    def _train(self, step: int, groups: list[str]) -> dict[str, Any]:
        try:
            return self.learners.call(
                "train_step",
                step,
                groups,
                self.url,
                self.history.run_id,
                what=f"step {step} to train",
                seconds=self.config.cluster.step_s,
            )
        except PartFailed as failed:
            if isinstance(failed.__cause__, BadBatch):
                kept = self.run.write_bad_batch(step, self.batches.under_way(step), str(failed.__cause__))
                self.run.event("bad_batch", step=step, why=str(failed.__cause__), action="stop", samples=str(kept))
                raise PartFailed(f"{failed.__cause__}; its samples are in {kept}") from failed
            raise

    def _skip(self, step: int, why: str) -> None:
        """The step's batch was not trained on.

        Raises:
            PartFailed: so were too many before it.
        """
        self.history.skipped[step] = why
        kept = self.run.write_bad_batch(step, self.batches.under_way(step), why)
        self.run.event("bad_batch", step=step, why=why, action="skip", samples=str(kept))
        log.warning("%s; the step is skipped, its samples are in %s", why, kept)
        if (row := self.history.skipped_in_a_row()) > self.config.learner.bad_batch.most:
            raise PartFailed(f"{row} steps in a row are no batch to train on, the last one: {why}; samples in {kept}")

    def _between_waits(self) -> bool:
        """What the driver does while it waits for a batch; whether actors could not get on meanwhile."""
        caught_up = self.rounds is not None and self._catch_up(self.rounds)
        self._tick()
        self.supervisor.check()
        if not any(part.pulse.beats for part in self.supervisor.rollouts):
            self.progress.phase("waiting for a rollout actor: all are gone, or come up")
            self.supervisor.check_room("rollout", self.config.cluster.start_s)
            return True  # how long that may take is the supervisor's to say, not the batch's
        return caught_up

    def _catch_up(self, rounds: WeightRounds) -> bool:
        """Weights for actors that came up since they were sent; whether there were any."""
        self.open_step = self.history.steps_done  # a signal meanwhile must not ask the learner for a commit
        caught_up = rounds.catch_up()
        self.open_step = None
        return caught_up

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
        fetched = self.batches.under_way(step)
        timing = Timing(began, batch_at, trained_at, publish_s, self.started)
        counted = histograms(fetched, step)
        metrics: dict[str, float] = {
            **result["metrics"],
            **timing.metrics(result["metrics"]),
            **self._commit_s,
            **self._flow.metrics(self.supervisor.counters()),
            **ledger_metrics(self.ledger, self.history),
            **failure_metrics(fetched, self.history.failed),
        }
        self._commit_s = {}
        self.run.write_samples(step, fetched, result["samples"])
        revisions = reward_revisions(fetched)
        if self.history.note_revisions(step, revisions):
            self.run.event("reward_revisions", step=step, revisions=revisions)
        self._note_silent(step, silent_sources(fetched))
        if self.evaluator is not None and (step + 1) % self.config.evaluation.every == 0:
            metrics |= self._evaluate(step)
        lists = {name: each.counts for name, each in counted.items()}
        self.run.write_metrics(step, {**metrics, **lists, "reward/revisions": revisions})
        self.telemetry.write(step, metrics, counted)
        self.run.steps_done = step + 1
        self.progress.step(step, metrics)

    def _evaluate(self, step: int) -> dict[str, float]:
        assert self.evaluator is not None
        began = time.monotonic()
        self.progress.phase("evaluating")
        rounds = self.rounds

        def publish() -> tuple[str, Callable[[], object] | None]:
            if rounds is None:
                return str(self._published(step + 1) / MANIFEST), None
            offer = rounds.offer_to(EVALUATOR)
            return offer.model_dump_json(), partial(rounds.serve, offer)

        evaluation = self.evaluator.evaluate(publish)
        self._compare_with_best(step, evaluation)
        return {**evaluation.metrics, "time/evaluation_s": time.monotonic() - began}

    def _compare_with_best(self, step: int, evaluation: Evaluation) -> None:
        """Writes policy-best/ where the evaluation is better than all before it by the same measure."""
        if evaluation.value is None:
            figure = self.config.evaluation.chooses_by
            log.warning("step %d: the evaluation has no %s; the best policy stays what it was", step, figure)
            self.run.event("evaluation_without_figure", step=step, figure=figure)
            return
        measure = self.config.evaluation.measure
        best, why = self.history.best_by(measure)
        if why is not None:
            log.warning("the best policy so far is compared with no longer: %s", why)
            self.run.event("best_forgotten", best=self.history.best, why=why)
        if evaluation.better_than(best):
            self.history.best = {"value": evaluation.value, "step": step, "measure": measure}
            self._write_policy(self.run.policy_best, best_mark(self.history))  # in place with the commit that names it

    def _write_policy(self, directory: Path, mark: Mapping[str, Any]) -> None:
        """Writes the policy beside its place, whole and marked."""
        partial = partial_of(directory)
        shutil.rmtree(partial, ignore_errors=True)
        self.learners.call(
            "export", str(partial), what="the policy to be written", seconds=self.config.checkpoint.timeout_s
        )
        seal(partial, mark)

    # Commits

    def _commit(self) -> None:
        began = time.monotonic()
        self.progress.phase("writing a checkpoint")
        self.open_step = self.history.steps_done  # nothing else may be asked of the learner while it writes
        commit(self.run, self.config.checkpoint, self.history, self.learners, self.batches)
        self.open_step = None
        self.supervisor.budget.committed()
        self.last_commit_s = time.monotonic() - began
        self._commit_s = {"time/commit_s": self.last_commit_s}

    def _commit_in_grace(self) -> None:
        """After a signal: the unfinished step is left for the replay; finished ones are committed if there is time."""
        if self.open_step is not None:
            # The learner's weights hold a part of it, or its line is not written: only the last commit is whole.
            self.history.steps.forget_from(self.open_step)
            return
        left = self.stop.grace_left(self.config.cluster.stop_s)
        if self.history.steps_done == self.history.committed_steps or left < 2 * self.last_commit_s:
            return
        self.stop.heeded = True  # the commit's own waits must not stop at it
        try:
            self._commit()
        except GoBack as fault:  # the earlier commit stands
            log.warning("the last steps are not committed: %s", fault)

    def _finish(self) -> None:
        self.batches.note_failures()
        if self.history.steps_done > self.history.committed_steps:
            self._commit()
        else:
            commit_failures(self.run, self.history)
        self.progress.phase("writing the policy")
        self._write_policy(self.run.policy, policy_mark(self.run, self.history))
        put_in_place(self.run.policy)

    def _note_silent(self, step: int, silent: Mapping[str, str]) -> None:
        """Once, until the source scores again: the reward goes on without it, and nobody looks for that in samples."""
        for name in silent.keys() - self._silent:
            log.warning("step %d: source %s scored no sample, the reward is without it (%s)", step, name, silent[name])
            self.run.event("source_silent", step=step, source=name, why=silent[name])
        self._silent = set(silent)

    def _tick(self) -> None:
        self.stop.check()
        self.status.beat(self.supervisor)
        self.supervisor.watch()  # first: a Redis that is down for good would be asked for `stream.patience_s`
        self.batches.look()
