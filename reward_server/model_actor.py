"""A model behind Ray actors: what an actor holds, and a replica that asks it. Needs no Ray itself.

A run makes an actor of `ModelActor` for each replica (`ray.remote`), with the resources that its plan gives it; Ray
starts its process again when it dies. An `ActorReplica` asks one, for a `ReplicaRunner`, which has it load its model
again or, where that was often, leaves it alone: a process that is asked nothing loads nothing.
"""

import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from reward_server.replicas import NoReplica, ReplicaAway, ReplicaLost
from reward_server.runner import ModelFacts, ModelRunner, ModelSpec, Output, Row, load_model
from services.errors import Deadline

POLL_S = 0.5
LOADS = 3
"""An actor that dies so often in one `start` while it loads its model does so of loading it."""


class NotLoaded(Exception):  # noqa: N818 - reads as what it says where it is raised
    """This process has not been asked to load its model: it is not the one that was."""


class ModelActor:
    """One replica. A plain class: `ray.remote` makes an actor of it."""

    def __init__(self, spec: ModelSpec) -> None:
        """The model is loaded by `facts`, so that what is wrong with it comes back as that call's error."""
        self._spec = spec
        self._loaded = False

    def facts(self) -> ModelFacts:
        """Raises UserError where the model cannot be loaded."""
        facts = self._model.facts
        self._loaded = True
        return facts

    def run(self, rows: Sequence[Row]) -> list[Output]:
        """Raises NotLoaded before `facts`: nobody has looked yet whether this is the model that was there before."""
        if not self._loaded:
            raise NotLoaded
        return self._model.run(rows)

    def pulse(self) -> tuple[int, bool]:
        """That it answers; its batches have a deadline of their own."""
        return 0, False

    @cached_property
    def _model(self) -> ModelRunner:
        return load_model(self._spec)


class ActorReplica:
    """An actor's handle as a replica. `ray` is the module."""

    def __init__(self, handle: Any, ray: Any, *, load_s: float = 600.0, run_s: float = 120.0) -> None:
        """`load_s`, `run_s`: deadlines for loading and for one batch."""
        self._handle = handle
        self._ray = ray
        self._load_s = load_s
        self._run_s = run_s

    def start(self) -> ModelFacts:
        """Waits for Ray to start the actor, and for the actor to load its model."""
        end = time.monotonic() + self._load_s
        try:
            for _ in range(LOADS):
                self._wait_for_process(end)
                try:
                    return self._answer(self._handle.facts.remote(), end)
                except self._ray.exceptions.ActorUnavailableError:
                    continue
        except TimeoutError as error:
            self._ray.kill(self._handle, no_restart=False)  # what hangs would hang the next time, too
            raise Deadline(waited_for="a model to load", who="a model's actor", seconds=self._load_s) from error
        except self._ray.exceptions.RayActorError as error:
            raise ReplicaLost("a model's actor is dead and Ray does not start it again") from error
        raise ReplicaLost(f"a model's actor died {LOADS} times while it loaded its model")

    def _wait_for_process(self, end: float) -> None:
        """Raises ReplicaAway where Ray has not started it again by then, TimeoutError where it is there and silent."""
        down = False
        while not down or time.monotonic() < end:
            try:
                self._answer(self._handle.pulse.remote(), end)
                return
            except self._ray.exceptions.ActorUnavailableError:  # between its death and its next life
                down = True
                time.sleep(POLL_S)
            except TimeoutError:
                if not down:
                    raise
        raise ReplicaAway(waited_for="a place for a model", who="a model's actor", seconds=self._load_s)

    def _answer(self, reference: Any, end: float) -> Any:
        return self._ray.get(reference, timeout=max(0.0, end - time.monotonic()))

    def run(self, rows: Sequence[Row]) -> list[Output]:
        try:
            return self._ray.get(self._handle.run.remote(list(rows)), timeout=self._run_s)
        except TimeoutError as error:
            self._ray.kill(self._handle, no_restart=False)
            raise ReplicaLost(f"a model's actor did not answer within {self._run_s:.0f} s") from error
        except NotLoaded as error:
            raise NoReplica("a model's actor has died meanwhile; its next process holds no model yet") from error
        except self._ray.exceptions.RayActorError as error:
            raise ReplicaLost("a model's actor died") from error

    def stop(self) -> None:
        """Nothing: an actor belongs to its run."""
