"""How often a part of a run may be started again, and after which pause. Pure but for the clock of its callers.

The budget is of restarts in a row: what dies again and again without a commit in between ends the run with its name,
and a run that goes on for weeks is not ended by the tenth machine that fails. A commit gives everything back.
"""

from dataclasses import dataclass, field

LONGEST_PAUSE_S = 60.0


@dataclass
class RestartBudget:
    """`limit` restarts of each part between two commits; the first after `pause_s`, then twice as long each.

    What is kept up is counted slot by slot, for a node that dies takes many parts of a kind with it, each of them once.
    The learner's ranks go back together and are one part, as the ledger and the evaluator are.
    """

    limit: int
    pause_s: float
    spent: dict[str, int] = field(default_factory=dict)

    def spend(self, part: str) -> float | None:
        """The pause (s) before the part is started again; None: the budget is used up, it stays down."""
        had = self.spent.get(part, 0)
        if had >= self.limit:
            return None
        self.spent[part] = had + 1
        return min(self.pause_s * 2**had, LONGEST_PAUSE_S)

    def left(self, part: str) -> int:
        return self.limit - self.spent.get(part, 0)

    def committed(self) -> None:
        """There is progress that no death can take back."""
        self.spent.clear()
