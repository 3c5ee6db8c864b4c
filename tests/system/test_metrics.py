"""A run's metrics at the endpoint that Prometheus scrapes, by Ray's own exporter; its actors by readable names."""

import json
import re
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from services.vocabulary import ACTOR_METRICS, RAY_PREFIX, STEP

Attune = Callable[..., tuple[int, str]]
Recipe = Callable[..., Path]
Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape() -> str:
    import ray

    node: Any = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def attune_series(text: str) -> Series:
    """Value by name and by labels of ours, of the run that has any."""
    found: Series = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith(RAY_PREFIX + "attune_"):
                theirs = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId"}
                labels = {(k, v) for k, v in sample.labels.items() if k not in theirs and not k.startswith("otel_")}
                found[(sample.name.removeprefix(RAY_PREFIX), frozenset(labels))] = sample.value
    return found


@contextmanager
def watched() -> Iterator[tuple[Series, set[str]]]:
    """Everything that was at the endpoint at some time, the newest value of each; and the names of actors seen."""
    from ray.util import list_named_actors

    seen: Series = {}
    names: set[str] = set()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            seen.update(attune_series(scrape()))
            names.update(str(actor["name"]) for actor in list_named_actors(all_namespaces=True))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen, names
    finally:
        ended.wait(3.0)  # Ray hands on once a second here
        ended.set()
        thread.join()


def test_rays_exporter_has_the_run_and_its_actors(attune: Attune, recipe: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sources = {
        "attention": {"kind": "attention", "preset": "comparable"},
        "length": {"kind": "length", "target": 4, "weight": 0.5},
    }
    path = recipe(run={"name": "watched", "epochs": 2}, reward={"sources": sources})
    with watched() as (seen, names):
        code, output = attune("train", str(path), "--run-dir", str(run))
    assert code == 0, output
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    run_id = json.loads((run / "events.jsonl").read_text(encoding="utf-8").splitlines()[0])["run_id"]
    common = {("run", "watched"), ("run_id", run_id)}
    mine = {(name, labels - common): value for (name, labels), value in seen.items() if common <= labels}

    # Nothing that the vocabulary does not have, and of a number in the last line what it says there.
    actors = {metric.prometheus: set(metric.label_names) for metric in ACTOR_METRICS}
    step = {metric.prometheus: metric for metric in STEP.metrics}
    for name, labels in mine:
        metric = step.get(name) or step.get(re.sub(r"_(bucket|sum|count)$", "", name))
        known = actors.get(name) or {*(metric.label_names if metric else ()), *(["le"] if "_bucket" in name else [])}
        assert metric or name in actors, name
        assert {label for label, _ in labels} == known
    for key, value in rows[-1].items():
        found = STEP.find(key)
        assert found is not None
        labels = frozenset(found.labels.items())
        if found.metric.kind == "gauge" and not isinstance(value, list):
            assert mine[(found.metric.prometheus, labels)] == value, key
        elif found.metric.kind == "counter" and not found.metric.total:
            assert mine.get((found.metric.prometheus, labels), 0.0) == sum(row.get(key, 0) for row in rows), key
        elif found.metric.kind == "histogram":
            below = {dict(labels_)["le"]: v for (name, labels_), v in mine.items()
                     if name == f"{found.metric.prometheus}_bucket" and labels <= labels_}  # fmt: skip
            counts = [sum(row[key][place] for row in rows) for place in range(len(value))]
            bounds = [*(str(bound) for bound in found.metric.bounds), "+Inf"]
            assert [below[bound] for bound in bounds] == [sum(counts[: i + 1]) for i in range(len(counts))], key
            assert mine[(f"{found.metric.prometheus}_count", labels)] == sum(counts)

    # The actors' own, from their own processes, while the run went on.
    def own(name: str, **labels: str) -> float:
        return mine.get((name, frozenset(labels.items())), 0.0)

    assert own("attune_rollout_tokens_total", actor="rollout-0", direction="out") > 0
    assert own("attune_rollout_tokens_total", actor="rollout-0", direction="in") > 0
    assert own("attune_rollout_capture_seconds_total", actor="rollout-0") > 0
    assert own("attune_rollout_weight_loads_total", actor="rollout-0") >= 1
    assert own("attune_scoring_groups_total", actor="scoring-0", result="scored") > 0
    assert own("attune_scoring_busy_seconds_total", actor="scoring-0") > 0
    assert own("attune_reward_server_busy_seconds_total", actor="reward-server") > 0

    label = f"watched.{run_id[:6]}.1"
    assert {f"{label}/{part}" for part in ("learner-0", "rollout-0", "scoring-0", "reward-server")} <= names
