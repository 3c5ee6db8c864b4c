"""One name for each thing that is measured: in metrics.jsonl, in trackers, in Prometheus, on the run page.

`STEP.find(key)` is the entry of a key of metrics.jsonl. docs/metrics.md is written from here (`make docs`). What the
reward server measures of itself stands beside its code (`reward_server/metrics.py`) and on the same page.
"""

from services.vocabulary.actors import ACTOR_METRICS
from services.vocabulary.metric import Found, Kind, Metric, Vocabulary, When
from services.vocabulary.step import REWARD_BOUNDS, STEP_METRICS
from services.vocabulary.step_flow import LENGTH_BOUNDS, STALENESS_BOUNDS

__all__ = [
    "ACTOR_METRICS",
    "COMMON_LABELS",
    "LENGTH_BOUNDS",
    "NONDETERMINISTIC",
    "RAY_PREFIX",
    "REWARD_BOUNDS",
    "STALENESS_BOUNDS",
    "STEP",
    "Found",
    "Kind",
    "Metric",
    "Vocabulary",
    "When",
]

STEP = Vocabulary(STEP_METRICS)

RAY_PREFIX = "ray_"
"""What Ray's exporter puts before every name."""

COMMON_LABELS = ("run", "run_id")
"""Labels that every metric of a run has: the recipe's `run.name`, and the id of the run directory's first start."""

NONDETERMINISTIC = frozenset(metric.name for metric in STEP_METRICS if metric.clock and metric.name is not None)
"""Keys of metrics.jsonl that depend on the clock, on scheduling or on restarts; all others are reproducible where
invariant 5 applies."""
