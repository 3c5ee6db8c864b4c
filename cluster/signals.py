"""SIGTERM and Ctrl-C become a request to stop, looked at between two waits; a second Ctrl-C stops at once."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HANDLED = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):  # noqa: N818 - reads as what it says where it is raised
    """A signal asked the run to stop."""


class StopRequest:
    def __init__(self) -> None:
        self.signal_name: str | None = None
        self.heeded = False
        """The run is stopping: `check` says no more."""
        self._at = 0.0

    def receive(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            self._at = time.monotonic()
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    def install(self) -> None:
        """Takes the signals; again after a library that has taken them meanwhile (Ray does)."""
        for number in HANDLED:
            signal.signal(number, self.receive)

    def check(self) -> None:
        """Raises Stopped once a signal has come."""
        if self.signal_name is not None and not self.heeded:
            raise Stopped(self.signal_name)

    def grace_left(self, grace_s: float) -> float:
        """Seconds until the grace that began with the signal is over."""
        return self._at + grace_s - time.monotonic()


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Handles the signals for the length of the block."""
    request = StopRequest()
    before = {number: signal.getsignal(number) for number in HANDLED}
    request.install()
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
