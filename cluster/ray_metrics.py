"""A run's metrics through Ray's own exporter: every node of a Ray cluster has an endpoint that Prometheus scrapes.

Ray puts `ray_` before each name. A histogram goes out as the three series that Prometheus has for one, kept as gauges
here: Ray's own histograms take no bound below 1e-9 and send the middles of buckets, which makes sums wrong.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from services.histogram import Histogram
from services.vocabulary import ACTOR_METRICS, COMMON_LABELS, STEP, Metric

log = logging.getLogger(__name__)

EXPORT_S = 2.0
"""Seconds between two exports of an actor's own counters; Ray hands them on every 10 s by default."""

Labels = Mapping[str, str]


class Exporter:
    """Ray's metrics by name, made when first used. `common`: the labels that all have, with their values."""

    def __init__(self, common: Labels) -> None:
        from ray.util import metrics

        self._kinds: Any = metrics
        self._common = dict(common)
        self._made: dict[str, Any] = {}
        self._totals: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    def gauge(self, name: str, meaning: str, value: float, labels: Labels) -> None:
        self._metric(self._kinds.Gauge, name, meaning, labels).set(float(value), self._all(labels))

    def count(self, name: str, meaning: str, amount: float, labels: Labels) -> None:
        """Adds to a counter; Ray knows it from the first amount above 0 on."""
        if amount > 0:
            self._metric(self._kinds.Counter, name, meaning, labels).inc(float(amount), self._all(labels))

    def count_up_to(self, name: str, meaning: str, total: float, labels: Labels) -> None:
        """The same from a running total; one that fell began at 0 again."""
        key = (name, tuple(sorted(labels.items())))
        before, self._totals[key] = self._totals.get(key, 0.0), total
        self.count(name, meaning, total - before if total >= before else total, labels)

    def _metric(self, kind: Any, name: str, meaning: str, labels: Labels) -> Any:
        if name not in self._made:
            self._made[name] = kind(name, meaning, tuple(self._all(labels)))
        return self._made[name]

    def _all(self, labels: Labels) -> dict[str, str]:
        return {**self._common, **labels}


class RayMetrics:
    """A step's metrics, from the driver: a sink as `services.telemetry` has them."""

    def __init__(self, run: str, run_id: str) -> None:
        self._exporter = Exporter(dict(zip(COMMON_LABELS, (run, run_id), strict=True)))
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def write(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        for key, value in {"step": step, **metrics}.items():
            if (found := STEP.find(key)) is not None:
                self._write(found.metric, float(value), found.labels)
        for key, each in histograms.items():
            if (found := STEP.find(key)) is not None:
                self._add(key, found.metric, each, found.labels)

    def close(self) -> None:
        """Nothing: what was exported last stays until the driver's process has ended."""

    def _write(self, metric: Metric, value: float, labels: Labels) -> None:
        if metric.kind == "gauge":
            self._exporter.gauge(metric.prometheus, metric.meaning, value, labels)
        elif metric.total:
            self._exporter.count_up_to(metric.prometheus, metric.meaning, value, labels)
        else:
            self._exporter.count(metric.prometheus, metric.meaning, value, labels)

    def _add(self, key: str, metric: Metric, each: Histogram, labels: Labels) -> None:
        counts = self._counts.setdefault(key, [0] * len(each.counts))
        self._sums[key] = self._sums.get(key, 0.0) + each.total
        below = 0
        for place, bound in enumerate([*(repr(float(bound)) for bound in each.bounds), "+Inf"]):
            counts[place] += each.counts[place]
            below += counts[place]
            self._exporter.gauge(f"{metric.prometheus}_bucket", metric.meaning, below, {**labels, "le": bound})
        self._exporter.gauge(f"{metric.prometheus}_count", metric.meaning, below, labels)
        self._exporter.gauge(f"{metric.prometheus}_sum", metric.meaning, self._sums[key], labels)


ROLLOUT_COUNTERS: Mapping[str, tuple[str, Labels]] = {
    # of a rollout actor: `rollout.actor.RolloutCounters`
    "groups": ("attune_rollout_groups_total", {}),
    "samples": ("attune_rollout_samples_total", {}),
    "tokens": ("attune_rollout_tokens_total", {"direction": "out"}),
    "prompt_tokens": ("attune_rollout_tokens_total", {"direction": "in"}),
    "busy_s": ("attune_rollout_busy_seconds_total", {}),
    "capture_s": ("attune_rollout_capture_seconds_total", {}),
    "loads": ("attune_rollout_weight_loads_total", {}),
    "load_s": ("attune_rollout_weight_load_seconds_total", {}),
}
SCORING_COUNTERS: Mapping[str, tuple[str, Labels]] = {
    # of a scoring worker: `reward_server.worker.ScoringWorker.counters`; failed/CODE beside them
    "groups_scored": ("attune_scoring_groups_total", {"result": "scored"}),
    "groups_failed": ("attune_scoring_groups_total", {"result": "failed"}),
    "groups_late": ("attune_scoring_groups_total", {"result": "late"}),
    "samples_ok": ("attune_scoring_samples_total", {"result": "ok"}),
    "samples_failed": ("attune_scoring_samples_total", {"result": "failed"}),
    "busy_s": ("attune_scoring_busy_seconds_total", {}),
}
SERVER_COUNTERS: Mapping[str, tuple[str, Labels]] = {
    # of the run's reward server: `RewardServer.busy_s`; model/SOURCE beside them
    "server": ("attune_reward_server_busy_seconds_total", {}),
}
OPEN_COUNTERS = {
    "failed": ("attune_scoring_failures_total", "code"),
    "model": ("attune_model_busy_seconds_total", "source"),
}
"""Counters whose names go on with a `/` and a label's value."""

MEANINGS = {metric.prometheus: metric.meaning for metric in ACTOR_METRICS}


async def export_counters(
    read: Callable[[], Awaitable[Mapping[str, float]]],
    *,
    names: Mapping[str, tuple[str, Labels]],
    labels: Labels,
    seconds: float = EXPORT_S,
) -> None:
    """Exports what an actor counts, from its own process, until it is cancelled. What fails is said once and ends it:
    the actor works on (invariant 10). `names`: the metric and labels of each counter; others are left out."""
    try:
        exporter = Exporter(labels)
        while True:
            for key, total in (await read()).items():
                kind, _, value = key.partition("/")
                if value and kind in OPEN_COUNTERS:
                    name, label = OPEN_COUNTERS[kind]
                    exporter.count_up_to(name, MEANINGS[name], total, {label: value})
                elif key in names:
                    name, fixed = names[key]
                    exporter.count_up_to(name, MEANINGS[name], total, fixed)
            await asyncio.sleep(seconds)
    except Exception as error:  # invariant 10
        log.warning("metrics of this actor are not exported any more: %s", error)
