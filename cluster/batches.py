"""Prompts into the ledger and batches out of it: what the driver asks of the ledger between two commits.

A Redis that restarts may have lost the end of its log, and one that is not ours may come back empty. Nothing is mended
by hand: what the ledger says is held against what this run knows (the gate that it opened, the groups that it has
trained on), and where they differ the run goes back to its last commit, from which the ledger is made anew.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from cluster.config import Config
from cluster.feed import Feed
from cluster.history import History
from cluster.run_dir import RunDir
from cluster.supervise import POLL_S, LedgerBehind
from cluster.training_data import TrainingData
from services.errors import Deadline
from services.records import Group, PolicyVersion
from services.stream.errors import LedgerError
from services.stream.ledger import Ledger

FAILURE_SLACK = 2
"""Batches of prompts with their payload in the ledger beyond the admission limit, to stand in for failed groups."""


class Batches:
    """Of one incarnation: from the reconciliation with the manifest it goes on from."""

    def __init__(self, config: Config, run: RunDir, history: History, data: TrainingData, ledger: Ledger) -> None:
        self._config = config
        self._run = run
        self._history = history
        self._ledger = ledger
        self._version: PolicyVersion | None = None
        self.feed = Feed(
            data.splits.train,
            seed=config.run.seed,
            epochs=config.run.epochs,
            steps=config.run.steps,
            groups_per_step=config.run.groups_per_step,
        )

    def reconcile(self) -> None:
        """The ledger becomes the projection of the manifest, before any lease."""
        self._register()
        report = self._ledger.reconcile(self._history.steps, self._history.failed)
        self._run.event("reconciled", **report)

    def give_prompts(self, step: int) -> None:
        """The prompts that may be leased until the next step have their payload in the ledger."""
        self._register()
        if step < self.feed.total_steps:
            self.feed.top_up(self._ledger, self._window())

    def limit(self, step: int) -> int:
        """Groups that may ever have been leased while `step` steps are done (invariant 3)."""
        return self.feed.admission_limit(step, self._config.run.max_staleness)

    def opened(self, version: PolicyVersion) -> None:
        """The gate is open under this version, and stays so until it is opened again."""
        self._version = version

    def _register(self) -> None:
        done = sum(len(groups) for groups in self._history.steps.values()) + len(self._history.failed)
        self.feed.register(self._ledger, done + self._window())

    def _window(self) -> int:
        return (self._config.run.max_staleness + 1 + FAILURE_SLACK) * self._config.run.groups_per_step

    def wait(self, step: int, between: Callable[[], bool], phase: Callable[[str], None]) -> list[str]:
        """The groups of a step, in lease order; empty where none are left.

        `between` is called between two waits; where it says True, the parts could not get on meanwhile.

        Raises:
            Deadline: no group was generated, scored or failed for `cluster.batch_s`.
            LedgerBehind: the ledger is not what this run made it.
        """
        size = self._config.run.groups_per_step
        oldest = step - self._config.run.max_staleness
        last_counts: dict[str, int] = {}
        moved = time.monotonic()
        while True:
            groups = self._ledger.take(step, size, final=self.feed.all_registered, oldest_step=oldest)
            self._check(groups or [])
            if groups is not None:
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
            self._ledger.expire_leases()
            if between():
                moved = time.monotonic()
            self._ledger.wait_scored(int(POLL_S * 1000))

    def fetch(self, groups: Sequence[str]) -> list[Group]:
        """The scored groups of a batch. Raises LedgerBehind."""
        with _behind():
            return self._ledger.fetch(groups)

    def commit(self, steps: Mapping[int, Sequence[str]]) -> None:
        """Tells the ledger what a commit contains. Raises LedgerBehind; the commit is valid."""
        with _behind():
            self._ledger.commit(steps)

    def _check(self, groups: list[str]) -> None:
        gate = self._ledger.gate()
        if gate is None or gate.version != self._version:
            found = "no gate" if gate is None else f"a gate at version {tuple(gate.version)}"
            raise LedgerBehind(f"the ledger has lost what was written last: it has {found}, not {self._version}")
        trained = {group for done in self._history.steps.values() for group in done} | self._history.failed.keys()
        if again := [group for group in groups if group in trained]:
            raise LedgerBehind(f"the ledger has lost what was written last: it gives {again[0]} a second time")

    def note_failures(self) -> None:
        """What failed for good becomes part of the manifest to come."""
        for row in self._ledger.list("failed"):
            if row.group_id not in self._history.failed and row.failure is not None:
                self._history.failed[row.group_id] = row.failure
                self._run.event("group_failed", group_id=row.group_id, failure=row.failure.kind, code=row.failure.code)


@contextmanager
def _behind() -> Iterator[None]:
    try:
        yield
    except LedgerError as error:
        raise LedgerBehind(f"the ledger has lost what was written last: {error}") from error
