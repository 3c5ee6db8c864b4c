"""The index of one run: what its files hold, as columns and rows that answer a page in milliseconds.

It is an SQLite file outside of the run that grows with it: every line is read once, by one thread (`catch_up`), and the
lines themselves stay where they are (a sample's row knows its shard and place). Nothing of a run is held in memory.

`metrics.jsonl` leads: a step's shard is whole when its line is there. When that file was cut back, the columns are
read again, and of the shards those whose size or time is another.
"""

import json
import math
import os
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.dashboard import curves, sample_index
from services.dashboard.curves import MOST_STEPS, CurveWriter
from services.dashboard.layout import RunFiles, parsed, read_config
from services.dashboard.sample_index import SampleWriter
from services.dashboard.tail import Place, read_news
from services.errors import UserError

VERSION = 1
FILE = "index.sqlite"
BEGIN = Place()
PREVIEW_BYTES = 8 * 2**20
PREVIEW_LINES = 600

FAULTS = frozenset(
    {
        "bad_batch",
        "best_forgotten",
        "checkpoint_refused",
        "ended",
        "evaluation_without_figure",
        "fewer_ranks",
        "group_failed",
        "ledger_behind",
        "ledger_forgotten",
        "ledger_rebuilt",
        "part_missing",
        "source_silent",
        "transfer_broken",
    }
)

SCHEMA = """
create table state (id integer primary key check (id = 1), value text not null);
create table event (
    id integer primary key, time real, kind text not null, step integer, level text not null, data text not null);
create index event_level on event (level, id);
"""


@dataclass(frozen=True)
class Change:
    """What a `catch_up` found: new lines of metrics and events, and whether something that was there is gone."""

    steps: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    events: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    samples: int = 0
    cut: bool = False
    more: bool = False

    def __bool__(self) -> bool:
        return bool(self.steps or self.events or self.samples or self.cut)


@dataclass
class Reached:
    """Up to where the files were read; stands in the index, so that the next server goes on from it."""

    metrics: Place = BEGIN
    events: Place = BEGIN
    steps: int = 0
    """One more than the last step with a line."""
    sampled: int = 0
    """Steps whose shards were read."""
    at_step: int = 0
    """The step that the last event belongs to."""
    damaged: int = 0
    """Lines that were no rows of ours."""
    metrics_bytes: int = 0

    def to_json(self) -> str:
        plain = {**vars(self)}
        for name in ("metrics", "events"):
            place: Place = plain[name]
            plain[name] = [place.offset, place.anchor.hex()]
        return json.dumps(plain)

    @classmethod
    def from_json(cls, text: str) -> "Reached":
        plain = json.loads(text)
        for name in ("metrics", "events"):
            offset, anchor = plain[name]
            plain[name] = Place(offset, bytes.fromhex(anchor))
        return cls(**plain)


class Index:
    """The writer's side; `catch_up` and `close` belong to one thread. Readers open connections of their own."""

    def __init__(self, run: RunFiles, directory: Path) -> None:
        """Raises UserError where this Python's SQLite has no full-text search."""
        self.run = run
        self.path = directory / FILE
        self._database = self._opened()
        self.reached = self._state()
        self._curves = CurveWriter(self._database)
        self._samples = SampleWriter(self._database, run, read_config(run))
        self.preview: list[dict[str, Any]] = []
        """Some lines of metrics.jsonl, from all over it, while there is much of it to be read."""
        self._look_ahead()

    def _opened(self) -> sqlite3.Connection:
        # The directory's own number: a run that was deleted and made anew at the same path is another one.
        identity = f"{VERSION} {os.stat(self.run.path).st_ino}"  # noqa: PTH116
        database = sqlite3.connect(self.path, check_same_thread=False)
        try:
            found = database.execute("select value from identity").fetchone()
        except sqlite3.DatabaseError:  # a new file, or one that is none of ours
            found = None
        if found is None or found[0] != identity:
            database.close()
            for suffix in ("", "-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
            database = sqlite3.connect(self.path, check_same_thread=False)
            database.execute("pragma journal_mode = wal")
            try:
                database.executescript(SCHEMA + curves.SCHEMA + sample_index.SCHEMA)
            except sqlite3.OperationalError as error:
                raise UserError(f"the run page needs an SQLite with full-text search (FTS5): {error}") from error
            database.execute("create table identity (value text)")
            database.execute("insert into identity values (?)", (identity,))
            database.commit()
        database.execute("pragma synchronous = off")  # it can be made again from the run
        database.execute("pragma cache_size = -16384")
        database.execute("pragma journal_size_limit = 33554432")
        return database

    def _state(self) -> Reached:
        row = self._database.execute("select value from state").fetchone()
        return Reached() if row is None else Reached.from_json(row[0])

    def close(self) -> None:
        self._database.close()

    def catch_up(self, seconds: float) -> Change:
        """Reads what is new for about so long. Raises OSError where a file is there and cannot be read."""
        end = time.monotonic() + seconds
        change = self._read_events()
        change = self._read_metrics(change)
        while self.reached.sampled < self.reached.steps and time.monotonic() < end and not self._behind():
            added = self._samples.add(self.reached.sampled)
            self.reached.sampled += 1
            self.reached.damaged += self._samples.damaged
            change = Change(change.steps, change.events, change.samples + added, change.cut, change.more)
        if change or change.more:
            self._curves.flush()
            self._database.execute(
                "insert into state values (1, ?) on conflict (id) do update set value = excluded.value",
                (self.reached.to_json(),),
            )
        self._database.commit()
        if self.reached.sampled < self.reached.steps or self._behind():
            return Change(change.steps, change.events, change.samples, change.cut, more=True)
        return change

    def _look_ahead(self) -> None:
        try:
            self.reached.metrics_bytes = self.run.metrics.stat().st_size
        except FileNotFoundError:
            return
        if self._behind():
            self.preview = preview_lines(self.run.metrics)

    def _behind(self) -> bool:
        return self.reached.metrics.offset + PREVIEW_BYTES < self.reached.metrics_bytes

    def _read_events(self) -> Change:
        news = read_news(self.run.events, self.reached.events)
        reached = self.reached
        if news.cut:
            self._database.execute("delete from event")
            reached.at_step = 0
        rows: list[dict[str, Any]] = []
        for line in news.lines:
            row = parsed(line)
            if row is None or "event" not in row:
                reached.damaged += 1
                continue
            step = row.get("at_step", row.get("step") if row["event"] in ("start", "committed") else None)
            if isinstance(step, int):
                reached.at_step = step
            rows.append(
                {
                    "time": row.get("time"),
                    "kind": str(row["event"]),
                    "step": reached.at_step,
                    "level": level_of(str(row["event"])),
                    "data": {key: value for key, value in row.items() if key not in ("time", "event", "at_step")},
                }
            )
        self._database.executemany(
            "insert into event (time, kind, step, level, data) values (:time, :kind, :step, :level, :data)",
            [{**row, "data": json.dumps(row["data"], ensure_ascii=False)} for row in rows],
        )
        reached.events = news.place
        return Change(events=rows, cut=news.cut, more=news.more)

    def _read_metrics(self, change: Change) -> Change:
        reached = self.reached
        news = read_news(self.run.metrics, reached.metrics)
        if news.cut:
            self._curves.clear()
            reached.steps = 0
            reached.sampled = self._samples.check(reached.sampled)
        reached.metrics_bytes = news.size
        rows: list[dict[str, Any]] = []
        for line in news.lines:
            row = parsed(line)
            step = None if row is None else row.get("step")
            if row is None or not isinstance(step, int) or not 0 <= step < MOST_STEPS:
                reached.damaged += 1
                continue
            self._curves.add(step, row)
            reached.steps = step + 1
            rows.append(row)
        if not news.more and reached.sampled > reached.steps:  # cut back further than the shards showed
            reached.sampled = self._samples.drop_from(reached.steps)
        reached.metrics = news.place
        if not self._behind():
            self.preview = []
        elif news.cut:
            self._look_ahead()
        return Change(rows, change.events, 0, change.cut or news.cut, change.more or news.more)


def level_of(kind: str) -> str:
    """`fault`, what went wrong; `mark`, what the run is counted by; `note`, the rest."""
    if kind in FAULTS or kind.endswith("_died"):
        return "fault"
    return "mark" if kind in ("start", "committed", "stopped", "finished") else "note"


def preview_lines(path: Path) -> list[dict[str, Any]]:
    """Some hundred lines, evenly over the file, each found by its place alone: 50,000 steps in a tenth of a second."""
    rows: list[dict[str, Any]] = []
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for number in range(PREVIEW_LINES):
                file.seek(size * number // PREVIEW_LINES)
                if number:
                    file.readline(2**20)
                line = file.readline(2**20)
                row = parsed(line) if line.endswith(b"\n") else None
                if (
                    row is not None
                    and isinstance(row.get("step"), int)
                    and (not rows or row["step"] > rows[-1]["step"])
                ):
                    rows.append(row)
    except OSError:
        return []
    return rows


def numbers_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a line of metrics, as a page is sent them."""
    return {
        name: float(f"{value:.5g}")
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step" and math.isfinite(value)
    }
