"""Prompts into the ledger and batches out of it: what the driver asks of the ledger between two commits.

What becomes of a Redis that dies meanwhile is `cluster.recovery`'s. Where even that finds the ledger against what this
run knows, the run goes back to its last commit (`LedgerBehind`).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from cluster.config import Config
from cluster.feed import Feed
from cluster.history import History
from cluster.recovery import Recovery
from cluster.run_dir import RunDir
from cluster.running import LedgerBehind
from cluster.supervise import POLL_S
from cluster.training_data import TrainingData
from services.errors import Deadline
from services.records import Group, epoch_of
from services.stream.errors import LedgerError, LedgerTaken
from services.stream.ledger import Ledger, Settled

FAILURE_SLACK = 2
"""Batches of prompts with their payload in the ledger beyond the admission limit, to stand in for failed groups."""


class Batches:
    """Of one incarnation: from the reconciliation with the manifest it goes on from."""

    def __init__(self, config: Config, run: RunDir, history: History, data: TrainingData, ledger: Ledger) -> None:
        self._config = config
        self._run = run
        self._history = history
        self._ledger = ledger
        self._done_before = history.epochs_committed()
        self.feed = Feed(
            data.splits.train,
            seed=config.run.seed,
            epochs=config.run.epochs,
            steps=config.run.steps,
            groups_per_step=config.run.groups_per_step,
            steps_done=history.steps_done,
            groups_done=history.groups_done,
        )
        self._recovery = Recovery(
            ledger, self.feed, history, run, window=self._window(), lease_s=config.rollout.lease_s
        )

    def reconcile(self) -> None:
        """The ledger becomes the projection of the manifest, before any lease."""
        ledger, history = self._ledger, self._history
        ledger.claim()
        settled = ledger.settled()
        if settled.epochs <= history.epochs_committed():
            self.feed.settle(ledger, history.settled(settled.epochs))  # a kill may have come in the middle of it
            settled = ledger.settled()
        if why := self._why_forget(settled):
            self._run.event("ledger_forgotten", why=why, had=asdict(settled))
            ledger.forget()
            ledger.claim()
            settled = Settled()
        if any(ledger.counts().values()):
            self.feed.begin_after(settled.epochs)
        else:
            self.feed.settle(ledger, history.settled(history.epochs_committed()))
        self._register()
        report = self._ledger.reconcile(self._history.steps, self._history.failed)
        self._run.event("reconciled", **report)

    def _why_forget(self, settled: Settled) -> str | None:
        """Why the ledger is no beginning for this run; None where it is."""
        if settled != self._history.settled(settled.epochs):
            # The commit that this run goes on from is older than what was settled after a later one.
            return "it has settled groups that are not in the commit"
        under_way = (ids for state, ids in self._ledger.states().items() if state not in ("committed", "failed"))
        if any(epoch_of(group) >= self._config.run.epochs for ids in under_way for group in ids):
            return "it has groups of epochs that the recipe no longer has"  # they would fill the last batch
        return None

    def give_prompts(self, step: int) -> None:
        """The prompts that may be leased until the next step have their payload in the ledger."""
        self._register()
        if step < self.feed.total_steps:
            self.feed.top_up(self._ledger, self._window())

    def limit(self, step: int) -> int:
        """Groups that may ever have been leased while `step` steps are done (invariant 3)."""
        return self.feed.admission_limit(step, self._config.run.max_staleness)

    def look(self) -> None:
        """Between two waits: whether Redis was restarted, and has lost something that is to be made anew."""
        self._recovery.look()

    def under_way(self, step: int) -> list[Group]:
        """The scored groups of the step that is trained on, or was last; held here, whatever Redis loses meanwhile."""
        assert self._recovery.batch is not None
        assert self._recovery.batch[0] == step
        return self._recovery.batch[1]

    def _register(self) -> None:
        done = self._history.groups_done + len(self._history.failed)
        self.feed.register(self._ledger, done + self._window())

    def _window(self) -> int:
        return (self._config.run.max_staleness + 1 + FAILURE_SLACK) * self._config.run.groups_per_step

    def wait(self, step: int, between: Callable[[], bool], phase: Callable[[str], None]) -> list[str]:
        """The groups of a step, in lease order; empty where none are left.

        `between` is called between two waits; where it says True, the parts could not get on meanwhile.

        Raises:
            Deadline: no group was generated, scored or failed for `cluster.batch_s`.
        """
        size = self._config.run.groups_per_step
        oldest = step - self._config.run.max_staleness
        last_counts: dict[str, int] = {}
        moved = time.monotonic()
        while True:
            groups = self._ledger.take(step, size, final=self.feed.all_registered, oldest_step=oldest)
            if groups is not None and self._recovery.hold(step, groups):
                return groups
            counts = self._ledger.counts()
            if counts != last_counts:
                if counts.get("failed") != last_counts.get("failed"):
                    self.note_failures()
                    self.give_prompts(step)
                last_counts, moved = counts, time.monotonic()
            phase(
                f"waiting for the batch: {counts.get('scored', 0)} scored, {counts.get('generated', 0)} generated, "
                f"{counts.get('leased', 0)} leased"
            )
            if time.monotonic() - moved > self._config.cluster.batch_s:
                raise Deadline(
                    waited_for=f"the batch of step {step} ({counts})",
                    who="the rollout actors and the scoring workers",
                    seconds=self._config.cluster.batch_s,
                )
            if between():
                moved = time.monotonic()
            self._ledger.expire_leases()  # after `look`, which puts it off where Redis was away
            self._ledger.wait_scored(int(POLL_S * 1000))

    def commit(self, steps: Mapping[int, Sequence[str]]) -> None:
        """Tells the ledger what a commit contains. Raises LedgerBehind; the commit is valid.

        Epochs that were done in the commit before it are settled: should this one be damaged, the ledger fits that one.
        """
        try:
            self._ledger.commit(steps)
            if self._done_before > self.feed.settled:
                self.feed.settle(self._ledger, self._history.settled(self._done_before))
            self._done_before = self._history.epochs_committed()
        except LedgerTaken:
            raise
        except LedgerError as error:
            raise LedgerBehind(f"the ledger cannot be told of a commit: {error}") from error

    def note_failures(self) -> None:
        """What failed for good becomes part of the manifest to come.

        Said to the ledger before: should Redis lose it after all, the chain of the driver's calls is broken, and the
        group is made failed again instead of being trained on.
        """
        new = {
            row.group_id: row.failure
            for row in self._ledger.list("failed")
            if row.group_id not in self._history.failed and row.failure is not None
        }
        self._ledger.mark_failed(new)
        self._history.failed |= new
        for group_id, failure in new.items():
            self._run.event("group_failed", group_id=group_id, failure=failure.kind, code=failure.code)
