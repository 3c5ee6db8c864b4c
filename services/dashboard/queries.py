"""Questions about samples that the index answers: a page of the browser, a histogram, a group, verdicts, failures."""

import json
import math
import re
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from services.dashboard.sample_index import REWARD

SHOWN_TEXT = 400
"""Characters of a text in a row of the browser."""
MOST_ROWS = 200
MOST_OFFSET = 20_000

Sort = Literal["newest", "oldest", "reward", "-reward", "advantage", "-advantage", "kl", "-kl", "tokens", "-tokens"]
_ORDER = {"reward": "reward", "advantage": "advantage", "kl": "kl", "tokens": "tokens"}


@dataclass(frozen=True)
class Filter:
    """Which samples. `source` with `low` and `high`: its value in [low, high); "" is the combined reward. `failed`
    names the source that failed on it, `code` with what: one score, where both are given, as `failures` counts them.
    `text` are words, "phrases", the last word as a beginning."""

    text: str = ""
    step_from: int | None = None
    step_to: int | None = None
    source: str | None = None
    low: float | None = None
    high: float | None = None
    finish: str = ""
    flag: str = ""
    failed: str | None = None
    code: str = ""
    group: str = ""
    has_map: bool = False


def search_text(text: str) -> str:
    """The full-text question of what was typed: nothing in it is taken for a sign of the question's own language."""
    text = text.replace("\0", " ")  # it would end the question in the middle of a phrase
    parts = [(phrase or word) for phrase, word in re.findall(r'"([^"]*)"|([^\s"]+)', text)]
    quoted = [f'"{part}"' for part in parts if any(sign.isalnum() for sign in part)]
    if not quoted:
        return '""'
    return " ".join(quoted) + ("" if text.rstrip().endswith('"') else "*")


def _where(database: sqlite3.Connection, wanted: Filter) -> tuple[str, dict[str, Any]]:
    terms: list[str] = ["1"]
    values: dict[str, Any] = {}

    def also(term: str, **more: Any) -> None:
        terms.append(term)
        values.update(more)

    if wanted.text.strip():
        also("id in (select rowid from words where words match :text)", text=search_text(wanted.text))
    if wanted.step_from is not None:
        also("step >= :step_from", step_from=wanted.step_from)
    if wanted.step_to is not None:
        also("step <= :step_to", step_to=wanted.step_to)
    if wanted.source is not None and (wanted.low is not None or wanted.high is not None):
        number = source_number(database, wanted.source)
        ranged = "id in (select sample from score where source = :source and value >= :low and value < :high)"
        also(
            "reward >= :low and reward < :high" if number == REWARD else ranged,
            source=number,
            low=-math.inf if wanted.low is None else wanted.low,
            high=math.inf if wanted.high is None else wanted.high,
        )
    if wanted.finish:
        also("finish = :finish", finish=wanted.finish)
    if wanted.flag:
        also("id in (select sample from flag where flag = :flag)", flag=wanted.flag)
    if wanted.failed is not None or wanted.code:
        score = "code = :code" if wanted.code else "code is not null"
        if wanted.failed is not None:
            score += " and source = :failed"
            values["failed"] = source_number(database, wanted.failed)
        also(f"id in (select sample from score where {score})", code=wanted.code)  # noqa: S608 - our terms
    if wanted.group:
        also("group_id = :group", group=wanted.group)
    if wanted.has_map:
        also("has_map")
    return " and ".join(terms), values


def source_number(database: sqlite3.Connection, name: str) -> int:
    """-1, which no score has, for a source that is not there."""
    row = database.execute("select id from source where name = ?", (name,)).fetchone()
    return -1 if row is None else int(row[0])


def source_names(database: sqlite3.Connection) -> dict[int, str]:
    return dict(database.execute("select id, name from source order by name"))


def page(database: sqlite3.Connection, wanted: Filter, sort: Sort, offset: int, limit: int) -> dict[str, Any]:
    """Rows [limit] from `offset`, and how many samples there are in all."""
    where, values = _where(database, wanted)
    total = database.execute(f"select count(*) from sample where {where}", values).fetchone()[0]  # noqa: S608 - our terms
    if sort in ("newest", "oldest"):
        order = f"id {'desc' if sort == 'newest' else 'asc'}"
    else:
        column = _ORDER[sort.removeprefix("-")]
        order = f"{column} {'desc' if sort.startswith('-') else 'asc'} nulls last, id desc"
    rows = database.execute(
        f"select {COLUMNS} from sample where {where} order by {order} limit :limit offset :offset",  # noqa: S608
        {**values, "limit": min(limit, MOST_ROWS), "offset": min(offset, MOST_OFFSET)},
    ).fetchall()
    return {"total": total, "offset": offset, "rows": described(database, rows)}


COLUMNS = "id, step, sample_id, group_id, finish, tokens, reward, code, advantage, kl, stale, incarnation, has_map"


def described(database: sqlite3.Connection, rows: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Rows of COLUMNS with their beginnings of texts, scores and flags."""
    names = source_names(database)
    found: list[dict[str, Any]] = []
    for row in rows:
        sample: dict[str, Any] = dict(zip(COLUMNS.split(", "), row, strict=True))
        number = sample.pop("id")
        text = database.execute(
            "select substr(prompt, 1, :most), substr(response, 1, :most) from words where rowid = :number",
            {"most": SHOWN_TEXT, "number": number},
        ).fetchone() or ("", "")
        sample["prompt"], sample["response"] = text
        sample["has_map"] = bool(sample["has_map"])
        scores = database.execute("select source, value, code from score where sample = ?", (number,))
        sample["scores"] = {
            names[source]: {"value": value, "code": code} for source, value, code in scores if source != REWARD
        }
        flags = database.execute("select flag from flag where sample = ?", (number,))
        sample["flags"] = [flag for (flag,) in flags]
        found.append(sample)
    return found


def group_rows(database: sqlite3.Connection, group: str, step: int) -> list[tuple[int, int, int]]:
    """(step, place, length) of a group's samples in their shard."""
    return database.execute(
        "select step, place, length from sample where group_id = ? and step = ? order by id", (group, step)
    ).fetchall()


def place_of_sample(database: sqlite3.Connection, sample: str, step: int | None) -> tuple[int, int, int] | None:
    """(step, place, length); of the latest step where none is given."""
    return database.execute(
        "select step, place, length from sample where sample_id = ? and (? is null or step = ?) order by id desc",
        (sample, step, step),
    ).fetchone()


def histogram(
    database: sqlite3.Connection, source: str, bins: int, step_from: int | None, step_to: int | None
) -> dict[str, Any]:
    """Values of a source ("" is the reward) in equal bins; `edges` [bins + 1], the last bin holds its upper edge."""
    number = source_number(database, source)
    where, values = "source = :source", {"source": number}
    if step_from is not None or step_to is not None:
        first, last = _numbers_of_steps(database, step_from, step_to)
        where += " and sample between :first and :last"
        values |= {"first": first, "last": last}
    low, high, rows, count, total, square = database.execute(
        "select min(value), max(value), count(*), count(value), sum(value), sum(value * value) "  # noqa: S608 - ours
        f"from score where {where}",
        values,
    ).fetchone()
    found: dict[str, Any] = {"source": source, "count": count, "failed": rows - count, "edges": [], "counts": []}
    if not count:
        return found
    mean = total / count
    found |= {"mean": mean, "std": math.sqrt(max(0.0, square / count - mean * mean)), "min": low, "max": high}
    if low == high:
        return {**found, "edges": [low, high], "counts": [count]}
    width = (high - low) / bins
    edges = [low, *(min(high, low + width * i) for i in range(1, bins)), high]
    # Counted between the edges that are sent, as a bar's link selects: a place computed from the value may be another.
    counts = [
        database.execute(
            f"select count(*) from score where {where} and value >= :begin and value < :end",  # noqa: S608 - our terms
            {**values, "begin": begin, "end": end},
        ).fetchone()[0]
        for begin, end in zip(edges[:-1], [*edges[1:-1], math.inf], strict=True)
    ]
    return {**found, "edges": edges, "counts": counts}


def _numbers_of_steps(database: sqlite3.Connection, low: int | None, high: int | None) -> tuple[int, int]:
    """The first and last row number of steps low .. high: later steps have higher numbers."""
    first = database.execute("select min(id) from sample where step >= ?", (low or 0,)).fetchone()[0]
    last = database.execute(
        "select max(id) from sample where step <= ?", (2**62 if high is None else high,)
    ).fetchone()[0]
    return (1, 0) if first is None or last is None else (first, last)


def choices(database: sqlite3.Connection) -> dict[str, Any]:
    """What the filters can be set to."""
    return {
        "finish": [name for (name,) in database.execute("select distinct finish from sample") if name],
        "flags": dict(database.execute("select flag, count(*) from flag group by flag order by 2 desc limit 50")),
        "samples": database.execute("select count(*) from sample").fetchone()[0],
        "maps": database.execute("select count(*) from sample where has_map").fetchone()[0],
    }


def failures(database: sqlite3.Connection) -> list[dict[str, Any]]:
    """Failed scores by source and code, with how many, when first and last, and one sample of each."""
    names = source_names(database)
    rows = database.execute(
        "select source, score.code, count(*), min(step), max(step), max(sample.id) from score join sample "
        "on sample.id = score.sample where score.code is not null group by source, score.code order by 3 desc limit 200"
    ).fetchall()
    found: list[dict[str, Any]] = []
    for source, code, count, first, last, number in rows:
        found_at = "select sample_id, step, place, length from sample where id = ?"
        example = database.execute(found_at, (number,)).fetchone()
        found.append(
            {
                "source": names[source],
                "code": code,
                "count": count,
                "first": first,
                "last": last,
                "sample_id": example[0],
                "step": example[1],
                "at": example[1:],
            }
        )
    return found


def verdicts(database: sqlite3.Connection, source: str, limit: int, offset: int, only: str) -> dict[str, Any]:
    """What a judge said, newest first, with what its verdicts come to. `only`: "", "consistent", "inconsistent"."""
    number = source_number(database, source)
    where = "source = ? and detail is not null and value is not null"
    if only:
        where += f" and json_extract(detail, '$.consistent') = {int(only == 'consistent')}"
    rows = database.execute(
        "select sample_id, step, value, detail, substr(prompt, 1, 400), substr(response, 1, 400) "  # noqa: S608 - ours
        "from score join sample on sample.id = score.sample join words on words.rowid = score.sample "
        f"where {where} order by score.sample desc limit ? offset ?",
        (number, min(limit, MOST_ROWS), min(offset, MOST_OFFSET)),
    ).fetchall()
    count, better, consistent, mass, spread, principles = database.execute(
        "select count(*), avg(value > 0), avg(json_extract(detail, '$.consistent')), "
        "avg(json_extract(detail, '$.mass')), avg(json_extract(detail, '$.spread')), "
        "avg(json_extract(detail, '$.principles')) from score "
        "where source = ? and detail is not null and value is not null",
        (number,),
    ).fetchone()
    return {
        "count": count,
        "better": better,
        "consistent": consistent,
        "mass": mass,
        "spread": spread,
        "principles": principles,
        "rows": [
            {"sample_id": sample, "step": step, "value": value, "detail": _detail(detail), "prompt": prompt,
             "response": response}
            for sample, step, value, detail, prompt, response in rows
        ],
    }  # fmt: skip


def _detail(text: str) -> Mapping[str, Any]:
    return json.loads(text) or {}


def events(database: sqlite3.Connection, level: str, most: int) -> list[dict[str, Any]]:
    """The last events, oldest first; of one level where one is named."""
    where = "where level = :level" if level else ""
    rows = database.execute(
        f"select time, kind, step, level, data from event {where} order by id desc limit :most",  # noqa: S608 - our term
        {"level": level, "most": most},
    ).fetchall()
    return [
        {"time": time, "kind": kind, "step": step, "level": level, "data": json.loads(data)}
        for time, kind, step, level, data in reversed(rows)
    ]


def event_counts(database: sqlite3.Connection) -> list[dict[str, Any]]:
    rows = database.execute("select kind, level, count(*), max(time) from event group by kind, level order by 3 desc")
    return [{"kind": kind, "level": level, "count": count, "last": last} for kind, level, count, last in rows]
