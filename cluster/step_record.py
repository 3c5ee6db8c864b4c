"""What the driver adds to a step's line in metrics.jsonl: where its time went, how the ledger stands, who scored it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.distributions import rewarded
from cluster.history import History
from services.records import Group
from services.stream.account import Account
from services.vocabulary import STEP


@dataclass(frozen=True)
class Timing:
    """Of one step, by the monotonic clock (s): when it began, had its batch, was trained; how long publishing took;
    and when the run was started."""

    began: float
    batch_at: float
    trained_at: float
    publish_s: float
    started: float

    def metrics(self, learner: Mapping[str, float]) -> dict[str, float]:
        """`time/*`, the learner's idle share and throughput. `learner`: what the learner says of the step."""
        now = time.monotonic()
        wall = max(now - self.began, 1e-9)
        return {
            "time_s": now - self.started,
            "time/step_s": wall,
            "time/wait_batch_s": self.batch_at - self.began,
            "time/train_s": self.trained_at - self.batch_at,
            "time/publish_s": self.publish_s,
            "throughput/tokens_per_s": learner.get("length/response_tokens", 0.0) / wall,
            "throughput/prompt_tokens_per_s": learner.get("length/prompt_tokens", 0.0) / wall,
            "idle/learner": (self.batch_at - self.began) / wall,
        }


QUEUES = ("generated", "scored")
"""States in which a group waits for the next part: their counts are queue depths."""

STREAM_EVENTS = tuple(
    name.removeprefix("stream/") for metric in STEP.metrics if (name := metric.name or "").startswith("stream/")
)


def ledger_metrics(ledger: Account, history: History) -> dict[str, float]:
    """`ledger/*` and `queue/*`: groups by state. `stream/*`: what happened to them so far."""
    counts, events = ledger.counts(), ledger.counters()
    return {
        **{f"{'queue' if state in QUEUES else 'ledger'}/{state}": count for state, count in counts.items()},
        "ledger/failed": len(history.failed),
        **{f"stream/{event}": events.get(event, 0) for event in STREAM_EVENTS},
        "incarnation": history.incarnation,
    }


def reward_revisions(groups: Sequence[Group]) -> list[str]:
    """Under which revisions of the reward's recipe the samples were scored; interventions make several in one step."""
    found = {
        sample.reward.detail.get("recipe_revision")
        for group in groups
        for sample in group.samples
        if sample.reward is not None
    }
    return sorted(str(revision) for revision in found if revision is not None)


def silent_sources(groups: Sequence[Group]) -> dict[str, str]:
    """Optional sources that scored none of the samples that have a reward, each with the first failure it gave."""
    samples = rewarded(groups)
    found: dict[str, str] = {}
    for name in sorted({name for sample in samples for name in sample.scores}):
        scores = [sample.scores[name] for sample in samples if name in sample.scores]
        if all(score.status == "failed" for score in scores):
            error = scores[0].error
            found[name] = "failed" if error is None else f"{error.code}: {error.message}"
    return found
