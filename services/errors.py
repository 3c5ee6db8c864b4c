"""Errors that a user meets. Each says what was wrong, where, and what is allowed or what to do."""

from typing import Any


class UserError(Exception):
    """A mistake in what was asked (usage, configuration, data): printed without a traceback, exit code 2."""


class PlanError(UserError):
    """The cluster cannot hold the plan: exit code 3."""


class Deadline(Exception):  # noqa: N818 - reads as what it says where it is raised
    """A wait that has passed its deadline (invariant 6).

    `waited_for` says what, `who` did not answer, `seconds` how long it was waited for.
    """

    def __init__(self, *, waited_for: str, who: str, seconds: float) -> None:
        super().__init__(f"waited {seconds:.0f} s for {waited_for}: {who} did not answer")
        self.waited_for = waited_for
        self.who = who
        self.seconds = seconds

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle by their positional arguments; this one has none, and it crosses Ray's process boundaries.
        return _deadline, (self.waited_for, self.who, self.seconds)


def _deadline(waited_for: str, who: str, seconds: float) -> Deadline:
    return Deadline(waited_for=waited_for, who=who, seconds=seconds)
