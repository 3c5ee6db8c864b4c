"""`attune report`: one HTML file of a run, to be sent to somebody: curves, tables, and pictures of samples.

It needs no script and forbids any: everything that comes from the run is escaped, and the file's own policy lets
nothing load or run. Its figures come from the same index as the page's.
"""

import sqlite3
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any, cast

import yaml

from services.dashboard import curves, queries
from services.dashboard.index import Index
from services.dashboard.layout import RunFiles, find_runs, last_lines, read_config, state_of, status_of
from services.dashboard.queries import Filter, Sort
from services.dashboard.sample_index import kinds_of
from services.dashboard.svg import bars_svg, curve_svg
from services.dashboard.tokens import map_rows, read_rows, token_view, tokenizer_of
from services.errors import UserError
from services.vocabulary import STEP

POINTS = 300
CHOSEN: tuple[tuple[str, Sort], ...] = (
    ("highest reward", "-reward"),
    ("lowest reward", "reward"),
    ("highest KL to the reference", "-kl"),
    ("longest", "-tokens"),
    ("newest", "newest"),
)
SECTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Rewards", ("reward/mean", "reward/within_prompt_std", "reward/coverage", "reward/focus", "reward/repeat")),
    (
        "Policy",
        ("kl/reference", "policy/entropy_sampled", "policy/clip_share", "policy/grad_norm", "value/explained_variance"),
    ),
    ("Lengths", ("length/mean", "length/max", "length/truncated_share")),
    (
        "Staleness and queues",
        ("staleness/mean", "staleness/max", "queue/scored", "queue/generated", "idle/learner", "idle/rollouts"),
    ),
    ("Speed", ("time/step_s", "throughput/tokens_per_s")),
)
STYLE = Path(__file__).with_name("report.css")
MOST_FAULTS = 100
MOST_TOKENS = 2000
"""Of one picture."""

Html = str
"""Markup of ours; what comes from a run is text until `text` has escaped it."""


def write_report(path: Path, out: Path) -> int:
    """Writes the report of the run in `path`; returns its bytes.

    Raises:
        UserError: no run is there, or `out` cannot be written.
    """
    runs = find_runs(path)
    if len(runs) != 1 or runs[0].path != path.resolve():
        raise UserError(f"{path}: is no run directory (it has no events.jsonl or metrics.jsonl)")
    page = report_of(runs[0])
    partial = out.with_name(out.name + ".partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from error
    return out.stat().st_size


def report_of(run: RunFiles) -> Html:
    with _indexed(run) as (index, database):
        steps = index.reached.steps
        config = read_config(run)
        names = curves.metric_names(database)
        faults = queries.events(database, "fault", MOST_FAULTS)
        parts = [
            _head(run, steps, index.reached.sampled),
            _figures(run, names),
            *(_curves(database, title, wanted, steps, faults, names) for title, wanted in SECTIONS),
            _sources(database, config, steps, faults, names),
            _judges(database, config),
            _samples(run, database),
            _failures(database),
            _faults(faults),
            _recipe(config),
        ]
    title = text(f"Attune: {run.name}")
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<style>{STYLE.read_text(encoding='utf-8')}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


@contextmanager
def _indexed(run: RunFiles) -> Generator[tuple[Index, sqlite3.Connection]]:
    """An index of the run for this report alone; of a run that goes on, as far as it was when it was read."""
    with tempfile.TemporaryDirectory(prefix="attune-report-") as directory:
        index = Index(run, Path(directory))
        try:
            while index.catch_up(5.0).more:
                pass
            database = sqlite3.connect(index.path)
            try:
                yield index, database
            finally:
                database.close()
        finally:
            index.close()


def text(value: object) -> Html:
    return escape(str(value), quote=True)


def number(value: float | None) -> Html:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def table(heads: Sequence[str], rows: Sequence[Sequence[Html]], numeric: Sequence[int] = ()) -> Html:
    """Cells are markup of ours."""

    def cell(tag: str, at: int, shown: Html) -> Html:
        return f"<{tag}{' class=n' if at in numeric else ''}>{shown}</{tag}>"

    head = "".join(cell("th", i, text(name)) for i, name in enumerate(heads))
    body = "".join("<tr>" + "".join(cell("td", i, shown) for i, shown in enumerate(row)) + "</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def section(title: str, body: Html) -> Html:
    return f"<section><h2>{text(title)}</h2>{body}</section>" if body else ""


def _head(run: RunFiles, steps: int, sampled: int) -> Html:
    events = last_lines(run.events, 1000)
    state = state_of(events, status_of(run))
    made = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    samples = f"samples of {sampled} steps" if sampled else "no samples"
    return (
        f"<h1>{text(run.name)}</h1><p class=quiet>{state}, {number(steps)} steps, {samples}. "
        f"Written {made} UTC by attune report.</p>"
    )


def _figures(run: RunFiles, names: Sequence[str]) -> Html:
    rows = last_lines(run.metrics, 1)
    if not rows:
        return "<p>The run has no step yet.</p>"
    wanted = [name for _, group in SECTIONS for name in group if name in names]
    evaluated = [name for name in names if name.startswith("evaluation/")]
    cells = [
        [f"<code>{text(name)}</code>", _value(rows[0].get(name)), _meaning(name)] for name in [*wanted, *evaluated]
    ]
    return section("The last step", table(["metric", "value", "meaning"], cells, numeric=[1]))


def _value(value: object) -> Html:
    return number(value) if isinstance(value, int | float) else "–"


def _meaning(name: str) -> Html:
    found = STEP.find(name)
    return "" if found is None else text(found.metric.meaning)


def _curves(
    database: sqlite3.Connection, title: str, wanted: Sequence[str], steps: int, faults: Sequence[Mapping[str, Any]],
    names: Sequence[str],
) -> Html:  # fmt: skip
    there = [name for name in wanted if name in names]
    drawn = "".join(_curve(database, name, steps, faults, names) for name in there)
    return section(title, f"<div class=grid>{drawn}</div>") if drawn else ""


def _curve(
    database: sqlite3.Connection, name: str, steps: int, faults: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> Html:
    values = curves.column(database, name, 0, steps)
    if values is None:
        return ""
    curve = curves.drawn(values, 0, POINTS)
    if not curve["step"]:
        return ""
    std = name.removesuffix("mean") + "std" if name.endswith("/mean") else ""
    spread = curves.column(database, std, 0, steps) if std in names else None
    around = None if spread is None else curves.drawn(spread, 0, POINTS)["mean"]
    picture = curve_svg(
        curve, spread=around, steps=steps, marks=[int(fault["step"] or 0) for fault in faults], title=name
    )
    last = f"{number(curve['mean'][0])} → {number(curve['mean'][-1])}"
    return f"<figure><figcaption><b>{text(name)}</b> <span class=quiet>{last}</span></figcaption>{picture}</figure>"


def _sources(
    database: sqlite3.Connection, config: Mapping[str, Any], steps: int, faults: Sequence[Mapping[str, Any]],
    names: Sequence[str],
) -> Html:  # fmt: skip
    kinds = kinds_of(config)
    parts: list[Html] = []
    for source in queries.source_names(database).values():
        found = queries.histogram(database, source, 30, None, None)
        shown = source or "reward"
        said = (
            f"mean {number(found['mean'])}, std {number(found['std'])}, {number(found['count'])} samples"
            if found["count"]
            else "no value"
        )
        failed = f", {number(found['failed'])} failed" if found["failed"] else ""
        curve = _curve(database, f"reward/{source}/mean", steps, faults, names) if source else ""
        kind = kinds.get(source, "") if kinds.get(source) != source else ""
        parts.append(
            f"<h3>{text(shown)} <span class=quiet>{text(kind)}</span></h3><div class=grid>{curve}"
            f"<figure><figcaption>{said}{failed}</figcaption>{bars_svg(found, shown)}</figure></div>"
        )
    return section("Sources of the reward", "".join(parts))


def _judges(database: sqlite3.Connection, config: Mapping[str, Any]) -> Html:
    rows: list[Sequence[Html]] = []
    for name, kind in kinds_of(config).items():
        if kind not in ("judge", "principle"):
            continue
        found = queries.verdicts(database, name, 1, 0, "")
        source: Mapping[str, Any] = config["reward"]["sources"][name]
        principles: Any = source.get("principles") or "–"
        shown = "<br>".join(text(one) for one in _several(principles))
        shares = (_share(found["better"]), _share(found["consistent"]))
        rows.append([text(name), text(source.get("mode") or kind), number(found["count"]), *shares, shown])
    heads = ["judge", "mode", "verdicts", "above 0", "same in both orders", "principles"]
    return section("Verdicts", table(heads, rows, numeric=[2, 3, 4])) if rows else ""


def _several(value: Any) -> list[Any]:
    return cast(list[Any], value) if isinstance(value, list) else [value]


def _share(value: float | None) -> Html:
    return "–" if value is None else f"{100 * value:.1f} %"


def _samples(run: RunFiles, database: sqlite3.Connection) -> Html:
    tokenizer = tokenizer_of(run)
    shown: dict[tuple[str, int], list[str]] = {}
    for why, sort in CHOSEN:
        for row in queries.page(database, Filter(), sort, 0, 1)["rows"]:
            shown.setdefault((row["sample_id"], row["step"]), []).append(why)
    for row in queries.page(database, Filter(has_map=True), "-reward", 0, 2)["rows"]:
        shown.setdefault((row["sample_id"], row["step"]), []).append("its map was kept")
    parts: list[Html] = []
    for (sample, step), why in shown.items():
        place = queries.place_of_sample(database, sample, step)
        rows = [] if place is None else read_rows(run, [place])
        if rows:
            parts.append(_sample(run, rows[0], token_view(rows[0], tokenizer), ", ".join(why)))
    note = f"<p class=quiet>Ids in place of pieces: {text(tokenizer.why)}.</p>" if tokenizer.why else ""
    legend = (
        "<p class=quiet>Responses are coloured by attention mass, prompts (where a map was kept) by the attention of "
        "the whole response on their content; salient tokens are underlined.</p>"
    )
    return section("Samples", legend + note + "".join(parts)) if parts else ""


def _sample(run: RunFiles, row: Mapping[str, Any], view: Mapping[str, Any], why: str) -> Html:
    measure = "mass" if "mass" in view["measures"] else "logprob"
    values: list[float | None] = view["measures"].get(measure) or []
    salient, content = set(view["salient"]), view["content"] or range(len(view["prompt_ids"]))
    prompt = _tokens(view["prompt_pieces"], view["prompt_ids"], _looked_at(run, row, list(content)), salient)
    response = _tokens(view["pieces"], view["response_ids"], _scaled(values), set())
    by_source: dict[str, Any] = view["scores"] or {}
    scores: list[tuple[str, Any]] = [("reward", view["reward"]), *by_source.items()]
    cells = [[text(name), _score(score)] for name, score in scores if score]
    figures = f"advantage {_value(view['advantage'])}, KL {_value(view['kl_reference'])}"
    facts = f"step {text(view['step'])}, {text(view['finish_reason'])}, {figures}"
    return (
        f"<article><h3>{text(why)}</h3><p class=quiet>{text(view['sample_id'])}: {facts}</p>"
        f"<p class=tokens>{prompt}</p><p class=tokens>{response}</p>{table(['source', 'value'], cells)}</article>"
    )


def _score(score: Mapping[str, Any]) -> Html:
    if score.get("status") == "ok":
        return _value(score.get("value"))
    error: dict[str, Any] = score.get("error") or {}
    return f"<span class=bad>{text(error.get('code'))}: {text(error.get('message'))}</span>"


def _looked_at(run: RunFiles, row: Mapping[str, Any], content: Sequence[int]) -> list[float | None]:
    """How much the whole response looked at each prompt token, relative to the strongest of the content; empty without
    a map."""
    import numpy as np

    try:
        found = map_rows(run, row, 0, 2**20)
    except (ValueError, KeyError):
        return []
    if found is None:
        return []
    rows, columns, data = found
    mean = np.frombuffer(data, "<f4").reshape(rows, columns).mean(axis=0)
    most = max((float(mean[j]) for j in content if j < columns), default=0.0)
    inside = set(content)
    return [min(1.0, float(share) / most) if j in inside and most > 0 else 0.0 for j, share in enumerate(mean)]


def _scaled(values: Sequence[float | None]) -> list[float | None]:
    there = [value for value in values if value is not None]
    low, high = min(there, default=0.0), max(there, default=0.0)
    return [None if value is None else (value - low) / (high - low) if high > low else 0.5 for value in values]


def _tokens(
    pieces: Sequence[str] | None, ids: Sequence[int], strengths: Sequence[float | None], salient: set[int]
) -> Html:
    shown: list[Html] = []
    for at, number_ in enumerate(ids[:MOST_TOKENS]):
        piece = f"⟨{number_}⟩" if pieces is None else pieces[at]
        strength = strengths[at] if at < len(strengths) else None
        style = f' style="--t:{100 * strength:.0f}%"' if strength else ""
        shown.append(f"<span{' class=s' if at in salient else ''}{style}>{text(piece)}</span>")
    more = f" … and {len(ids) - MOST_TOKENS} more" if len(ids) > MOST_TOKENS else ""
    return "".join(shown) + more


def _failures(database: sqlite3.Connection) -> Html:
    rows = [
        [text(one["source"] or "reward"), f"<b>{text(one['code'])}</b>", number(one["count"]),
         f"{one['first']} to {one['last']}"]
        for one in queries.failures(database)
    ]  # fmt: skip
    body = table(["source", "code", "samples", "steps"], rows, numeric=[2]) if rows else "<p>No score failed.</p>"
    return section("Failed scores", body)


def _faults(faults: Sequence[Mapping[str, Any]]) -> Html:
    if not faults:
        return section("Faults", "<p>None.</p>")
    rows = [
        [time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(fault["time"] or 0)), number(fault["step"]),
         f"<span class=bad>{text(fault['kind'].replace('_', ' '))}</span>",
         text(" · ".join(f"{name} {value}" for name, value in fault["data"].items()))]
        for fault in reversed(faults)
    ]  # fmt: skip
    return section("Faults", table(["time (UTC)", "step", "what", "said"], rows, numeric=[1]))


def _recipe(config: Mapping[str, Any]) -> Html:
    shown = text(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
    return section("Recipe", f"<details><summary>as resolved</summary><pre>{shown}</pre></details>") if config else ""
