"""Writes deploy/grafana/*.json, dashboards for Grafana; `--check` compares them.

A panel stands for a question. What a bad answer looks like comes from the vocabulary, so that the dashboards and
docs/metrics.md say the same.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from grafana_panels import Board, Panel
from grafana_run import FLOW, RUN_VARIABLES, TRAINING
from grafana_server import REWARD_SERVER
from written import ROOT, write_or_check

from services.vocabulary import ACTOR_METRICS, STEP

FOLDER = ROOT / "deploy" / "grafana"

BOARDS = (TRAINING, FLOW, REWARD_SERVER)

SCHEMA = 39
"""Of Grafana's dashboard model: that of Grafana 10.4 and later."""


def dashboard(board: Board) -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    number, y = 1, 0
    for title, row in board.rows:
        panels.append({"id": number, "type": "row", "title": title, "collapsed": False, "panels": [],
                       "gridPos": {"h": 1, "w": 24, "x": 0, "y": y}})  # fmt: skip
        number, y, x, height = number + 1, y + 1, 0, 0
        for panel in row:
            if x + panel.width > 24:
                x, y = 0, y + height
            height = 4 if panel.kind == "stat" else 8
            panels.append(drawn(panel, board, number, {"h": height, "w": panel.width, "x": x, "y": y}))
            number, x = number + 1, x + panel.width
        y += height
    return {
        "uid": board.uid,
        "title": board.title,
        "description": board.about,
        "tags": ["attune"],
        "schemaVersion": SCHEMA,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timepicker": {},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [{"type": "dashboards", "title": "Attune", "tags": ["attune"], "asDropdown": False,
                   "includeVars": True, "keepTime": True}],
        "templating": {"list": [source_variable(), *(variable(*each) for each in board.variables or RUN_VARIABLES)]},
        "panels": panels,
    }  # fmt: skip


def drawn(panel: Panel, board: Board, number: int, place: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    form = "heatmap" if panel.kind == "heatmap" else "time_series"
    targets = [
        {"refId": chr(ord("A") + i), "datasource": source, "expr": query.replace("%", board.filter, 10),
         "legendFormat": legend, "editorMode": "code", "range": True, "format": form}
        for i, (query, legend) in enumerate(panel.queries)
    ]  # fmt: skip
    defaults: dict[str, Any] = {"unit": panel.unit}
    defaults |= {} if panel.low is None else {"min": panel.low}
    defaults |= {} if panel.high is None else {"max": panel.high}
    options: dict[str, Any] = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "drawStyle": "line", "lineWidth": 1, "fillOpacity": 25 if panel.stack else 0, "showPoints": "auto",
            "spanNulls": True, "stacking": {"mode": "normal" if panel.stack else "none", "group": "A"},
        }  # fmt: skip
    elif panel.kind == "stat":
        options = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "colorMode": "none",
                   "graphMode": "area", "textMode": "value", "orientation": "auto", "justifyMode": "auto"}  # fmt: skip
    else:
        options = {"calculate": False, "yAxis": {"unit": panel.unit}, "cellGap": 1,
                   "color": {"mode": "scheme", "scheme": "Blues", "steps": 64}, "legend": {"show": True},
                   "tooltip": {"mode": "single", "yHistogram": True}}  # fmt: skip
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": advice(panel),
        "datasource": source,
        "gridPos": place,
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
    }


def advice(panel: Panel) -> str:
    """What is shown, and what a bad value looks like."""
    lines: list[str] = []
    for name in dict.fromkeys(n for query, _ in panel.queries for n in re.findall(r"attune_\w+", query)):
        for metric in (*STEP.metrics, *ACTOR_METRICS):
            if re.sub(r"_(bucket|sum|count)$", "", name) == metric.prometheus and asks_for(panel, metric.labels):
                lines.append(f"{metric.meaning} Bad: {metric.bad}" if metric.bad else metric.meaning)
    return "\n\n".join(dict.fromkeys(lines))


def asks_for(panel: Panel, labels: tuple[tuple[str, str], ...]) -> bool:
    """Whether a query takes this entry: it does not choose among labels, or it chooses these."""
    chosen = [re.findall(r'(\w+)=~?"([^"$]+)"', query) for query, _ in panel.queries]
    return any(
        all(value in wanted.split("|") for label, wanted in each for own, value in labels if own == label and value)
        for each in chosen
    )


def source_variable() -> dict[str, Any]:
    """Named as Ray's dashboard names it when it shows a dashboard of Grafana's."""
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "refresh": 1,
            "hide": 0, "includeAll": False, "multi": False, "options": [], "regex": "", "current": {}}  # fmt: skip


def variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {"name": name, "label": label, "type": "query", "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "query": {"query": query, "refId": name}, "definition": query, "refresh": 2, "sort": 2, "hide": 0,
            "includeAll": True, "allValue": ".*", "multi": True, "options": [], "regex": "",
            "current": {"selected": True, "text": ["All"], "value": ["$__all"]}}  # fmt: skip


def files() -> dict[Path, str]:
    return {
        FOLDER / f"{board.uid}.json": json.dumps(dashboard(board), indent=1, ensure_ascii=False) + "\n"
        for board in BOARDS
    }


if __name__ == "__main__":
    sys.exit(write_or_check(files(), __doc__))
