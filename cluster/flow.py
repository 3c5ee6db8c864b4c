"""What the parts did between two lines of metrics.jsonl, from counters that they keep.

A part counts up from its own start; one that was started again begins at 0, which shows as a counter that fell.
"""

import time
from collections.abc import Mapping

Counters = Mapping[str, float]


class Flow:
    """Holds each part's counters as of the last line, and when that was."""

    def __init__(self, replicas: Mapping[str, int]) -> None:
        """`replicas`: of the model of each source that has one, by the source's name."""
        self._replicas = dict(replicas)
        self._last: dict[str, Counters] = {}
        self._at = time.monotonic()

    def begin(self) -> None:
        """The first step begins: what came before it is not counted as idleness."""
        self._at = time.monotonic()

    def metrics(self, counters: Mapping[str, Mapping[str, Counters]]) -> dict[str, float]:
        """`idle/*` of the parts but the learner, `actors/*`, what rollout actors read, wrote, loaded and captured.

        `counters`: by kind of part and name. Of a kind that did not answer nothing is said.
        """
        now = time.monotonic()
        window, self._at = max(now - self._at, 1e-9), now
        since = {kind: [self._since(name, of) for name, of in parts.items()] for kind, parts in counters.items()}
        metrics: dict[str, float] = {}
        if rollouts := since.get("rollout"):
            metrics |= {
                "idle/rollouts": _idle(sum(each.get("busy_s", 0.0) for each in rollouts), window * len(rollouts)),
                "actors/rollouts": float(len(rollouts)),
                "throughput/generated_tokens_per_s": sum(each.get("tokens", 0.0) for each in rollouts) / window,
                "throughput/read_tokens_per_s": sum(each.get("prompt_tokens", 0.0) for each in rollouts) / window,
                "time/weight_load_s": sum(each.get("load_s", 0.0) for each in rollouts) / len(rollouts),
                "time/capture_s": sum(each.get("capture_s", 0.0) for each in rollouts) / len(rollouts),
            }
        if workers := since.get("scoring_worker"):
            metrics["idle/scoring"] = _idle(sum(each.get("busy_s", 0.0) for each in workers), window * len(workers))
            metrics["actors/scoring"] = float(len(workers))
        if servers := since.get("reward_server"):
            metrics["idle/reward_server"] = _idle(sum(each.get("server", 0.0) for each in servers), window)
            if self._replicas:
                work = sum(each.get(f"model/{name}", 0.0) for each in servers for name in self._replicas)
                metrics["idle/models"] = _idle(work, window * sum(self._replicas.values()))
        return metrics

    def _since(self, name: str, counters: Counters) -> dict[str, float]:
        before = self._last.get(name, {})
        self._last[name] = dict(counters)
        return {
            key: value - start if value >= (start := before.get(key, 0.0)) else value for key, value in counters.items()
        }


def _idle(busy_s: float, of_s: float) -> float:
    return min(1.0, max(0.0, 1 - busy_s / of_s))
