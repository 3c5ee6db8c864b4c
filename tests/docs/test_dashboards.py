"""Grafana's dashboards ask for what is there: every metric and label of every query is in the vocabulary, or in the
reward server's registry; and what is there is shown."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from reward_server.metrics import Metrics
from services.vocabulary import ACTOR_METRICS, COMMON_LABELS, RAY_PREFIX, STEP

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "grafana"
FILES = sorted(FOLDER.glob("*.json"))
boards = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)

SELECTOR = re.compile(r"\b((?:ray_)?attune_[a-z0-9_]+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'^(\w+)\s*(?:=|!=|=~|!~)\s*"([^"]*)"$')
RAY_LABELS = {"SessionName", "NodeAddress", "WorkerId"}
"""Of those that Ray's exporter adds (test_metrics.py scrapes it)."""
SCRAPE_LABELS = {"job", "instance"}
SUFFIXES = ("_bucket", "_sum", "_count")
NOT_SHOWN = {
    # numbers that a panel would not tell more with
    "attune_run_seconds", "attune_version_incarnation_max", "attune_drift_responses", "attune_drift_importance_mean",
    "attune_policy_importance_mean", "attune_policy_updates", "attune_policy_loss", "attune_policy_loss_tokens",
    "attune_policy_entropy_exact_nats", "attune_advantage_mean", "attune_advantage_std", "attune_value_mean",
    "attune_kl_loss_nats", "attune_kl_reference_k3_nats", "attune_kl_reference_token_nats", "attune_reward_revisions",
    # the same as a rate of what is shown
    "attune_trained_tokens_total", "attune_reward_samples_total", "attune_reward_source_failed_samples_total",
    "attune_capture_seconds",
}  # fmt: skip


def known() -> dict[str, tuple[set[str], dict[str, set[str]]]]:
    """Series by name: its labels, and the values of those whose values are fixed."""
    found: dict[str, tuple[set[str], dict[str, set[str]]]] = {}
    for metric in (*STEP.metrics, *ACTOR_METRICS):
        endings = SUFFIXES if metric.kind == "histogram" else ("",)
        for ending in endings:
            labels = {*metric.label_names, *COMMON_LABELS, *RAY_LABELS, *(["le"] if ending == "_bucket" else [])}
            own, fixed = found.setdefault(f"{RAY_PREFIX}{metric.prometheus}{ending}", (labels, {}))
            own |= labels
            for label, value in metric.labels:
                if value:
                    fixed.setdefault(label, set()).add(value)
    server = Metrics()
    for own in server.registry._collector_to_names:
        kind = {"counter": ("_total",), "histogram": SUFFIXES}.get(own._type, ("",))
        for ending in kind:
            labels = {*own._labelnames, *SCRAPE_LABELS, *(["le"] if ending == "_bucket" else [])}
            found[own._name + ending] = (labels, {})
    return found


def panels_of(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def test_there_is_a_dashboard_for_each_side() -> None:
    assert [file.stem for file in FILES] == ["attune-flow", "attune-reward-server", "attune-training"]


@boards
def test_every_query_asks_for_metrics_and_labels_that_there_are(file: Path) -> None:
    series = known()
    for panel in panels_of(json.loads(file.read_text())):
        for target in panel["targets"]:
            query = target["expr"]
            assert query.count("(") == query.count(")")
            assert query.count("{") == query.count("}")
            asked = SELECTOR.findall(query)
            assert asked, query
            shared: set[str] | None = None
            for name, matchers in asked:
                assert name in series, f"{panel['title']}: there is no metric {name}"
                labels, fixed = series[name]
                shared = labels if shared is None else shared & labels
                for matcher in filter(None, (part.strip() for part in matchers.split(","))):
                    match = MATCHER.match(matcher)
                    assert match, matcher
                    label, value = match.groups()
                    assert label in labels, f"{panel['title']}: {name} has no label {label}"
                    if label in fixed and not value.startswith("$"):
                        assert set(value.split("|")) <= fixed[label], f"{panel['title']}: {label}={value}"
            assert shared is not None
            by = {label.strip() for group in re.findall(r"\bby \(([^)]*)\)", query) for label in group.split(",")}
            assert by <= shared, f"{panel['title']}: by {by - shared}"
            legend = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert legend <= (by or shared), f"{panel['title']}: legend {legend}"


def test_a_query_for_what_is_not_there_is_found() -> None:
    """The check itself: a name, a label, a label's value that are wrong."""
    series = known()
    assert RAY_PREFIX + "attune_reward" not in series
    assert "attune_reward_mean" not in series
    assert "le" not in series[RAY_PREFIX + "attune_reward_sum"][0]
    assert series[RAY_PREFIX + "attune_idle_ratio"][1]["part"] == {
        "learner", "rollouts", "scoring", "reward_server", "models"
    }  # fmt: skip
    assert series["attune_reward_failures_total"][0] == {"source", "code", "job", "instance"}


def test_what_is_measured_is_shown() -> None:
    text = "".join(file.read_text() for file in FILES)
    shown = {name for name, _ in SELECTOR.findall(text)}
    base = {re.sub("(_bucket|_sum|_count)$", "", name) for name in shown}
    missing = {name for name in known() if re.sub("(_bucket|_sum|_count)$", "", name) not in base}
    assert {re.sub("(_bucket|_sum|_count)$", "", name.removeprefix(RAY_PREFIX)) for name in missing} == NOT_SHOWN


@boards
def test_a_dashboard_is_what_grafana_imports(file: Path) -> None:
    board = json.loads(file.read_text())
    assert board["uid"] == file.stem
    assert len(board["uid"]) <= 40  # Grafana's bound
    assert board["schemaVersion"] == 39
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert next(iter(variables)) == "datasource"
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    used = set(re.findall(r"\$\{?(\w+)", file.read_text())) - {"__rate_interval", "__all"}
    assert used == set(variables)
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in panels_of(board):
        assert panel["type"] in ("timeseries", "stat", "heatmap")
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert [target["refId"] for target in panel["targets"]] == list("ABCDE")[: len(panel["targets"])]
        assert panel["title"]
    titles = [panel["title"] for panel in panels_of(board)]
    assert len(set(titles)) == len(titles)


@boards
def test_no_panel_lies_over_another(file: Path) -> None:
    places = [panel["gridPos"] for panel in json.loads(file.read_text())["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    taken: set[tuple[int, int]] = set()
    for place in places:
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        taken |= cells
    assert all(first["y"] <= second["y"] for first, second in pairwise(places))


def test_every_panel_of_a_run_says_what_a_bad_value_looks_like() -> None:
    for stem in ("attune-training", "attune-flow"):
        for panel in panels_of(json.loads((FOLDER / f"{stem}.json").read_text())):
            assert "Bad: " in panel["description"], panel["title"]
