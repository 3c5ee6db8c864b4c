"""One tail a run for all who watch it: a thread that brings the index up to date, and what it tells the pages.

The thread lives while somebody watches or asks, and looks at two or three files twice a second. What it finds is
written once as a server-sent event and handed to every watcher; the last events are kept, so that a page that lost its
connection goes on from `Last-Event-ID`. A page that cannot keep up, or comes back too late, is told to load anew
(`reset`). Nothing here grows with the run or with its watchers beyond their bounds.
"""

import asyncio
import logging
import re
import sqlite3
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.dashboard.cache import Place, place_of
from services.dashboard.index import Change, Index, numbers_of
from services.dashboard.layout import RunFiles, encoded, status_of
from services.errors import UserError

log = logging.getLogger(__name__)

POLL_S = 0.5
SLICE_S = 0.1
"""Of indexing at a time, between which questions are answered and pages are told."""
ASKED_S = 0.5
"""So long after a question the index makes way for the next ones."""
IDLE_S = 60.0
"""After the last question, where nobody watches, the thread ends."""
HEARTBEAT_S = 15.0
MOST_WATCHERS = 64
KEPT = 256
BACKLOG = 64
"""Events that a slow page may be behind."""
MOST_STEPS = 64
"""Steps whose figures go to the pages by name; of more they are told to ask."""


@dataclass(frozen=True)
class Message:
    number: int
    kind: str
    data: bytes

    def encoded(self, epoch: str) -> bytes:
        return b"id: %s.%d\nevent: %s\ndata: %s\n\n" % (epoch.encode(), self.number, self.kind.encode(), self.data)


@dataclass(eq=False)
class Watcher:
    loop: asyncio.AbstractEventLoop
    queue: "asyncio.Queue[Message | None]" = field(default_factory=lambda: asyncio.Queue(BACKLOG))
    """None: it fell behind, and must load anew."""
    lost: bool = False

    def put(self, message: Message) -> None:
        if self.lost:
            return
        try:
            self.queue.put_nowait(message)
        except asyncio.QueueFull:
            self.give_up()

    def give_up(self) -> None:
        """What waits for it is dropped; it is told so next."""
        self.lost = True
        while not self.queue.empty():
            self.queue.get_nowait()
        self.queue.put_nowait(None)


class Watched:
    """A run that is open: its index, its thread, its watchers. Safe to call from any thread."""

    def __init__(self, run: RunFiles, root: Path | None = None) -> None:
        self.run = run
        self._root = root
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._place: Place | None = None
        self._index: Index | None = None
        self._ready = threading.Event()
        self._failed: Exception | None = None
        self._asked = 0.0
        self._closing = threading.Event()
        self._watchers: set[Watcher] = set()
        self._kept: deque[Message] = deque(maxlen=KEPT)
        self._number = 0
        self._status: tuple[Any, ...] = ()
        self._epoch = f"{time.time_ns():x}"
        self.version = 0
        """Grows with every change: what was answered under the same one is still true."""
        self.progress: dict[str, Any] = {}
        self.problem: str | None = None
        """Why the run's files cannot be read now."""

    # The questions' side

    def touch(self, seconds: float = 20.0) -> None:
        """Brings the thread up and waits until it has looked once.

        Raises:
            UserError: the index cannot be made. TimeoutError: nor within `seconds`.
        """
        with self._lock:
            self._asked = time.monotonic()
            if self._thread is None or not self._thread.is_alive():
                self._ready.clear()
                self._failed = None
                self._thread = threading.Thread(target=self._live, name=f"tail {self.run.name}", daemon=True)
                self._thread.start()
        if not self._ready.wait(seconds):
            raise TimeoutError(f"the index of {self.run.name} did not open within {seconds:g} s")
        if self._failed is not None:
            raise self._failed

    @contextmanager
    def database(self) -> Generator[sqlite3.Connection]:
        """A reader's connection, for the length of one question."""
        self.touch()
        assert self._index is not None
        with closing(sqlite3.connect(f"file:{self._index.path}?mode=ro", uri=True)) as database:
            database.execute("pragma cache_size = -8192")
            yield database

    @property
    def preview(self) -> list[dict[str, Any]]:
        return [] if self._index is None else self._index.preview

    @property
    def steps(self) -> int:
        """Steps that the index knows; while a preview stands in, those that it shows."""
        if self._index is None:
            return 0
        preview = self._index.preview
        return max(self._index.reached.steps, int(preview[-1]["step"]) + 1 if preview else 0)

    def end(self) -> None:
        """Lets streams and thread end by themselves; waits for neither."""
        self._closing.set()
        with self._lock:
            watchers = list(self._watchers)
        for watcher in watchers:
            watcher.loop.call_soon_threadsafe(watcher.give_up)

    def close(self) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    # The watchers' side

    async def stream(self, last_id: str | None) -> AsyncIterator[bytes]:
        """Server-sent events from now on, or from the one after `last_id`; first, how far the run is (`hello`)."""
        await asyncio.to_thread(self.touch)
        watcher = Watcher(asyncio.get_running_loop())
        with self._lock:
            missed = self._since(last_id)
            number = self._number
            self._watchers.add(watcher)
        try:
            hello = {"steps": self.steps, "version": self.version, "progress": self.progress, "problem": self.problem}
            yield b"id: %s.%d\nevent: hello\ndata: %s\n\n" % (self._epoch.encode(), number, encoded(hello))
            if missed is None:
                yield b"event: reset\ndata: {}\n\n"
            for message in missed or ():
                yield message.encoded(self._epoch)
            while not self._closing.is_set():
                try:
                    message = await asyncio.wait_for(watcher.queue.get(), HEARTBEAT_S)
                except TimeoutError:
                    yield b": alive\n\n"
                    continue
                if message is None and self._closing.is_set():
                    return
                if message is None:
                    yield b"event: reset\ndata: {}\n\n"
                    watcher.lost = False
                    continue
                yield message.encoded(self._epoch)
        finally:
            with self._lock:
                self._watchers.discard(watcher)

    def _since(self, last_id: str | None) -> list[Message] | None:
        """What came after an event; None where that is no longer known."""
        if not last_id:
            return []
        epoch, _, number = last_id.partition(".")
        if epoch != self._epoch or not re.fullmatch("[0-9]{1,18}", number):
            return None
        after = int(number)
        first = self._kept[0].number if self._kept else self._number + 1
        if after + 1 < first or after > self._number:
            return None
        return [message for message in self._kept if message.number > after]

    @property
    def watchers(self) -> int:
        return len(self._watchers)

    def _tell(self, kind: str, data: Any) -> None:
        body = encoded(data)
        with self._lock:
            self._number += 1
            message = Message(self._number, kind, body)
            self._kept.append(message)
            watchers = list(self._watchers)
        for watcher in watchers:
            try:
                watcher.loop.call_soon_threadsafe(watcher.put, message)
            except RuntimeError:  # the server is ending
                log.debug("a watcher's loop is closed")

    # The thread

    def _live(self) -> None:
        try:
            self._place = place_of(self.run, self._root)
            self._index = Index(self.run, self._place.directory)
            if self._index.preview:
                self.progress = progress_of(self._index, Change(more=True))
                self._ready.set()
        except (OSError, sqlite3.Error, UserError) as error:
            self._failed = error if isinstance(error, UserError) else UserError(f"index of {self.run.path}: {error}")
            self._ready.set()
            if self._place is not None:
                self._place.leave()
            return
        try:
            while not self._closing.is_set() and self._wanted():
                more = self._look(self._index)
                self._ready.set()
                asked = time.monotonic() - self._asked < ASKED_S
                self._closing.wait((SLICE_S if asked else 0.005) if more else POLL_S)
        finally:
            self._ready.set()
            self._index.close()
            self._place.leave()

    def _wanted(self) -> bool:
        return bool(self._watchers) or time.monotonic() - self._asked < IDLE_S

    def _look(self, index: Index) -> bool:
        try:
            change = index.catch_up(SLICE_S)
            self.problem = None
        except Exception as error:  # whatever is wrong with a file: the page says it, and goes on showing what it has
            if self.problem is None:
                log.warning("%s: %s: %s", self.run.path, type(error).__name__, error)
            self.problem = f"{type(error).__name__}: {error}"
            return False
        before, self.progress = self.progress, progress_of(index, change)
        if change:
            self.version += 1
            self._tell_change(change)
        if before.get("done") != self.progress["done"] or not self.progress["done"]:
            self._tell("progress", self.progress)
        status = status_of(self.run)
        seen = () if status is None else (status.get("time"), status.get("phase"))
        if seen != self._status:
            self._status = seen
            self._tell("status", status)
        return change.more

    def _tell_change(self, change: Change) -> None:
        if change.cut:
            self._tell("cut", {"steps": self.steps})
        if change.events:
            self._tell("events", change.events[-50:])
        if change.steps:
            few = len(change.steps) <= MOST_STEPS
            rows = [[row["step"], numbers_of(row)] for row in change.steps] if few else []
            self._tell("steps", {"steps": self.steps, "rows": rows, "asks": not few})
        if change.samples:
            self._tell("samples", {"added": change.samples})


def progress_of(index: Index, change: Change) -> dict[str, Any]:
    """How far the index is: bytes of metrics, steps whose samples are in it."""
    reached = index.reached
    return {
        "done": not change.more,
        "metrics": round(reached.metrics.offset / max(1, reached.metrics_bytes), 3),
        "samples": round(reached.sampled / max(1, reached.steps), 3),
        "damaged": reached.damaged,
    }
