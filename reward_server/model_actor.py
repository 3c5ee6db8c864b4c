"""A model behind Ray actors: what an actor holds, and the runner that asks its replicas. Needs no Ray itself.

A run makes an actor of `ModelActor` for each replica (`ray.remote`), with the resources that its plan gives it, and
hands their handles with `ray.get` to an `ActorRunner`, which a scorer takes for a model of its own process.
"""

import queue
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib import import_module
from typing import Any

from reward_server.runner import ModelFacts, ModelRunner, ModelSpec, Output, Row
from services.errors import Deadline


class ModelActor:
    """One replica. A plain class: `ray.remote` makes an actor of it."""

    def __init__(self, spec: ModelSpec) -> None:
        """The model is loaded by the first call, so that what is wrong with it comes back as that call's error."""
        self._spec = spec

    def facts(self) -> ModelFacts:
        """Raises UserError where the model cannot be loaded."""
        return self._model.facts

    def run(self, rows: Sequence[Row]) -> list[Output]:
        return self._model.run(rows)

    def pulse(self) -> tuple[int, bool]:
        """That it answers; its batches have a deadline of their own."""
        return 0, False

    @cached_property
    def _model(self) -> ModelRunner:
        return import_module("reward_server.local_model").LocalModel(self._spec)


class ActorRunner:
    """The replicas of one model as a `ModelRunner`: a batch goes to one that is free.

    Where a replica fails, the batch goes to another; where all have failed, the last error is raised.
    """

    def __init__(
        self, handles: Sequence[Any], get: Callable[..., Any], *, load_s: float = 600.0, run_s: float = 120.0
    ) -> None:
        """`get` is `ray.get`. `load_s`, `run_s`: deadlines for loading and for one batch. Raises what a replica raised
        while it loaded, Deadline where it did not answer, ValueError where the replicas are not of one model."""
        self._get = get
        self._run_s = run_s
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        asked = [handle.facts.remote() for handle in handles]
        facts: list[ModelFacts] = [self._answer(answer, load_s, "a model to load") for answer in asked]
        if not facts or any(one != facts[0] for one in facts):
            raise ValueError(f"{len(facts)} replicas of {len({one.revision for one in facts})} models, one is needed")
        self.facts = facts[0]
        self.lanes = len(handles)
        for handle in handles:
            self._free.put(handle)

    def run(self, rows: Sequence[Row]) -> list[Output]:
        taken: list[Any] = []
        try:
            while True:
                taken.append(self._next())
                try:
                    return self._answer(taken[-1].run.remote(list(rows)), self._run_s, "a batch")
                except Exception:
                    if len(taken) == self.lanes:
                        raise
        finally:
            # Those that failed come back too, behind the others: Ray may have started the actor again.
            for handle in reversed(taken):
                self._free.put(handle)

    def _next(self) -> Any:
        try:
            return self._free.get(timeout=self._run_s)
        except queue.Empty:
            raise Deadline(waited_for="a replica that is free", who="the model", seconds=self._run_s) from None

    def _answer(self, reference: Any, seconds: float, what: str) -> Any:
        try:
            return self._get(reference, timeout=seconds)
        except TimeoutError as error:
            raise Deadline(waited_for=what, who="a model's actor", seconds=seconds) from error
