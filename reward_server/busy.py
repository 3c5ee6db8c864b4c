"""How long something was busy: what idle shares are made of."""

import threading
import time


class BusyTime:
    """Work under way, over time. Any number of threads may be in it at once:

    with busy:
        ...
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way = 0
        self._since = time.monotonic()
        self._busy_s = 0.0
        self._work_s = 0.0

    def __enter__(self) -> "BusyTime":
        with self._lock:
            self._add_up()
            self._under_way += 1
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._add_up()
            self._under_way -= 1

    def busy_s(self) -> float:
        """Seconds so far with anything under way."""
        with self._lock:
            self._add_up()
            return self._busy_s

    def work_s(self) -> float:
        """Seconds of all that was under way, added up: of three at once, three a second."""
        with self._lock:
            self._add_up()
            return self._work_s

    def _add_up(self) -> None:
        now = time.monotonic()
        if self._under_way:
            self._busy_s += now - self._since
            self._work_s += (now - self._since) * self._under_way
        self._since = now
