"""The vocabulary: one name a thing, names and labels that Prometheus takes, and every key with its entry."""

import re

import pytest

from services.vocabulary import ACTOR_METRICS, NONDETERMINISTIC, STEP, Metric

ALL = (*STEP.metrics, *ACTOR_METRICS)


def test_every_key_has_one_entry() -> None:
    names = [metric.name for metric in STEP.metrics]
    assert len(set(names)) == len(names)
    for metric in STEP.metrics:
        assert metric.name is not None
        found = STEP.find(re.sub(r"\{(\w+)\}", r"any_\1", metric.name))
        assert found is not None
        assert found.metric is metric
        assert {name: value for name, value in found.labels.items() if value.startswith("any_")} == {
            name: f"any_{name}" for name in metric.open_labels
        }
    assert STEP.find("reward/mean/") is None
    assert STEP.find("policy/nothing") is None


@pytest.mark.parametrize("metric", ALL, ids=lambda metric: metric.name or metric.prometheus)
def test_prometheus_takes_the_name_and_it_follows_the_conventions(metric: Metric) -> None:
    assert re.fullmatch(r"attune_[a-z0-9]+(_[a-z0-9]+)*", metric.prometheus)
    assert (metric.kind == "counter") == metric.prometheus.endswith("_total")
    assert not metric.prometheus.endswith(("_bucket", "_sum", "_count", "_share"))
    assert (metric.unit == "share") == metric.prometheus.endswith("_ratio")
    if metric.unit == "seconds":
        assert "_seconds" in metric.prometheus
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", label) and label != "le" for label in metric.label_names)
    assert (metric.kind == "histogram") == bool(metric.bounds)
    assert list(metric.bounds) == sorted(set(metric.bounds))
    assert metric.meaning.endswith(".")


def test_a_prometheus_name_is_one_thing_told_apart_by_labels() -> None:
    by_name: dict[str, list[Metric]] = {}
    for metric in ALL:
        by_name.setdefault(metric.prometheus, []).append(metric)
    for several in by_name.values():
        assert len({(metric.kind, metric.unit, metric.label_names) for metric in several}) == 1
        assert len({metric.labels for metric in several}) == len(several)


def test_what_depends_on_the_clock_is_no_pattern() -> None:
    assert all("{" not in name for name in NONDETERMINISTIC)
