"""Whether a part gets on: it is asked for its progress once a second, and never waited for.

An actor answers `pulse()` with a count that grows as it gets on, and whether it has work. Its process may be alive and
its work stuck, so a part counts as stuck where it has work and its count stands still, or where it does not answer,
for longer than its deadline. A call that keeps an actor busy has a deadline of its own, and the pulse waits behind it.
"""

from dataclasses import dataclass
from typing import Any

EVERY_S = 1.0


@dataclass
class Pulse:
    """Of one actor. `reference` is the answer that is out, `moved` when it last got on."""

    handle: Any
    moved: float
    reference: Any = None
    asked: float = 0.0
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
        self.reference, self.has_work = None, has_work
        self.worked = self.worked or count > 0 or not has_work
        if count != self.count or not has_work:
            self.count, self.moved = count, now

    @property
    def beats(self) -> bool:
        """Whether it has ever answered: until then its process is coming up."""
        return self.count >= 0

    def still_s(self, now: float) -> float:
        """Seconds since it last got on, or had nothing to do."""
        return now - self.moved
