"""A model whose batches and replicas Prometheus is told of."""

import time
from collections.abc import Sequence

from reward_server.metrics import Metrics
from reward_server.runner import ModelFacts, ModelRunner, Output, Row


class WatchedRunner:
    """A `ModelRunner` around another. A batch that failed is not counted: its items are, with their code."""

    def __init__(self, name: str, runner: ModelRunner, metrics: Metrics) -> None:
        """`name`: the source's."""
        self._name = name
        self._runner = runner
        self._metrics = metrics
        metrics.replicas(name, runner.living)

    @property
    def facts(self) -> ModelFacts:
        return self._runner.facts

    @property
    def lanes(self) -> int:
        return self._runner.lanes

    def living(self) -> int:
        return self._runner.living()

    def run(self, rows: Sequence[Row]) -> list[Output]:
        began = time.perf_counter()
        with self._metrics.busy_models[self._name]:
            outputs = self._runner.run(rows)
        self._metrics.batch(self._name, len(rows), time.perf_counter() - began)
        return outputs
