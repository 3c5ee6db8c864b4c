"""What each part of a run does now, in RUN/status.json, for who watches the run from outside.

The run does not know whether anybody does. The file is replaced atomically, at most once a second but at a change of
phase, and is worth nothing to the run itself: where it cannot be written, that is said once and training goes on
(invariant 10).
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.run_dir import RunDir
from cluster.running import Running
from cluster.supervise import Supervisor

log = logging.getLogger(__name__)

EVERY_S = 1.0
LEARNER_PHASES = frozenset({"training", "publishing weights", "writing a checkpoint", "writing the policy"})
"""Of the driver, in which it waits for the learner: a rank that computes answers no pulse."""


class StatusFile:
    """Holds what was said last; `beat` writes it again, with the parts as they are."""

    def __init__(self, run: RunDir, total_steps: int) -> None:
        self._run = run
        self._total = total_steps
        self._phase = "starting"
        self._since = time.time()
        self._parts: Sequence[Mapping[str, Any]] = ()
        self._written = 0.0
        self._broken = False

    def phase(self, text: str) -> None:
        """What the driver does from now on. "waiting for the batch: 3 scored" goes on when its numbers change."""
        if text.partition(":")[0] != self._phase.partition(":")[0]:
            self._since = time.time()
            self._written = 0.0
        self._phase = text
        self._write()

    def beat(self, supervisor: Supervisor) -> None:
        """Cheap where a second has not passed."""
        if time.monotonic() - self._written >= EVERY_S:
            self._parts = parts_of(supervisor, self._phase, time.monotonic())
            self._write()

    def end(self, text: str) -> None:
        """The last word: no part is left."""
        self._parts = ()
        self.phase(text)

    def _write(self) -> None:
        if self._broken or time.monotonic() - self._written < EVERY_S:
            return
        self._written = time.monotonic()
        status = {
            "schema_version": 1,
            "time": time.time(),
            "phase": self._phase,
            "since": self._since,
            "steps_done": self._run.steps_done,
            "total_steps": self._total,
            "parts": self._parts,
        }
        path = self._run.status
        partial = path.with_name(path.name + ".partial")
        try:
            partial.write_text(json.dumps(status, ensure_ascii=False), encoding="utf-8")
            partial.replace(path)
        except OSError as error:  # invariant 10
            self._broken = True
            log.warning("%s cannot be written, and is left from now on: %s", path, error)


def parts_of(supervisor: Supervisor, phase: str, now: float) -> list[dict[str, Any]]:
    """Every part with its state: starting, working, waiting, or gone (and to be started again).

    `still_s` are the seconds since it last got on, of a part with work.
    """
    parts: list[dict[str, Any]] = []
    for kept in supervisor.kept:
        if kept.now is None:
            parts.append({"name": kept.part.name, "kind": kept.kind, "state": "gone"})
        else:
            parts.append(_part(kept.now, kept.kind, "working" if kept.now.pulse.has_work else "waiting", now))
    training = phase in LEARNER_PHASES
    parts += [_part(rank, "learner", "working" if training else "waiting", now) for rank in supervisor.learners]
    parts += [_part(other, "other", "waiting", now) for other in supervisor.others]
    return parts


def _part(running: Running, kind: str, state: str, now: float) -> dict[str, Any]:
    pulse = running.pulse
    if kind == "rollout" and not pulse.beats:
        state = "starting"
    said: dict[str, Any] = {"name": running.name, "kind": kind, "state": state}
    if pulse.has_work and kind != "learner":
        said["still_s"] = round(pulse.still_s(now), 1)
    return said
