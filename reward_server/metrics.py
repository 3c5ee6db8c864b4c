"""What the service tells Prometheus. Every label has a closed set of values: sources of the recipe, codes, statuses."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from reward_server.busy import BusyTime
from reward_server.schema import Component, Result
from services.vocabulary import REWARD_BOUNDS

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SPREAD_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Metrics:
    """The metrics of one app, in a registry of its own, so that several apps live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.busy_scoring = BusyTime()
        """With any request being scored. For a run's idle shares; Prometheus has the requests' own seconds."""
        self.busy_models: dict[str, BusyTime] = {}
        """With batches of a source's model, by the source's name."""
        self._requests = Counter(
            "attune_reward_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self._request_seconds = Histogram(
            "attune_reward_request_seconds", "Seconds to answer POST /v1/rewards.",
            buckets=LATENCY_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._batch = Histogram(
            "attune_reward_batch_items", "Items of a request.", buckets=BATCH_BUCKETS, registry=self.registry
        )
        self._source_seconds = Histogram(
            "attune_reward_source_seconds", "Seconds of one source for one request.", ["source"],
            buckets=LATENCY_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._scores = Histogram(
            "attune_reward_score", "Values of ok components.", ["source"],
            buckets=REWARD_BOUNDS, registry=self.registry,
        )  # fmt: skip
        self._failures = Counter(
            "attune_reward_failures", "Failed components by code.", ["source", "code"], registry=self.registry
        )
        self._source_items = Histogram(
            "attune_reward_source_items", "Items of one call of a source.", ["source"],
            buckets=BATCH_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._source_busy = Gauge(
            "attune_reward_source_calls", "Calls of a source under way.", ["source"], registry=self.registry
        )
        self._source_success = Gauge(
            "attune_reward_source_last_success_timestamp_seconds", "When a source last scored an item.", ["source"],
            registry=self.registry,
        )  # fmt: skip
        self._queue_seconds = Histogram(
            "attune_reward_queue_seconds", "Seconds that a request waited for its turn.",
            buckets=LATENCY_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._disagreement = Histogram(
            "attune_reward_disagreement", "Standard deviation over the sources' shifted values of one item.",
            buckets=SPREAD_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._batch_rows = Histogram(
            "attune_reward_model_batch_rows", "Rows that a source's model ran together.", ["source"],
            buckets=BATCH_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._batch_seconds = Histogram(
            "attune_reward_model_batch_seconds", "Seconds of one batch of a source's model.", ["source"],
            buckets=LATENCY_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self._replicas = Gauge(
            "attune_reward_source_replicas", "Replicas of a source's model that live.", ["source"],
            registry=self.registry,
        )  # fmt: skip
        self._items = Counter("attune_reward_items", "Items by result.", ["status"], registry=self.registry)
        self.admitted = Gauge(
            "attune_reward_admitted_requests", "Requests admitted: being scored or waiting.", registry=self.registry
        )
        self.waiting = Gauge(
            "attune_reward_waiting_requests", "Requests waiting for their turn.", registry=self.registry
        )
        self.repeated = Counter(
            "attune_reward_repeated_requests", "Requests answered by their Idempotency-Key.", registry=self.registry
        )
        self.scoring = Gauge("attune_reward_scoring_requests", "Requests being scored.", registry=self.registry)
        self.last_success = Gauge(
            "attune_reward_last_success_timestamp_seconds", "When an item was last scored.", registry=self.registry
        )

    def request(self, route: str, status: int) -> None:
        self._requests.labels(route, str(status)).inc()

    def waited(self, seconds: float) -> None:
        self._queue_seconds.observe(seconds)

    def busy(self, name: str) -> AbstractContextManager[object]:
        """Counts a call of a source as under way."""
        return self._source_busy.labels(name).track_inprogress()

    def source(self, name: str, seconds: float, components: Sequence[Component]) -> None:
        self._source_seconds.labels(name).observe(seconds)
        self._source_items.labels(name).observe(len(components))
        if any(component.value is not None for component in components):
            self._source_success.labels(name).set_to_current_time()
        scores = self._scores.labels(name)
        for component in components:
            if component.value is not None:
                scores.observe(component.value)
            elif component.error is not None:
                self._failures.labels(name, component.error.code.value).inc()

    def replicas(self, name: str, living: Callable[[], int]) -> None:
        """`living` is asked whenever the metrics are."""
        self._replicas.labels(name).set_function(living)
        self.busy_models[name] = BusyTime()

    def batch(self, name: str, rows: int, seconds: float) -> None:
        """What a source's model ran at once."""
        self._batch_rows.labels(name).observe(rows)
        self._batch_seconds.labels(name).observe(seconds)

    def answer(self, seconds: float, results: Sequence[Result]) -> None:
        self._request_seconds.observe(seconds)
        self._batch.observe(len(results))
        for result in results:
            if "disagreement" in result.detail:
                self._disagreement.observe(result.detail["disagreement"])
        counts: Mapping[str, int] = {
            status: sum(result.status == status for result in results) for status in ("ok", "failed")
        }
        for status, count in counts.items():
            self._items.labels(status).inc(count)
        if counts["ok"]:
            self.last_success.set_to_current_time()

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)
