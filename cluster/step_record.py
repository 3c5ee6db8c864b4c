"""What the driver adds to a step's line in metrics.jsonl: where its time went, how the ledger stands, who scored it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.history import History
from services.records import Group


@dataclass(frozen=True)
class Timing:
    """Of one step, by the monotonic clock (s): when it began, had its batch, was trained; how long publishing took;
    and when the run was started."""

    began: float
    batch_at: float
    trained_at: float
    publish_s: float
    started: float

    def metrics(
        self, learner: Mapping[str, float], counters: Sequence[Mapping[str, float]], busy_before: float
    ) -> dict[str, float]:
        """`time/*`, `idle/*` and throughput. `counters` are the rollout actors', `busy_before` their busy time (s)
        when the last step ended."""
        now = time.monotonic()
        wall = max(now - self.began, 1e-9)
        busy = sum(counter["busy_s"] for counter in counters)
        return {
            "time_s": now - self.started,
            "time/step_s": wall,
            "time/wait_batch_s": self.batch_at - self.began,
            "time/train_s": self.trained_at - self.batch_at,
            "time/publish_s": self.publish_s,
            "throughput/tokens_per_s": learner.get("length/response_tokens", 0.0) / wall,
            "idle/learner": (self.batch_at - self.began) / wall,
            "idle/rollouts": max(0.0, 1 - max(0.0, busy - busy_before) / (wall * max(1, len(counters)))),
        }


def ledger_metrics(counts: Mapping[str, int], history: History) -> dict[str, float]:
    return {
        "queue/generated": counts.get("generated", 0),
        "queue/scored": counts.get("scored", 0),
        "ledger/failed": len(history.failed),
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
    rewarded = [
        sample
        for group in groups
        for sample in group.samples
        if sample.reward is not None and sample.reward.status == "ok"
    ]
    found: dict[str, str] = {}
    for name in sorted({name for sample in rewarded for name in sample.scores}):
        scores = [sample.scores[name] for sample in rewarded if name in sample.scores]
        if all(score.status == "failed" for score in scores):
            error = scores[0].error
            found[name] = "failed" if error is None else f"{error.code}: {error.message}"
    return found
