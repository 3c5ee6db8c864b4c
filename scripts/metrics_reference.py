"""Writes docs/metrics.md from the vocabulary and the reward server's registry; `--check` compares it."""

import sys
from collections.abc import Iterable, Sequence
from typing import get_args

from written import ROOT, write_or_check

from cluster.evaluation_config import METRICS, Decoding
from reward_server.metrics import Metrics
from services.records import GroupState
from services.vocabulary import ACTOR_METRICS, COMMON_LABELS, NONDETERMINISTIC, RAY_PREFIX, STEP, Metric

PAGE = ROOT / "docs" / "metrics.md"

HEAD = f"""# Metrics

Written by `make docs` from the vocabulary in `services/vocabulary/`; do not edit. How to collect and look at them:
[monitoring.md](monitoring.md).

One name for one thing: the key of a line in `metrics.jsonl` is the tag in TensorBoard, W&B, MLflow and trackio.
Prometheus names have units after its conventions; what stands in braces in a key is a label there. Ray's exporter puts
`{RAY_PREFIX}` before every name, and every metric has the labels
{" and ".join(f"`{label}`" for label in COMMON_LABELS)} beside its own.

A counter's number in `metrics.jsonl` is the step's amount, or with *total* what it came to since the run began; in
Prometheus it only grows. A histogram is a list of counts in `metrics.jsonl`: of values up to each bound, and last of
those above all; in Prometheus it is `_bucket`, `_sum` and `_count`. MLflow and trackio get no histograms.

Where a key is not in every line, the column *when* says on what it depends:

"""

CONDITIONS = {
    "always": "",
    "always, not a number": "in `metrics.jsonl` alone: it is no number",
    "trained": "not in a step that was skipped (`learner.bad_batch`)",
    "value function": "the advantage needs values",
    "KL in the loss": "`learner.kl.place` is `loss`",
    "attention source": "a source named `attention` scored a sample",
    "drift watched": "`learner.drift.share` above 0; the differences need a response of the learner's own version",
    "own reward server": "`reward.worker.url` is null",
    "models that score": "sources of the recipe load models in the run",
    "after a commit": "the step after a commit",
    "evaluation": "`evaluation.every` says so",
    "a source scored": "the source scored a sample",
    "a failure": "there was one with this code",
}

SECTIONS = (
    ("The run", ("step", "incarnation", "version/", "time_s")),
    ("Rewards", ("reward/",)),
    ("Failures", ("failures/",)),
    ("Distance to the reference", ("kl/",)),
    ("Policy and value function", ("advantage/", "policy/", "value/")),
    ("Drift between engine and learner", ("drift/",)),
    ("Lengths", ("length/",)),
    ("Staleness, queues and the ledger", ("staleness/", "queue/", "ledger/", "stream/")),
    ("Where time goes", ("time/", "throughput/")),
    ("Who idles", ("idle/", "actors/")),
    ("Evaluation", ("evaluation/",)),
)


def page() -> str:
    parts = [HEAD]
    parts += [f"- *{name}*: {text}\n" for name, text in CONDITIONS.items() if text]
    for title, prefixes in SECTIONS:
        parts.append(f"\n## {title}\n\n")
        parts.append(table(m for prefix in prefixes for m in STEP.metrics if starts(m, prefix)))
    parts.append(
        f"\n`evaluation/` has the decodings {listed(get_args(Decoding))} and the figures {listed(METRICS)}, `failed` "
        "beside them; [evaluation.md](evaluation.md) says what they are.\n"
    )
    parts.append(f"\n`ledger/` and `queue/` together have every state of a group: {listed(get_args(GroupState))}.\n")
    parts.append("\n## Buckets\n\n| histogram | bounds |\n|---|---|\n")
    parts += [
        f"| `{m.name}` | {', '.join(f'{bound:g}' for bound in m.bounds)} |\n"
        for m in STEP.metrics
        if m.kind == "histogram"
    ]
    parts.append(
        "\n## From the actors themselves\n\nRollout actors, scoring workers and the run's reward server export what "
        "they count every few seconds, also in the middle of a step; in no file. All have the label `actor`.\n\n"
    )
    parts.append("| Prometheus | labels | unit | meaning | a bad value |\n|---|---|---|---|---|\n")
    parts += [row((f"`{m.prometheus}`", labels(m), m.unit, m.meaning, m.bad)) for m in ACTOR_METRICS]
    parts.append(
        "\n## Of a reward server\n\nAt `GET /metrics` of the server itself, with its bearer token, without `"
        f"{RAY_PREFIX}` and without the labels of a run.\n\n"
        "| Prometheus | kind | labels | meaning |\n|---|---|---|---|\n"
    )
    for family in Metrics().registry.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        own = family_labels(name)
        parts.append(row((f"`{name}`", family.type, ", ".join(f"`{label}`" for label in own), family.documentation)))
    parts.append(
        "\n## What is not reproduced\n\nThese keys depend on the clock, on scheduling or on restarts; all others agree "
        "bit for bit where [training.md](training.md#reproducibility) says that a run does:\n"
        f"{listed(sorted(NONDETERMINISTIC))}.\n"
    )
    return "".join(parts)


def family_labels(name: str) -> Sequence[str]:
    """A family without samples does not say its labels: the registry's own metric does."""
    registry = Metrics().registry
    found = {own._name: own._labelnames for own in registry._collector_to_names}
    return found[name.removesuffix("_total")]


def table(metrics: Iterable[Metric]) -> str:
    head = "| key | unit | kind | Prometheus | when | meaning | a bad value |\n|---|---|---|---|---|---|---|\n"
    rows = []
    for m in metrics:
        chosen = "".join(f'{label}="{value}"' for label, value in m.labels)
        prometheus = (
            "" if m.when == "always, not a number" else f"`{m.prometheus}" + (f"{{{chosen}}}`" if chosen else "`")
        )
        kind = f"{m.kind}, total" if m.total else m.kind
        when = "" if m.when == "always" else f"*{m.when}*"
        rows.append(row((f"`{m.name}`", m.unit, kind, prometheus, when, m.meaning, m.bad)))
    return head + "".join(rows)


def starts(metric: Metric, prefix: str) -> bool:
    name = metric.name or ""
    return name.startswith(prefix) if prefix.endswith("/") else name == prefix


def labels(metric: Metric) -> str:
    return ", ".join(f"`{label}`" for label in metric.label_names)


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    sys.exit(write_or_check({PAGE: page()}, __doc__))
