"""What one entry of the vocabulary is, and how a key of metrics.jsonl finds its entry. Imports nothing of ours."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["gauge", "counter", "histogram"]

When = Literal[
    "always",
    "trained",
    "value function",
    "KL in the loss",
    "attention source",
    "drift watched",
    "own reward server",
    "models that score",
    "after a commit",
    "evaluation",
    "a source scored",
    "a failure",
    "always, not a number",
]
"""When a line of metrics.jsonl has an entry:

always                in every line
trained               unless the step was skipped (`learner.bad_batch`)
value function        trained, and the advantage needs values
KL in the loss        trained, and `learner.kl.place` is loss
attention source      the recipe has a source named attention, and it scored a sample
drift watched         `learner.drift.share` is above 0, and a response of the learner's own version was at hand
own reward server     the run started its reward server itself (`reward.worker.url` is null)
models that score     sources of the recipe load models
after a commit        the step after a commit
evaluation            `evaluation.every` says so
a source scored       the source scored a sample
a failure             there was one with this code
always, not a number  in every line, and left out by trackers and exporters
"""


@dataclass(frozen=True)
class Metric:
    """One thing that is measured.

    name        its key in metrics.jsonl; `{...}` stands for an open part, which becomes a label of the same name. None:
                it is exported by the actor that owns it, and stands in no file
    unit        of the number in metrics.jsonl; a histogram's is that of its bounds
    kind        as Prometheus has it. A counter's number in metrics.jsonl is the step's amount, or with `total` what it
                came to since the run began
    prometheus  its name there, without the `ray_` that Ray's exporter puts before it; a histogram's without `_bucket`
    labels      those with a fixed value, of names that share one Prometheus name; actors' have label names alone
    bounds      a histogram's: counts are of values up to each bound, and of those above the last
    clock       depends on the clock, on scheduling or on restarts: not reproduced bit for bit
    """

    name: str | None
    unit: str
    kind: Kind
    prometheus: str
    meaning: str
    bad: str
    when: When = "always"
    labels: tuple[tuple[str, str], ...] = ()
    bounds: tuple[float, ...] = ()
    total: bool = False
    clock: bool = False

    @property
    def open_labels(self) -> tuple[str, ...]:
        """The names of the open parts."""
        return tuple(re.findall(r"\{(\w+)\}", self.name or ""))

    @property
    def label_names(self) -> tuple[str, ...]:
        """Every label, of its own and from open parts; those that all metrics have (`run`) not among them."""
        return tuple(name for name, _ in self.labels) + self.open_labels


@dataclass(frozen=True)
class Found:
    """The entry of a key, and what its open parts are there."""

    metric: Metric
    parts: tuple[tuple[str, str], ...]

    @property
    def labels(self) -> dict[str, str]:
        """Every label with its value."""
        return dict(self.metric.labels + self.parts)


class Vocabulary:
    """Entries, found by key. Of several that fit, the one with the fewest open parts is meant."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self.metrics = tuple(metrics)
        self._exact = {metric.name: metric for metric in metrics if metric.name and not metric.open_labels}
        patterns = sorted((metric for metric in metrics if metric.open_labels), key=lambda m: len(m.open_labels))
        self._patterns = [(_pattern(metric.name or ""), metric) for metric in patterns]
        self._found: dict[str, Found | None] = {}

    def find(self, key: str) -> Found | None:
        """The entry of a key of metrics.jsonl; None: it has none."""
        if key not in self._found:
            self._found[key] = self._look(key)
        return self._found[key]

    def _look(self, key: str) -> Found | None:
        if (exact := self._exact.get(key)) is not None:
            return Found(exact, ())
        for pattern, metric in self._patterns:
            if (match := pattern.fullmatch(key)) is not None:
                return Found(metric, tuple(match.groupdict().items()))
        return None


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile("".join(_part(part) for part in re.split(r"(\{\w+\})", name)))


def _part(part: str) -> str:
    return f"(?P<{part[1:-1]}>[^/]+)" if part.startswith("{") else re.escape(part)
