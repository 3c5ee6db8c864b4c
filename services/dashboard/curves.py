"""Metrics as columns of blocks in the index, and curves drawn from them at a width of so many points.

A block is 512 steps of one metric as float64, NaN where a step has none. What a curve costs follows from the steps of
its range (50,000 steps: 100 blocks), not from the lines of metrics.jsonl, and nothing of it is held in memory.
"""

import math
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 512
MOST_STEPS = 20_000_000
"""A step beyond is taken for a damaged line."""

SCHEMA = """
create table metric (id integer primary key, name text unique not null);
create table block (id integer primary key, data blob not null);
"""

Column = NDArray[np.float64]


class CurveWriter:
    """Adds lines to the columns; `flush` writes what is open, and the caller commits."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self._ids: dict[str, int] = dict(database.execute("select name, id from metric"))
        self._open: dict[int, Column] = {}
        self._block = -1

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        block, place = divmod(step, BLOCK)
        if block != self._block:
            self.flush()
            self._open, self._block = {}, block
        for name, value in metrics.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or name == "step":
                continue
            metric = self._ids.get(name)
            if metric is None:
                metric = self._named(name)
            column = self._open.get(metric)
            if column is None:
                column = self._open[metric] = self._loaded(metric, block)
            column[place] = value

    def _named(self, name: str) -> int:
        metric = int(self._database.execute("insert into metric (name) values (?)", (name,)).lastrowid or 0)
        self._ids[name] = metric
        return metric

    def _loaded(self, metric: int, block: int) -> Column:
        row = self._database.execute("select data from block where id = ?", (_key(metric, block),)).fetchone()
        return np.full(BLOCK, np.nan) if row is None else np.frombuffer(row[0], np.float64).copy()

    def flush(self) -> None:
        self._database.executemany(
            "insert into block (id, data) values (?, ?) on conflict (id) do update set data = excluded.data",
            [(_key(metric, self._block), column.tobytes()) for metric, column in self._open.items()],
        )

    def clear(self) -> None:
        """Forgets all: the file was cut back, and is read again."""
        self._database.execute("delete from block")
        self._open, self._block = {}, -1


def _key(metric: int, block: int) -> int:
    return (metric << 24) | block


def metric_names(database: sqlite3.Connection) -> list[str]:
    return [name for (name,) in database.execute("select name from metric order by name")]


def column(database: sqlite3.Connection, name: str, low: int, high: int) -> Column | None:
    """The values of steps low .. high - 1; None where the run has no such metric."""
    row = database.execute("select id from metric where name = ?", (name,)).fetchone()
    if row is None:
        return None
    first, last = low // BLOCK, max(low, high - 1) // BLOCK
    whole = np.full((last - first + 1) * BLOCK, np.nan)
    cursor = database.execute(
        "select id, data from block where id between ? and ?", (_key(row[0], first), _key(row[0], last))
    )
    for key, data in cursor:
        begin = ((key & 0xFFFFFF) - first) * BLOCK
        whole[begin : begin + BLOCK] = np.frombuffer(data, np.float64)
    return whole[low - first * BLOCK : high - first * BLOCK]


def drawn(values: Column, low: int, points: int) -> dict[str, Any]:
    """A column as at most `points` points: `step`, the last of each bucket; `mean`; and `min`, `max` where a point
    stands for several steps. Steps without a value are left out."""
    width = max(1, math.ceil(len(values) / points))
    steps = np.arange(low, low + len(values))
    if width == 1:
        there = np.isfinite(values)
        return {"width": 1, "step": steps[there].tolist(), "mean": numbers(values[there])}
    starts = np.arange(0, len(values), width)
    finite = np.isfinite(values)
    counts = np.add.reduceat(finite.astype(np.int64), starts)
    sums = np.add.reduceat(np.where(finite, values, 0.0), starts)
    lows = np.minimum.reduceat(np.where(finite, values, np.inf), starts)
    highs = np.maximum.reduceat(np.where(finite, values, -np.inf), starts)
    there = counts > 0
    ends = np.minimum(starts + width, len(values)) - 1
    return {
        "width": width,
        "step": steps[ends][there].tolist(),
        "mean": numbers(sums[there] / counts[there]),
        "min": numbers(lows[there]),
        "max": numbers(highs[there]),
    }


def numbers(values: Column) -> list[float]:
    """Five significant digits: what a screen shows."""
    return [float(f"{value:.5g}") for value in values.tolist()]


def previewed(rows: Sequence[Mapping[str, Any]], name: str, low: int, high: int) -> dict[str, Any]:
    """A curve from some lines of the file, while the columns are still being filled."""
    pairs = [
        (int(row["step"]), float(row[name]))
        for row in rows
        if isinstance(row.get(name), int | float) and math.isfinite(row[name]) and low <= int(row["step"]) < high
    ]
    return {"width": 1, "step": [step for step, _ in pairs], "mean": [float(f"{value:.5g}") for _, value in pairs]}
