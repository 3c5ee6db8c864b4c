"""What is supervised: one actor, the slot that it fills, and the errors that say how one ended."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cluster.plan import Part
from cluster.pulse import Pulse
from services.errors import Deadline


class PartFailed(Exception):  # noqa: N818 - reads as what it says where it is raised
    """A part of the run died, or ended before it should have: named, with its own error."""


class PartDied(PartFailed):
    """Its process is gone: nothing is said about its work."""


class Unanswered(Deadline):
    """Of the calls that were waited for themselves: no other part's deadline, nor that of Redis."""


class GoBack(PartFailed):
    """The run can go on, but only from its last commit. `kind` is whose restarts it counts among."""

    kind = "learner"


class LearnerDied(GoBack):
    """A rank of the learner is gone, or did not answer."""


class LedgerBehind(GoBack):
    """The ledger has lost what this run wrote to it."""

    kind = "ledger"


@dataclass
class Running:
    """One actor: its handle, and the reference of the call that lasts as long as it works (None: it has none)."""

    name: str
    handle: Any
    running: Any = None
    up: Any = None
    """The reference of the call that brings it up, where there is one; its result goes to `Kept.on_up`."""
    part: Part | None = None
    """What it is one of, where it is no part that is kept up."""
    down: bool = False
    """Whether its death was said and it was not heard since: Ray may take long to start it again."""
    pulse: Pulse = field(init=False)

    def __post_init__(self) -> None:
        self.pulse = Pulse(self.handle, moved=time.monotonic())


@dataclass
class Kept:
    """A part that is kept up: a slot that one actor after another fills. `now` is None between a death and the next
    start, which is at `due`."""

    kind: str
    part: Part
    start: Callable[[], Running]
    on_death: Callable[[Running], dict[str, Any]] = lambda _: {}
    """What is to be done when it has died; what it returns goes into the event."""
    on_up: Callable[[Any], None] = lambda _: None
    now: Running | None = None
    due: float = 0.0
    lost: str = ""
    """The name of the one that died last."""
    worked: bool = False
    """Whether one of those that died had come up: then its settings are not what keeps another from it."""
    no_room_since: float | None = None
    """Since when the cluster has had no room to start it."""
    slot: str = ""
    """Its name in the budget of restarts, given by `keep`: every slot has restarts of its own."""
