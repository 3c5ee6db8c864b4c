"""Samples in the index: a row each with what is filtered and sorted by, its scores, its flags and its words."""

import json
import math
import os
import sqlite3
from collections.abc import Mapping
from typing import Any, cast

from services.dashboard.layout import RunFiles, parsed

LONGEST_TEXT = 20_000
"""Characters of a prompt, and of a response, whose words are searched."""
REWARD = 0
"""The source number of the combined reward."""
JUDGES = ("judge", "principle")

SCHEMA = """
create table shard (step integer primary key, size integer not null, changed integer not null);
create table source (id integer primary key, name text unique not null);
create table sample (
    id integer primary key, step integer not null, sample_id text not null, group_id text not null,
    place integer not null, length integer not null, finish text, tokens integer not null, reward real, code text,
    advantage real, kl real, stale integer, incarnation integer, has_map integer not null);
create index sample_step on sample (step);
create index sample_name on sample (sample_id);
create index sample_group on sample (group_id, step);
create index sample_reward on sample (reward);
create table score (
    sample integer not null, source integer not null, value real, code text, detail text,
    primary key (sample, source)) without rowid;
create index score_value on score (source, value, sample);
create index score_code on score (code, source) where code is not null;
create table flag (sample integer not null, flag text not null, primary key (flag, sample)) without rowid;
create virtual table words using fts5 (prompt, response, tokenize = 'unicode61 remove_diacritics 2');
"""


class SampleWriter:
    """Adds shards in the order of steps, so that later steps have higher numbers."""

    def __init__(self, database: sqlite3.Connection, run: RunFiles, config: Mapping[str, Any]) -> None:
        self._database = database
        self._run = run
        self._sources: dict[str, int] = {
            name: number for number, name in database.execute("select id, name from source") if number != REWARD
        }
        self._judges = {name for name, kind in kinds_of(config).items() if kind in JUDGES}
        last = database.execute("select max(id) from sample").fetchone()[0]
        self._next = int(last or 0) + 1
        self.damaged = 0
        database.execute("insert or ignore into source values (?, '')", (REWARD,))

    def add(self, step: int) -> int:
        """Reads the shard of a step, where there is one; returns its samples. `damaged` counts lines that are none."""
        self.damaged = 0
        try:
            with self._run.shard(step).open("rb") as file:
                samples: list[tuple[Any, ...]] = []
                scores: list[tuple[Any, ...]] = []
                flags: list[tuple[int, str]] = []
                words: list[tuple[int, str, str]] = []
                place = 0
                for line in file:
                    row = parsed(line) if line.endswith(b"\n") else None
                    try:
                        if row is None or not isinstance(row.get("sample_id"), str):
                            raise ValueError("no sample")
                        number = self._next
                        marks = [(number, _name(flag)) for flag in row.get("flags") or ()]
                        read = (_sample_row(number, step, place, len(line), row), self._score_rows(number, row))
                    except (ValueError, TypeError, AttributeError, KeyError, IndexError):  # no row of ours
                        self.damaged += 1
                        place += len(line)
                        continue
                    self._next += 1
                    samples.append(read[0])
                    scores += read[1]
                    flags += marks
                    words.append((number, _text(row.get("prompt")), _text(row.get("response"))))
                    place += len(line)
                status = os.fstat(file.fileno())
        except FileNotFoundError:
            return 0
        run = self._database.executemany
        run(f"insert into sample values ({','.join('?' * 15)})", samples)  # noqa: S608 - our own marks
        run("insert or replace into score values (?, ?, ?, ?, ?)", scores)
        run("insert or ignore into flag values (?, ?)", [(number, flag) for number, flag in flags])
        run("insert into words (rowid, prompt, response) values (?, ?, ?)", words)
        self._database.execute(
            "insert or replace into shard values (?, ?, ?)", (step, status.st_size, status.st_mtime_ns)
        )
        return len(samples)

    def _score_rows(self, number: int, row: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = [(number, REWARD, *_score(row.get("reward")), None)]
        scores: Any = row.get("scores") or {}
        for name, score in scores.items():
            source = self._sources.get(_name(name))
            if source is None:
                source = self._sources[name] = int(
                    self._database.execute("insert into source (name) values (?)", (name,)).lastrowid or 0
                )
            detail = json.dumps(score.get("detail")) if name in self._judges else None
            rows.append((number, source, *_score(score), detail))
        return rows

    def check(self, sampled: int) -> int:
        """After a cut: how many steps' shards are as they were read; the rows of the others are dropped."""
        for step, size, changed in self._database.execute("select step, size, changed from shard order by step"):
            try:
                status = self._run.shard(step).stat()
            except FileNotFoundError:
                return self.drop_from(step)
            if (status.st_size, status.st_mtime_ns) != (size, changed):
                return self.drop_from(step)
        return sampled

    def drop_from(self, step: int) -> int:
        """Forgets the samples of `step` and later; returns `step`."""
        first = self._database.execute("select min(id) from sample where step >= ?", (step,)).fetchone()[0]
        if first is not None:
            for table, column in (("sample", "id"), ("score", "sample"), ("flag", "sample"), ("words", "rowid")):
                self._database.execute(f"delete from {table} where {column} >= ?", (first,))  # noqa: S608 - our names
            self._next = int(first)
        self._database.execute("delete from shard where step >= ?", (step,))
        return step


def kinds_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The kind of each source of the recipe, by its name."""
    reward: Any = config.get("reward")
    found = cast(dict[str, Any], reward).get("sources") if isinstance(reward, dict) else None
    if not isinstance(found, dict):
        return {}
    sources = cast(dict[str, Any], found)
    return {
        name: str(cast(dict[str, Any], source).get("kind", name))
        for name, source in sources.items()
        if isinstance(source, dict)
    }


def _sample_row(number: int, step: int, place: int, length: int, row: Mapping[str, Any]) -> tuple[Any, ...]:
    spans: Any = row.get("policy_versions") or []
    attention: Any = row.get("attention") or {}
    value, code = _score(row.get("reward"))
    return (
        number,
        step,
        _name(row["sample_id"]),
        _name(row.get("group_id", "")),
        place,
        length,
        _text(row.get("finish_reason")) or None,
        len(row.get("response_ids") or ()),
        value,
        code,
        _number(row.get("advantage")),
        _number(row.get("kl_reference")),
        max((step - int(span[1]) for span in spans), default=None),
        max((int(span[0]) for span in spans), default=None),
        int(bool(attention.get("map_ref") or attention.get("map"))),
    )


def _score(score: Any) -> tuple[float | None, str | None]:
    """(value, None) or (None, code); (None, "not_scored") where there is no score."""
    if not score:
        return None, "not_scored"
    if score.get("status") == "ok":
        return _number(score.get("value")), None
    error: dict[str, Any] = score.get("error") or {}
    return None, _name(error.get("code", "failed"))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _name(value: Any) -> str:
    """Raises ValueError for half a sign: no name of ours has one, and SQLite does not take it."""
    text = str(value)
    text.encode()
    return text


def _text(value: Any) -> str:
    """As SQLite can hold it: half a sign, which JSON may spell out, becomes a question mark."""
    return str(value or "")[:LONGEST_TEXT].encode("utf-8", "replace").decode()
