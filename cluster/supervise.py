"""The actors of a run: started by the plan, watched while the driver waits, replaced or reported when they die.

Rollout actors are replaced, up to `cluster.restarts`, and their leases pass on. Anything else that dies ends the run
with its name and its error; the last commit stays valid and `--resume auto` goes on from it.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.plan import Part
from cluster.ray_runtime import wait_all
from cluster.run_dir import RunDir
from services.errors import Deadline, UserError
from services.stream.ledger import Ledger

log = logging.getLogger(__name__)

POLL_S = 0.05


class PartFailed(Exception):  # noqa: N818 - reads as what it says where it is raised
    """A part of the run died, or ended before it should have: named, with its own error."""


def part_failed(name: str, error: BaseException) -> Exception:
    """The error to end the run with: the part's own where the user can mend it, else one that names the part."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, UserError):
        return cause
    lines = str(cause).strip().splitlines() or [""]
    return PartFailed(f"{name} failed: {type(cause).__name__}: {lines[0]}")


@dataclass
class Running:
    """One actor: its handle, and the reference of the call that lasts as long as it works (None: it has none)."""

    name: str
    handle: Any
    running: Any = None


@dataclass
class Supervisor:
    """Holds every actor of a run. `check` is called between two waits of the driver."""

    ray: Any
    run_dir: RunDir
    ledger: Ledger
    restarts_left: int
    start_s: float
    services: list[Running] = field(default_factory=list)
    rollouts: list[Running] = field(default_factory=list)
    learners: list[Running] = field(default_factory=list)
    others: list[Running] = field(default_factory=list)
    on_death: Callable[[str], None] | None = None
    """Told the name of every rollout actor that has died, before it is replaced."""
    _start_rollout: Callable[[str], Running] | None = None
    _rollouts_ever: int = 0

    def actor(self, cls: type, part: Part, env: Mapping[str, str], *args: Any, **kwargs: Any) -> Any:
        """A Ray actor of a plain class. Ray starts again only what has no state: nothing comes back without its own."""
        options: dict[str, Any] = {
            **part.options(),
            "runtime_env": {"env_vars": dict(env)},
            "max_restarts": part.restarts,
        }
        return self.ray.remote(cls).options(**options).remote(*args, **kwargs)

    def start_rollouts(self, count: int, start: Callable[[str], Running]) -> None:
        self._start_rollout = start
        for _ in range(count):
            self.rollouts.append(start(self._next_owner()))

    def _next_owner(self) -> str:
        self._rollouts_ever += 1
        return f"rollout-{self._rollouts_ever - 1}"

    def check(self) -> None:
        """Looks at every part; replaces rollout actors that died.

        Raises:
            PartFailed, UserError: a part died that is not replaced, or too many rollout actors did.
        """
        references = [part.running for part in [*self.services, *self.rollouts] if part.running is not None]
        if not references:
            return
        done, _ = self.ray.wait(references, num_returns=len(references), timeout=0)
        for part in self.services:
            if part.running in done:
                raise self._outcome(part)
        for part in [part for part in self.rollouts if part.running in done]:
            self._replace(part, self._outcome(part))

    def _outcome(self, part: Running) -> Exception:
        try:
            self.ray.get(part.running)
        except Exception as error:  # whatever ended the actor
            return part_failed(part.name, error)
        return PartFailed(f"{part.name} ended before the run did")

    def give_up(self, name: str, why: str) -> None:
        """Ends a rollout actor that lives and does not answer, and replaces it; nothing where it is gone already.

        Raises:
            PartFailed: there were too many.
        """
        for part in [part for part in self.rollouts if part.name == name]:
            self.ray.kill(part.handle, no_restart=True)
            self._replace(part, PartFailed(f"{name} failed: {why}"))

    def _replace(self, part: Running, error: Exception) -> None:
        released = self.ledger.release(part.name)
        self.run_dir.event("rollout_died", actor=part.name, error=str(error), released=len(released))
        self.rollouts.remove(part)
        if self.on_death is not None:
            self.on_death(part.name)
        if self.restarts_left == 0 or self._start_rollout is None or isinstance(error, UserError):
            raise error
        self.restarts_left -= 1
        log.warning("%s; replaced, %d replacements left", error, self.restarts_left)
        self.rollouts.append(self._start_rollout(self._next_owner()))

    def wait(
        self, references: Sequence[Any], who: Sequence[str], *, what: str, seconds: float, tick: Callable[[], None]
    ) -> list[Any]:
        """The results of all references, while every other part is watched and `tick` is called.

        Raises:
            Deadline: names those that did not answer.
            PartFailed, UserError: one of them failed, or another part did.
        """
        end = time.monotonic() + seconds
        pending = list(references)
        while pending:
            done, pending = self.ray.wait(pending, num_returns=len(pending), timeout=POLL_S)
            for reference in done:
                try:
                    self.ray.get(reference)
                except Exception as error:  # whatever the call raised, over there
                    raise part_failed(who[list(references).index(reference)], error) from error
            tick()
            self.check()
            if time.monotonic() > end and pending:
                late = [name for name, reference in zip(who, references, strict=True) if reference in pending]
                raise Deadline(waited_for=what, who=", ".join(late), seconds=seconds)
        return self.ray.get(list(references))

    def rollout_counters(self) -> list[dict[str, float]]:
        """The counters of the rollout actors that answer within a second; watching never stops the run."""
        try:
            return wait_all(
                self.ray,
                [part.handle.counters.remote() for part in self.rollouts],
                seconds=5.0,
                what="counters",
                who=[part.name for part in self.rollouts],
            )
        except Exception as error:  # invariant 10
            log.warning("rollout counters are missing: %s", error)
            return []

    def stop(self) -> None:
        """Ends every actor."""
        for part in [*self.rollouts, *self.services, *self.others, *self.learners]:
            try:
                self.ray.kill(part.handle, no_restart=True)
            except Exception as error:  # it may be dead already
                log.debug("%s: %s", part.name, error)
