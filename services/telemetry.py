"""The sinks that a step's metrics go to, beside metrics.jsonl.

Invariant 10: watching never stops the run, nor holds it up. Every sink has a thread of its own with a short queue: what
it cannot take in time is dropped and counted. A sink that fails is reported once and switched off, and training goes
on. The one exception is `metrics.jsonl`, which is part of the run directory's contract and is written by the driver.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.histogram import Histogram
from services.trackers import OPENERS, Sink

log = logging.getLogger(__name__)

QUEUED = 256
"""Steps that a sink may be behind."""

CLOSE_S = 10.0
"""Seconds for all sinks together to write what they have when the run ends."""


@dataclass(frozen=True)
class _Step:
    step: int
    metrics: Mapping[str, float]
    histograms: Mapping[str, Histogram]


class _Watched:
    """A sink with its thread. It is opened there too: a tracker's server may take minutes to say that it is down."""

    def __init__(self, name: str, open_sink: Callable[[], Sink]) -> None:
        self.name = name
        self._open = open_sink
        self._changed = threading.Condition()
        self._waiting: deque[_Step] = deque()
        self._closing = False
        self._off = False
        self._dropped = 0
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def write(self, step: _Step) -> None:
        """Returns at once."""
        with self._changed:
            if self._off or self._closing:
                return
            if len(self._waiting) >= QUEUED:
                self._dropped += 1
                if self._dropped == 1:
                    log.warning("tracker %s is %d steps behind: steps from %d on are dropped until it catches up",
                                self.name, QUEUED, step.step)  # fmt: skip
                return
            self._waiting.append(step)
            self._changed.notify()

    def waiting(self) -> int:
        with self._changed:
            return len(self._waiting)

    def begin_to_close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()

    def wait_closed(self, seconds: float) -> None:
        """Says what was not written, where the sink does not come to an end in time: it is left behind."""
        self._thread.join(seconds)
        with self._changed:
            if self._thread.is_alive():
                self._off = True
                log.warning("tracker %s did not close in time, and is left: %d steps were not written",
                            self.name, len(self._waiting) + self._dropped)  # fmt: skip
            elif self._dropped:
                log.warning("tracker %s was too slow: %d steps were dropped", self.name, self._dropped)

    def _work(self) -> None:
        try:
            sink = self._open()
        except Exception as error:  # a tracker's server may be down: invariant 10
            self._switch_off("tracker %s did not start and is left out of this run: %s", error)
            return
        while (step := self._next()) is not None:
            try:
                sink.write(step.step, step.metrics, step.histograms)
            except Exception as error:  # invariant 10
                self._switch_off(f"tracker %s failed at step {step.step} and is switched off: %s", error)
                return
        try:
            sink.close()
        except Exception as error:  # invariant 10
            log.warning("tracker %s did not close: %s", self.name, error)

    def _next(self) -> _Step | None:
        with self._changed:
            while not self._waiting and not self._closing:
                self._changed.wait()
            return self._waiting.popleft() if self._waiting and not self._off else None

    def _switch_off(self, message: str, error: Exception) -> None:
        with self._changed:
            self._off = True
            self._waiting.clear()
        log.warning(message, self.name, error)


class Telemetry:
    """Hands a step's metrics to every sink that still works.

    `others` are sinks beside the recipe's trackers, by name: what opens each.

    Raises:
        UserError: at construction, where a tracker that the recipe asks for is not installed.
    """

    def __init__(
        self,
        trackers: Sequence[str],
        run_dir: Path,
        name: str,
        config: Mapping[str, Any],
        others: Mapping[str, Callable[[], Sink]] | None = None,
    ) -> None:
        openers = {tracker: OPENERS[tracker](run_dir, name, config) for tracker in trackers}
        self._sinks = [_Watched(each, opener) for each, opener in {**openers, **(others or {})}.items()]

    def write(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram] | None = None) -> None:
        """Returns at once; `histograms` by their keys in metrics.jsonl."""
        each = _Step(step, dict(metrics), dict(histograms or {}))
        for sink in self._sinks:
            sink.write(each)

    def waiting(self, name: str) -> int:
        """Steps that the sink of this name has not begun to write."""
        return sum(sink.waiting() for sink in self._sinks if sink.name == name)

    def close(self, seconds: float = CLOSE_S) -> None:
        """Returns once every sink has written what it has, or `seconds` have passed."""
        end = time.monotonic() + seconds
        for sink in self._sinks:
            sink.begin_to_close()
        for sink in self._sinks:
            sink.wait_closed(max(0.0, end - time.monotonic()))
        self._sinks = []
