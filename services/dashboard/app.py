"""The run page as an ASGI app: the shell's files, and questions about runs under /api/. It only reads.

A run is named by its path below the directory that is shown, and looked up among those that were found there: no
parameter is a path. Every answer follows from the index and the run's files.
"""

import asyncio
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Header, Query
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.staticfiles import StaticFiles

from services.dashboard import curves, queries
from services.dashboard.access import Access
from services.dashboard.bad_batches import bad_batch, bad_batches
from services.dashboard.layout import (
    RunFiles,
    encoded,
    find_runs,
    last_lines,
    listing,
    read_config,
    read_json,
    state_of,
    status_of,
)
from services.dashboard.queries import Filter, Sort
from services.dashboard.sample_index import kinds_of
from services.dashboard.tokens import MOST_BYTES, map_rows, read_rows, token_view, tokenizer_of
from services.dashboard.watch import MOST_WATCHERS, Watched
from services.errors import UserError
from services.vocabulary import STEP

PAGE = Path(__file__).with_name("page")
MOST_OPEN = 8
"""Runs whose indexes are open at a time."""
LOOK_S = 2.0
"""How old the list of runs may be."""
CACHED_BYTES = 32 * 2**20
MOST_MAP_ROWS = 256
MOST_GROUP = 256
"""Samples of a group that are shown."""

MOST_INT = 2**63 - 1
"""The largest integer that SQLite has."""

Step = Annotated[int, Query(ge=0, le=MOST_INT)]


class Refused(Exception):  # noqa: N818 - reads as what it says where it is raised
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Runs:
    """The runs below a directory, and those of them that are open."""

    def __init__(self, root: Path, cache: Path | None = None) -> None:
        """Raises UserError where there is no such directory."""
        self.root = root
        self._cache = cache
        self._lock = threading.Lock()
        self._found: dict[str, RunFiles] = {}
        self._looked = -math.inf
        self._open: OrderedDict[str, Watched] = OrderedDict()
        self.all()

    def all(self) -> list[RunFiles]:
        with self._lock:
            if time.monotonic() - self._looked > LOOK_S:
                self._found = {run.name: run for run in find_runs(self.root)}
                self._looked = time.monotonic()
            return list(self._found.values())

    def open(self, name: str) -> Watched:
        """Raises Refused where there is no such run."""
        run = next((run for run in self.all() if run.name == name), None)
        if run is None:
            raise Refused(404, "no_such_run", "there is no such run here")
        with self._lock:
            if name not in self._open:
                self._open[name] = Watched(run, self._cache)
            self._open.move_to_end(name)
            idle = [key for key, watched in self._open.items() if not watched.watchers and key != name]
            gone = [self._open.pop(key) for key in idle[: max(0, len(self._open) - MOST_OPEN)]]
            watched = self._open[name]
        for old in gone:
            old.close()
        return watched

    def end(self) -> None:
        """The server is ending: open streams end too."""
        for watched in list(self._open.values()):
            watched.end()

    def close(self) -> None:
        for watched in self._open.values():
            watched.close()


class Answers:
    """Encoded answers, so that ten pages that ask the same cost as much as one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[Any, bytes] = OrderedDict()
        self._bytes = 0

    def of(self, key: Any, make: Callable[[], Any]) -> Response:
        with self._lock:
            body = self._kept.get(key)
            if body is not None:
                self._kept.move_to_end(key)
        if body is None:
            body = encoded(make())
            with self._lock:
                if key not in self._kept:
                    self._kept[key] = body
                    self._bytes += len(body)
                while self._bytes > CACHED_BYTES:
                    self._bytes -= len(self._kept.popitem(last=False)[1])
        return Response(body, media_type="application/json")


def create_app(runs: Runs, *, token: str, hosts: Sequence[str]) -> FastAPI:
    """The app of a directory of runs; `hosts` are the names that it may be asked under."""
    app = FastAPI(title="Attune run page", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Access, token=token, hosts=hosts)
    answers = Answers()

    @app.get("/")
    def shell() -> Response:  # pyright: ignore[reportUnusedFunction]
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE), name="page")

    @app.get("/api/runs")
    def all_runs() -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json({"root": str(runs.root), "runs": [listing(run) for run in runs.all()]})

    @app.get("/api/run")
    def one_run(run: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json(summary_of(runs.open(run)))

    @app.get("/api/curves")
    def some_curves(  # pyright: ignore[reportUnusedFunction]
        run: str,
        name: Annotated[list[str], Query(max_length=64)],
        low: Step | None = None,
        high: Step | None = None,
        points: Annotated[int, Query(ge=10, le=4000)] = 500,
    ) -> Response:
        watched = runs.open(run)
        watched.touch()
        key = ("curves", run, watched.version, tuple(name), low, high, points)
        return answers.of(key, lambda: curves_of(watched, name, low, high, points))

    @app.get("/api/events")
    def some_events(  # pyright: ignore[reportUnusedFunction]
        run: str, level: str = "", most: Annotated[int, Query(ge=1, le=5000)] = 500
    ) -> Response:
        watched = runs.open(run)
        with watched.database() as database:
            found = {"events": queries.events(database, level, most), "counts": queries.event_counts(database)}
        return _json(found)

    @app.get("/api/histogram")
    def one_histogram(  # pyright: ignore[reportUnusedFunction]
        run: str,
        source: str = "",
        bins: Annotated[int, Query(ge=1, le=200)] = 40,
        low: Step | None = None,
        high: Step | None = None,
    ) -> Response:
        watched = runs.open(run)
        with watched.database() as database:
            key = ("histogram", run, watched.version, source, bins, low, high)
            return answers.of(key, lambda: queries.histogram(database, source, bins, low, high))

    @app.get("/api/samples")
    def some_samples(  # pyright: ignore[reportUnusedFunction]
        run: str,
        text: Annotated[str, Query(max_length=500)] = "",
        step_from: Step | None = None,
        step_to: Step | None = None,
        source: str | None = None,
        low: float | None = None,
        high: float | None = None,
        finish: str = "",
        flag: str = "",
        failed: str | None = None,
        code: str = "",
        group: str = "",
        has_map: bool = False,
        sort: Sort = "newest",
        offset: Annotated[int, Query(ge=0, le=queries.MOST_OFFSET)] = 0,
        limit: Annotated[int, Query(ge=1, le=queries.MOST_ROWS)] = 50,
    ) -> Response:
        wanted = Filter(text, step_from, step_to, source, low, high, finish, flag, failed, code, group, has_map)
        watched = runs.open(run)
        with watched.database() as database:
            key = ("samples", run, watched.version, wanted, sort, offset, limit)
            return answers.of(key, lambda: queries.page(database, wanted, sort, offset, limit))

    @app.get("/api/choices")
    def some_choices(run: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        watched = runs.open(run)
        with watched.database() as database:
            return answers.of(("choices", run, watched.version), lambda: queries.choices(database))

    @app.get("/api/sample")
    def one_sample(run: str, sample: str, step: Step | None = None) -> Response:  # pyright: ignore[reportUnusedFunction]
        watched = runs.open(run)
        return _json(token_view(sample_row(watched, sample, step), tokenizer_of(watched.run)))

    @app.get("/api/group")
    def one_group(run: str, group: str, step: Step) -> Response:  # pyright: ignore[reportUnusedFunction]
        watched = runs.open(run)
        with watched.database() as database:
            places = queries.group_rows(database, group, step)
        return _json(group_of(watched.run, places))

    @app.get("/api/map")
    def one_map(  # pyright: ignore[reportUnusedFunction]
        run: str,
        sample: str,
        step: Step | None = None,
        low: Annotated[int, Query(ge=0, le=MOST_INT)] = 0,
        count: Annotated[int, Query(ge=1, le=MOST_MAP_ROWS)] = MOST_MAP_ROWS,
    ) -> Response:
        watched = runs.open(run)
        try:
            found = map_rows(watched.run, sample_row(watched, sample, step), low, low + count)
        except (ValueError, KeyError) as error:
            raise Refused(409, "no_map", str(error)) from None
        if found is None:
            raise Refused(404, "no_map", "the run kept no map of this sample (rollout.keep_maps)")
        rows, columns, data = found
        shape = {"x-rows": str(rows), "x-columns": str(columns)}
        return Response(data, media_type="application/octet-stream", headers=shape)

    @app.get("/api/verdicts")
    def some_verdicts(  # pyright: ignore[reportUnusedFunction]
        run: str,
        source: str,
        limit: Annotated[int, Query(ge=1, le=queries.MOST_ROWS)] = 50,
        offset: Annotated[int, Query(ge=0, le=queries.MOST_OFFSET)] = 0,
        only: Annotated[str, Query(pattern="^(|consistent|inconsistent)$")] = "",
    ) -> Response:
        watched = runs.open(run)
        with watched.database() as database:
            return _json(queries.verdicts(database, source, limit, offset, only))

    @app.get("/api/failures")
    def all_failures(run: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        watched = runs.open(run)
        with watched.database() as database:
            key = ("failures", run, watched.version)
            return answers.of(key, lambda: failures_of(watched, queries.failures(database)))

    @app.get("/api/bad_batches")
    def all_bad_batches(run: str) -> Response:  # pyright: ignore[reportUnusedFunction]
        return _json({"batches": bad_batches(runs.open(run).run)})

    @app.get("/api/bad_batch")
    def one_bad_batch(run: str, step: Step) -> Response:  # pyright: ignore[reportUnusedFunction]
        files = runs.open(run).run
        found = bad_batch(files, step, tokenizer_of(files))
        if found is None:
            raise Refused(404, "no_batch", f"the run kept no batch of step {step} in bad_batches/")
        return _json(found)

    @app.get("/api/stream")
    async def stream(run: str, last_event_id: Annotated[str | None, Header()] = None) -> Response:  # pyright: ignore[reportUnusedFunction]
        watched = await asyncio.to_thread(runs.open, run)  # which looks through directories, and ends what is idle
        if watched.watchers >= MOST_WATCHERS:
            raise Refused(503, "too_many_watchers", f"{MOST_WATCHERS} pages watch this run already")
        return StreamingResponse(
            watched.stream(last_event_id), media_type="text/event-stream", headers={"x-accel-buffering": "no"}
        )

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return _problem(error.status, error.code, str(error))

    async def unusable(_: Request, error: Exception) -> Response:
        return _problem(503, "unavailable", str(error))

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(UserError, unusable)
    app.add_exception_handler(TimeoutError, unusable)
    return app


def _json(value: Any) -> Response:
    return Response(encoded(value), media_type="application/json")


def _problem(status: int, code: str, message: str) -> Response:
    return JSONResponse({"error": {"code": code, "message": message}}, status_code=status)


def summary_of(watched: Watched) -> dict[str, Any]:
    """What a page asks first: the run, its recipe, its metrics, its state and how far the index is."""
    run = watched.run
    status = status_of(run)
    with watched.database() as database:
        names = curves.metric_names(database)
        sources = [name for number, name in queries.source_names(database).items() if number]
    preview = watched.preview
    if preview:
        names = sorted(
            {*names, *(name for name in preview[-1] if isinstance(preview[-1][name], int | float))} - {"step"}
        )
    config = read_config(run)
    kinds = kinds_of(config)
    return {
        "name": run.name,
        "state": state_of(last_lines(run.events, 1000), status),
        "status": status,
        "steps": watched.steps,
        "progress": watched.progress,
        "problem": watched.problem,
        "metrics": names,
        "vocabulary": vocabulary_of(names),
        "sources": [{"name": name, "kind": kinds.get(name, "")} for name in sorted({*sources, *kinds})],
        "recipe": config,
        "summary": read_json(run.path / "summary.json"),
        "last": (last_lines(run.metrics, 1) or [{}])[0],
        "tokenizer": tokenizer_of(run).why,
    }


def vocabulary_of(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """What those metrics mean that the project's vocabulary knows."""
    found = {name: STEP.find(name) for name in names}
    return {
        name: {
            "unit": "" if entry.metric.unit == "1" else entry.metric.unit,
            "meaning": entry.metric.meaning + (f" Look out: {entry.metric.bad}" if entry.metric.bad else ""),
        }
        for name, entry in found.items()
        if entry is not None
    }


def curves_of(watched: Watched, names: Sequence[str], low: int | None, high: int | None, points: int) -> dict[str, Any]:
    """Curves of steps low .. high (both there), at most so many points each; `preview` while the index is behind."""
    begin = low or 0
    end = min(watched.steps, watched.steps if high is None else high + 1)
    begin = min(begin, end)
    preview = watched.preview
    if preview:
        found = {name: curves.previewed(preview, name, begin, end) for name in names}
        return {"steps": watched.steps, "preview": True, "curves": found}
    found: dict[str, Any] = {}
    with watched.database() as database:
        for name in names:
            values = curves.column(database, name, begin, end) if end > begin else None
            if values is not None:
                found[name] = curves.drawn(values, begin, points)
    return {"steps": watched.steps, "preview": False, "curves": found}


def sample_row(watched: Watched, sample: str, step: int | None) -> dict[str, Any]:
    """The sample's line. Raises Refused where it is not there, or no longer."""
    with watched.database() as database:
        place = queries.place_of_sample(database, sample, step)
    rows = [] if place is None else read_rows(watched.run, [place])
    if not rows or rows[0].get("sample_id") != sample:
        raise Refused(404, "no_such_sample", "there is no such sample; the run may have been cut back since")
    return rows[0]


def group_of(run: RunFiles, places: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """The samples at (step, place, length) token by token, the first MOST_GROUP of them or MOST_BYTES; `more` are left
    out."""
    fitting = sum(size <= MOST_BYTES for size in accumulate(length for _, _, length in places))
    shown = places[: min(MOST_GROUP, max(1, fitting))]
    tokenizer = tokenizer_of(run)
    samples = [token_view(row, tokenizer) for place in shown for row in read_rows(run, [place])]
    return {"samples": samples, "more": len(places) - len(shown)}


def failures_of(watched: Watched, found: list[dict[str, Any]]) -> dict[str, Any]:
    """With the message that one sample of each kind of failure carries."""
    for failure in found:
        rows = read_rows(watched.run, [failure.pop("at")])
        row: dict[str, Any] = rows[0] if rows else {}
        scores: dict[str, Any] = {"": row.get("reward"), **(row.get("scores") or {})}
        score: dict[str, Any] = scores.get(failure["source"]) or {}
        error: dict[str, Any] = score.get("error") or {}
        failure["kind"], failure["message"] = error.get("kind"), error.get("message")
    return {"failures": found}
