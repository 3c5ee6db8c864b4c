"""The age of progress: whether a source still scores what clients send, whatever it makes of the built-in item.

A wedged engine often answers a probe: it is cheap, and takes another path than a full batch. What counts is whether
requests get scores. A source that has had only infra failures for `stalled_s` is not ready; where nobody has asked it
for as long since, nothing is known against it, so that it is asked again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from reward_server.schema import Component


@dataclass
class _Failing:
    since: float
    last: float


class Progress:
    """What became of the last calls of each source. Times are seconds of one monotonic clock."""

    def __init__(self, stalled_s: float) -> None:
        self._stalled_s = stalled_s
        self._failing: dict[str, _Failing] = {}

    def note(self, name: str, components: Sequence[Component], now: float) -> None:
        """One call's components. Any that is no infra failure shows that the source works."""
        if not components:
            return
        if any(component.error is None or component.error.kind == "data" for component in components):
            self._failing.pop(name, None)
            return
        known = self._failing.get(name)
        if known is None or now - known.last >= self._stalled_s:
            self._failing[name] = _Failing(now, now)
        else:
            known.last = now

    def stalled(self, now: float) -> dict[str, str]:
        """What is wrong, by source; empty where nothing is."""
        return {
            name: f"has scored nothing that was sent for {now - failing.since:.0f} s"
            for name, failing in self._failing.items()
            if now - failing.since >= self._stalled_s > now - failing.last
        }
