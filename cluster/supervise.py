"""The actors of a run: started by the plan, watched while the driver waits, started again or reported when they die.

Rollout actors, scoring workers and the reward server are kept up: what dies, or stands still past its deadline, is
started again after a pause, within its own budget of `cluster.restarts`; leases and unfinished groups pass on. A dead
learner rank is raised as `LearnerDied`: the run goes back to its last commit (`cluster.training`). Models that score
are started again by Ray, the evaluator by who asks it. What a part says on purpose (a user's mistake, a reward server
that refuses the samples) ends the run with its words; so does what dies once too often. A user's mistake that the one
before in its place did not meet is tried again first: an engine that finds too little memory says so in the same words.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.plan import Node, Part, bound_to, free_of_ray, no_room, place
from cluster.reservation import Reservation
from cluster.restarts import RestartBudget
from cluster.run_dir import RunDir
from cluster.running import Kept, LearnerDied, PartDied, PartFailed, Running, Unanswered
from reward_server.worker import ScoringOutage, ScoringRefused
from services.errors import Deadline, PlanError, UserError
from services.stream.ledger import Ledger

log = logging.getLogger(__name__)

POLL_S = 0.05
END_S = 30.0
"""Seconds for a process that was killed to be gone."""

VIEW_S = 10.0
"""Seconds after which Ray's view of what is free shows what was started where there was room; mostly it takes one."""

COUNTERS_S = 2.0
"""Seconds for the parts to say their counters; the line of a step waits no longer for them."""

SAID_ON_PURPOSE = (UserError, ScoringOutage, ScoringRefused)
"""What a part ends with that ends the run: another try says the same, but for a UserError where one worked before."""


@dataclass
class Supervisor:
    """Holds every actor of a run. `check` is called between two waits of the driver.

    `label` is the run's in the names of its actors, other than that of any run in the same namespace; `progress_s` is
    the longest that a part with work may stand still.
    """

    ray: Any
    label: str
    run_dir: RunDir
    ledger: Ledger
    budget: RestartBudget
    progress_s: float
    kept: list[Kept] = field(default_factory=list)
    learners: list[Running] = field(default_factory=list)
    others: list[Running] = field(default_factory=list)
    room: Reservation | None = None
    """What is reserved for the learner's ranks."""
    machine: str | None = None
    """The address of the machine that every actor is bound to; None: any of the cluster."""
    planned: dict[str, Part] = field(default_factory=dict[str, Part])
    """By name, what is to be started soon: until then, nothing else is started in its room."""
    on_death: Callable[[str], None] | None = None
    """Told the name of every part that weights are sent to when it has died, before another is started."""
    watch: Callable[[], None] = lambda: None
    """Called at each `check`: raises where what is no actor (Redis) has gone for good."""
    _rollouts_ever: int = 0
    _titles: Counter[str] = field(default_factory=Counter[str])

    def actor(
        self,
        title: str,
        cls: type,
        part: Part,
        env: Mapping[str, str],
        *args: Any,
        within: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """A Ray actor of a plain class. Ray starts again only what has no state: nothing comes back without its own.

        Its name in Ray's lists is RUN/`title`, with a number from the second start of a title on: a name is free again
        only some time after its actor has died. `within`: the options that put it into a reservation.
        """
        self.planned.pop(part.name, None)
        self._titles[title] += 1
        started = self._titles[title]
        options: dict[str, Any] = {
            **part.options(),
            "name": f"{self.label}/{title}" + (f"#{started}" if started > 1 else ""),
            "runtime_env": {"env_vars": dict(env)},
            "max_restarts": part.restarts,
            **({} if self.machine is None else {"resources": bound_to(self.machine)}),
            **(within or {}),
        }
        return self.ray.remote(cls).options(**options).remote(*args, **kwargs)

    def keep(self, kept: Kept, *, missing: bool = False) -> Kept:
        """Starts a part that is kept up from now on; where it is `missing`, once the cluster has room for it."""
        kept.slot = f"{kept.part.name}-{sum(each.part.name == kept.part.name for each in self.kept)}"
        if not missing:
            kept.now = kept.start()
        self.kept.append(kept)
        return kept

    def start_rollouts(self, part: Part, start: Callable[[str], Running], missing: int = 0) -> None:
        """`part.count` rollout actors, and `missing` more when there is room."""

        def start_next() -> Running:
            self._rollouts_ever += 1
            return start(f"rollout-{self._rollouts_ever - 1}")

        for index in range(part.count + missing):
            self.keep(Kept("rollout", part, start_next, self._release), missing=index >= part.count)

    @property
    def rollouts(self) -> list[Running]:
        return [kept.now for kept in self.kept if kept.kind == "rollout" and kept.now is not None]

    def _release(self, part: Running) -> dict[str, Any]:
        released = self.ledger.release(part.name)
        if self.on_death is not None:
            self.on_death(part.name)
        return {"released": len(released)}

    # Watching

    def check(self) -> None:
        """Looks at every part; starts again what died, or stands still.

        Raises:
            PartFailed, UserError: a part that has died too often, or ended on purpose.
            LearnerDied: a rank is gone; nothing else was waiting for it.
        """
        now = time.monotonic()
        self.watch()
        up = [kept for kept in self.kept if kept.now is not None]
        watched = [part for kept in up if (part := kept.now) is not None] + self.others + self.learners
        for part in watched:
            part.pulse.ask(now)
        references = [part.pulse.reference for part in watched if part.pulse.reference is not None]
        for kept in up:
            references += [ref for ref in (kept.now.running, kept.now.up) if ref is not None] if kept.now else []
        if references:
            done, _ = self.ray.wait(references, num_returns=len(references), timeout=0)
            self._look(up, set(done), now)
        for kept in self.kept:
            if kept.now is None and now >= kept.due:
                self._start_again(kept, now)

    def _look(self, up: Sequence[Kept], done: set[Any], now: float) -> None:
        for kept in up:
            part = kept.now
            if part is None:
                continue
            if part.running in done:
                self._lost(kept, self._outcome(part))
            elif part.up in done:
                self._came_up(kept, part)
            elif (error := self._listen(part, done, now)) is not None:
                self._lost(kept, error)
            elif part.pulse.still_s(now) > self.progress_s:
                still = f"made no progress for {self.progress_s:.0f} s (cluster.progress_s)"
                self._give_up(kept, part, still)
        for part in list(self.others):
            if isinstance(error := self._listen(part, done, now), PartDied):
                self._other_died(part, error)
        for part in self.learners:
            if isinstance(error := self._listen(part, done, now), PartDied):
                raise LearnerDied(str(error))

    def _came_up(self, kept: Kept, part: Running) -> None:
        reference, part.up = part.up, None
        try:
            result = self.ray.get(reference)
        except Exception as error:  # whatever it could not come up for
            self._lost(kept, self.part_failed(part.name, error))
            return
        part.pulse.worked = True
        kept.on_up(result)

    def _listen(self, part: Running, done: set[Any], now: float) -> Exception | None:
        if part.pulse.reference not in done:
            return None
        try:
            answer = self.ray.get(part.pulse.reference)
        except Exception as error:  # whatever ended the actor
            part.pulse.reference = None
            return self.part_failed(part.name, error)
        part.pulse.heard(answer, now)
        if part.down:
            part.down = False
            self.run_dir.event("part_started", actor=part.name)
        return None

    def _other_died(self, part: Running, error: Exception) -> None:
        """A model's replica, which Ray starts again, or has given up; or the evaluator."""
        try:
            self.ray.get(part.handle.pulse.remote(), timeout=0)
        except self.ray.exceptions.ActorDiedError:
            self.others.remove(part)
            if self.on_death is not None:
                self.on_death(part.name)
        except Exception as unsettled:  # it is coming up again, or will be asked again
            log.debug("%s: %s", part.name, unsettled)
        if not part.down:
            part.down = True
            self.run_dir.event("part_died", actor=part.name, error=str(error))
            log.warning("%s", error)

    def _outcome(self, part: Running) -> Exception:
        try:
            self.ray.get(part.running)
        except Exception as error:  # whatever ended the actor
            return self.part_failed(part.name, error)
        return PartFailed(f"{part.name} ended before the run did")

    def part_failed(self, name: str, error: BaseException) -> Exception:
        """The error to end the run with: the part's own where the user can mend it, else one that names the part."""
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, UserError):
            return cause
        lines = str(cause).strip().splitlines() or [""]
        died = isinstance(error, self.ray.exceptions.RayActorError)
        failed = (PartDied if died else PartFailed)(f"{name} failed: {type(cause).__name__}: {lines[0]}")
        failed.__cause__ = cause
        return failed

    # Starting again

    def give_up(self, name: str, why: str) -> None:
        """Ends a part that lives and does not answer, and starts it again; nothing where it is gone already.

        Raises:
            PartFailed: there were too many.
        """
        for kept in self.kept:
            if kept.now is not None and kept.now.name == name:
                self._give_up(kept, kept.now, why)

    def _give_up(self, kept: Kept, part: Running, why: str) -> None:
        self._lost(kept, PartDied(f"{part.name} failed: {why}"))

    def end_rollouts(self, count: int) -> None:
        """Ends the last `count` rollout actors; each is started again once there is room beside what is spoken for."""
        up = [kept for kept in self.kept if kept.kind == "rollout" and kept.now is not None]
        for kept in up[len(up) - count :] if count > 0 else []:
            part, more = self._vacate(kept)
            kept.due, kept.worked = 0.0, kept.worked or part.pulse.worked
            log.warning("%s is ended: the cluster has no room for it beside the learner now", part.name)
            self.run_dir.event("part_missing", part=kept.part.name, actor=part.name, **more)

    def _vacate(self, kept: Kept) -> tuple[Running, dict[str, Any]]:
        """Takes a part out of its slot and ends what is left of it; the part, and what is to be said of its death."""
        part = kept.now
        assert part is not None
        kept.now, kept.lost = None, part.name
        self.end(part)
        return part, kept.on_death(part)

    def end(self, part: Running) -> None:
        """Ends a part's process, which may be gone already."""
        try:
            self.ray.kill(part.handle, no_restart=True)
        except Exception as gone:
            log.debug("%s: %s", part.name, gone)

    def _lost(self, kept: Kept, error: Exception) -> None:
        part, more = self._vacate(kept)
        self.run_dir.event(f"{kept.kind}_died", actor=part.name, error=str(error), **more)
        cause = error.__cause__ or error
        again = kept.worked if isinstance(cause, UserError) else not isinstance(cause, SAID_ON_PURPOSE)
        kept.worked = kept.worked or part.pulse.worked
        pause = self.budget.spend(kept.slot) if again else None
        if pause is None and isinstance(error, UserError):
            raise error
        if pause is None:
            # Not as it came: who waits for another part would take a PartDied, or what caused this, for that part's.
            raise PartFailed(str(error)) from error
        log.warning("%s; started again in %.1f s, %d more times", error, pause, self.budget.left(kept.slot))
        kept.due = time.monotonic() + pause

    def _start_again(self, kept: Kept, now: float) -> None:
        if not self.has_room(kept.part):
            if kept.due:  # said once
                log.warning("the cluster has no room for %s now: the run goes on without", kept.part.name)
                self.run_dir.event("part_missing", part=kept.part.name)
            kept.due = 0.0
            kept.no_room_since = kept.no_room_since or now
            return
        kept.no_room_since = None
        kept.now = kept.start()
        self.run_dir.event("part_started", actor=kept.now.name)
        kept.now.pulse.moved = now

    def has_room(self, part: Part) -> bool:
        """Whether a node has free what one of the part needs, beside what is spoken for: one that Ray cannot place
        would look like a stuck one, and one that takes the learner's room would end the run."""
        try:
            place([*self._spoken_for(part.name), replace(part, count=1)], self._free())
        except PlanError:
            return False
        return True

    def _spoken_for(self, but: str) -> list[Part]:
        """What is to be started, `but` for one part, and what was started and Ray's view may not show yet."""
        now = time.monotonic()
        starting = [
            kept.part
            for kept in self.kept
            if kept.now is not None and not kept.now.pulse.beats and now - kept.now.pulse.moved < VIEW_S
        ]
        ranks = self.learners if self.room is None else []  # what is reserved is not free
        starting += [each.part for each in [*self.others, *ranks] if each.part is not None and not each.pulse.beats]
        counted = Counter(replace(part, count=1) for part in starting)
        return [
            *(part for name, part in self.planned.items() if name != but),
            *(replace(part, count=count) for part, count in counted.items()),
        ]

    def _free(self) -> list[Node]:
        """What each living node has free. Ray's public `available_resources` has the sum alone."""
        return free_of_ray(self.ray._private.state.available_resources_per_node(), self.machine)

    def check_room(self, kind: str, seconds: float) -> None:
        """Asked by who waits for a part of a kind.

        Raises:
            PlanError: none is up, and there was no room for any of them for `seconds`.
        """
        kept = [each for each in self.kept if each.kind == kind]
        since = [each.no_room_since for each in kept if each.now is None and each.no_room_since is not None]
        if not kept or len(since) < len(kept) or time.monotonic() - max(since) < seconds:
            return
        lost = ", ".join(each.lost for each in kept if each.lost)
        raise self.no_room(kept[0].part, f"{lost} died and none of its kind is left", seconds)

    def no_room(self, part: Part, why: str, seconds: float) -> PlanError:
        """The error to end the run with, where there was no room for so long."""
        return no_room(part, why, seconds, self._free(), self._spoken_for(part.name))

    # Waiting

    def wait(
        self, references: Sequence[Any], who: Sequence[str], *, what: str, seconds: float, tick: Callable[[], None]
    ) -> list[Any]:
        """The results of all references, while every other part is watched and `tick` is called.

        Raises:
            Unanswered: names those that did not answer.
            PartDied: one of them is gone; never another part.
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
                    raise self.part_failed(who[list(references).index(reference)], error) from error
            tick()
            self.check()
            if time.monotonic() > end and pending:
                late = [name for name, reference in zip(who, references, strict=True) if reference in pending]
                raise Unanswered(waited_for=what, who=", ".join(late), seconds=seconds)
        return self.ray.get(list(references))

    def counters(self) -> dict[str, dict[str, dict[str, float]]]:
        """By kind and name, the counters of the parts that answer within `COUNTERS_S`; watching never stops the run."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        try:
            asked = {
                part.handle.counters.remote(): (kept.kind, part.name)
                for kept in self.kept
                if (part := kept.now) is not None and part.pulse.beats  # else its process is coming up
            }
            done, late = self.ray.wait(list(asked), num_returns=len(asked), timeout=COUNTERS_S) if asked else ([], [])
            for reference in done:
                kind, name = asked[reference]
                found.setdefault(kind, {})[name] = self.ray.get(reference)
            if late:
                log.warning("no counters from %s", ", ".join(asked[reference][1] for reference in late))
        except Exception as error:  # invariant 10
            log.warning("counters are missing: %s", error)
        return found

    # Ending

    def dead_among(self, parts: Sequence[Running], seconds: float) -> list[str]:
        """The names of those whose process turns out to be gone within some seconds; returns at the first."""
        asked = {part.name: part.handle.pulse.remote() for part in parts}
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done, _ = self.ray.wait(list(asked.values()), num_returns=len(asked), timeout=POLL_S)
            dead = [name for name, reference in asked.items() if reference in done and self._is_dead(reference)]
            if dead or len(done) == len(asked):
                return dead
        return []

    def _is_dead(self, reference: Any) -> bool:
        try:
            self.ray.get(reference)
        except self.ray.exceptions.RayActorError:
            return True
        except Exception as error:
            log.debug("alive: %s", error)
        return False

    def stop_learners(self) -> None:
        """Ends every rank and returns when their processes are gone: two groups must not write one directory.

        Raises:
            Deadline: one lives on.
        """
        ranks, self.learners = self.learners, []
        if ranks and (part := ranks[0].part) is not None:
            self.planned[part.name] = part  # they come back, and would find their room taken
        for part in ranks:
            self.ray.kill(part.handle, no_restart=True)
        end = time.monotonic() + END_S
        left = list(ranks)
        while left:
            left = [part for part in left if not self.dead_among([part], POLL_S)]
            if left and time.monotonic() > end:
                raise Deadline(
                    waited_for="the learner's ranks to end", who=", ".join(part.name for part in left), seconds=END_S
                )
        self._give_room_back()

    def _give_room_back(self) -> None:
        room, self.room = self.room, None
        if room is not None:
            room.give_back()

    def stop(self) -> None:
        """Ends every actor."""
        kept = [part.now for part in self.kept if part.now is not None]
        for part in [*kept, *self.others, *self.learners]:
            try:
                self.ray.kill(part.handle, no_restart=True)
            except Exception as error:  # it may be dead already
                log.debug("%s: %s", part.name, error)
        try:
            self._give_room_back()
        except Exception as error:  # Ray gives it back with the run
            log.debug("the learner's reservation: %s", error)
