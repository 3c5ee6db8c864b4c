"""The ledger of a run that goes on while its Redis does not: made anew from what the driver knows.

Redis may be restarted, whole or without its last writes, or come back empty. Where it has lost nothing that counts, the
run goes on with what is there. Else nothing of it is trusted: the driver has the committed steps and failures of the
manifest, the steps that the learner holds since, the batch under way with its samples, and the gate. The rest (leases,
groups that wait for scores or for their batch) is generated again: nothing of it was trained.
"""

import time
from collections.abc import Sequence

from cluster.feed import Feed
from cluster.history import History
from cluster.run_dir import RunDir
from services.records import Group
from services.stream.errors import LedgerError
from services.stream.ledger import Ledger

LOOK_S = 1.0


class Recovery:
    """Watches a run's Redis from the driver, between two waits, and makes the ledger anew where it must be.

    `window` is how many prompts stand in the ledger with their text; `lease_s` how long a lease holds.
    """

    def __init__(
        self, ledger: Ledger, feed: Feed, history: History, run: RunDir, *, window: int, lease_s: float
    ) -> None:
        self._ledger = ledger
        self._feed = feed
        self._history = history
        self._run = run
        self._window = window
        self._lease_s = lease_s
        self._server, _ = ledger.look()
        self._looked = time.monotonic()
        self.batch: tuple[int, list[Group]] | None = None
        """The step under way and its groups with their samples."""
        ledger.on_lost = lambda: self.rebuild("Redis has lost what the driver wrote last")

    def look(self) -> None:
        """Once a second: whether another server answers than before, or one that has lost something."""
        if time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        server, holds = self._ledger.look()
        if not holds:
            self.rebuild("Redis has lost what the driver wrote last")
        elif server != self._server:
            self._server = server
            self._feed.register_again(self._ledger)  # looks at every group on its way
            self._feed.top_up(self._ledger, self._window)
            self._ledger.extend_leases(self._lease_s)
            self._run.event("ledger_kept", why="Redis was restarted", counts=self._ledger.counts())

    def hold(self, step: int, groups: Sequence[str]) -> bool:
        """Fetches the batch of a step and keeps it; False where samples are lost, and it is to be asked for again."""
        try:
            self.batch = (step, self._ledger.fetch(groups))
        except LedgerError as error:
            self.rebuild(f"the batch of step {step} has lost samples: {error}")
            return False
        return True

    def rebuild(self, why: str) -> None:
        """Makes the ledger anew from what the driver knows. Raises LedgerTaken where it is another driver's by now."""
        history, ledger = self._history, self._ledger
        self._server, _ = ledger.look()
        committed = {step: groups for step, groups in history.steps.items() if step < history.committed_steps}
        trained = {step: groups for step, groups in history.steps.items() if step >= history.committed_steps}
        batch = None if self.batch is None or self.batch[0] in committed else self.batch
        gate = ledger.opened
        ledger.forget()
        ledger.claim()
        ledger.opened = gate  # what is to be opened still, should Redis lose something again in the middle of this
        self._feed.settle(ledger, history.settled(history.epochs_committed()))
        self._feed.register_again(ledger)
        ledger.rebuild(committed, history.failed, trained, batch)
        self._feed.top_up(ledger, self._window)
        if gate is not None:
            ledger.open_gate(gate.version, gate.weights, gate.limit)
        self._run.event("ledger_rebuilt", why=why, counts=ledger.counts())
