"""Whether a part gets on: it is asked for its progress once a second, and never waited for.

An actor answers `pulse()` with a count that grows as it gets on, and whether it has work. Its process may be alive and
its work stuck, so a part counts as stuck where it has work and its count stands still, or where it does not answer,
for longer than its deadline. A call that keeps an actor busy has a deadline of its own, and the pulse waits behind it.
"""

from dataclasses import dataclass
from typing import Any

EVERY_S = 1.0
ANSWER_S = 10.0
"""A question has so long (s) before a part counts as silent: the driver may just have come back from work of its own,
and what was heard before that says nothing of the time since."""


@dataclass
class Pulse:
    """Of one actor. `reference` is the answer that is out, `moved` when it last got on."""

    handle: Any
    moved: float
    reference: Any = None
    asked: float = 0.0
    told: float = 0.0
    """When the question was put that was answered last."""
    count: int = -1
    has_work: bool = False
    worked: bool = False
    """Whether it ever got on, or had come up and waited for work."""

    def ask(self, now: float) -> None:
        """Asks again where no answer is out and the last question is a second old."""
        if self.reference is None and now - self.asked >= EVERY_S:
            self.reference = self.handle.pulse.remote()
            self.asked = now

    def heard(self, answer: tuple[int, bool], now: float) -> None:
        count, has_work = answer
        self.reference, self.has_work, self.told = None, has_work, self.asked
        self.worked = self.worked or count > 0 or not has_work
        if count != self.count or not has_work:
            self.count, self.moved = count, now

    @property
    def beats(self) -> bool:
        """Whether it has ever answered: until then its process is coming up."""
        return self.count >= 0

    def still_s(self, now: float) -> float:
        """Seconds that it is known to have had work and not got on, or not to have answered."""
        silent = self.reference is not None and now - self.asked >= ANSWER_S
        return max(0.0, (now if silent else self.told) - self.moved)
