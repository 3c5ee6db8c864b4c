"""Evaluation during training: an actor with an engine of its own, so that no rollout actor is taken from its work."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.config import Config
from cluster.evaluate import EvaluationPrompt, evaluate
from cluster.evaluation_config import EvaluationSection
from cluster.evaluation_prompts import attention_options, evaluation_prompts
from cluster.plan import Part
from cluster.running import PartDied, PartFailed, Running, Unanswered
from cluster.supervise import POLL_S, Supervisor
from cluster.training_data import TrainingData
from cluster.weight_rounds import ROUNDS
from rollout.config import RolloutSection
from rollout.worker import build_oracle
from services.attention.config import CaptureSection
from services.attention.options import AttentionOptions
from services.models import load_tokenizer
from services.models_config import PolicySection
from services.transfer.offer import Broken

log = logging.getLogger(__name__)

NAME = "evaluator"


@dataclass(frozen=True)
class Evaluation:
    """Figures for metrics.jsonl, and the one that chooses the best policy (`larger`: larger is better).

    `value` is None where this evaluation has no such figure: it is then better than none.
    """

    metrics: dict[str, float]
    value: float | None
    larger: bool

    def better_than(self, best: float | None) -> bool:
        if self.value is None:
            return False
        return best is None or (self.value > best if self.larger else self.value < best)


class EvaluationWorker:
    """The actor's side: an engine, the prompts, and how they are decoded."""

    def __init__(
        self,
        policy: PolicySection,
        capture: CaptureSection,
        rollout: RolloutSection,
        section: EvaluationSection,
        options: AttentionOptions,
        prompts: list[EvaluationPrompt],
    ) -> None:
        self._engine = build_oracle(policy, capture, rollout)
        self._tokenizer: Any = load_tokenizer(policy)
        self._section = section
        self._options = options
        self._prompts = prompts
        self._max_tokens = rollout.max_tokens

    async def pulse(self) -> tuple[int, bool]:
        """That it answers; an evaluation has a deadline of its own."""
        return 0, False

    async def evaluate(self, published: str) -> tuple[dict[str, float], float | None]:
        """Loads published weights and measures them; the scalars, and the figure that chooses if it is there."""
        await self._engine.load_weights(published, NAME)
        result = await evaluate(
            self._engine,
            self._prompts,
            self._section,
            self._options,
            max_tokens=self._max_tokens,
            decode=lambda ids: self._tokenizer.decode(list(ids), skip_special_tokens=True),
        )
        figure = result.figure(self._section.chooses_by)
        # None: at one moment of a run every response may fail, of a policy that says nothing. No reason to end the run.
        return result.scalars(), None if figure is None else figure.value


class Evaluator:
    """The driver's side."""

    def __init__(
        self, supervisor: Supervisor, part: Part, config: Config, data: TrainingData, tick: Callable[[], None]
    ) -> None:
        section = config.evaluation
        prompts = evaluation_prompts(config, data, section.split, section.prompts)
        self._config = config
        self._part = part
        self._supervisor = supervisor
        self._tick = tick

        def start() -> Running:
            worker = supervisor.actor(
                NAME,
                EvaluationWorker,
                part,
                {"OMP_NUM_THREADS": str(config.rollout.threads)},
                config.policy,
                config.attention,
                config.actors_rollout,
                section,
                attention_options(config),
                prompts,
            )
            return Running(NAME, worker, part=part)

        self._start = start
        self._actor = start()
        supervisor.others.append(self._actor)

    def evaluate(self, publish: Callable[[], tuple[str, Callable[[], object] | None]]) -> Evaluation:
        """Measures the weights that `publish` names: a manifest, or an offer to NAME and the call that serves it.

        Where the evaluator dies, or does not answer, another is started, within the budget, and asked from the
        beginning; where a transfer to it breaks off, the weights are offered again.

        Raises:
            PartFailed, Deadline: it died too often, could not measure, or did not answer once too often, or the
                weights did not reach it in ROUNDS transfers.
            PlanError: the cluster had no room for another.
        """
        broken = 0
        while True:
            try:
                self._wait_until_up()
                published, serve = publish()
                reference = self._actor.handle.evaluate.remote(published)
                if serve is not None:
                    serve()
                scalars, value = self._supervisor.wait(
                    [reference],
                    [NAME],
                    what="the evaluation",
                    seconds=self._config.cluster.step_s,
                    tick=self._tick,
                )[0]
            except (PartDied, Unanswered) as error:
                self._start_again(error)
                continue
            except PartFailed as error:
                broken += 1
                if not isinstance(error.__cause__, Broken) or broken == ROUNDS:
                    raise
                log.warning("%s; it is offered the weights again", error)
                continue
            return Evaluation(scalars, value, larger=self._config.evaluation.best_goal == "max")

    def _wait_until_up(self) -> None:
        """Returns when its engine is built, or its process is known to be gone: the call that follows says why.

        Raises:
            Unanswered: neither within `cluster.start_s`. Ray waits without a word where it has no room.
        """
        seconds = self._config.cluster.start_s
        end = time.monotonic() + seconds
        while not self._actor.pulse.beats and any(part is self._actor for part in self._supervisor.others):
            if time.monotonic() > end:
                raise Unanswered(waited_for="the evaluator to come up", who=NAME, seconds=seconds)
            self._look()

    def _start_again(self, error: PartDied | Unanswered) -> None:
        supervisor = self._supervisor
        supervisor.run_dir.event("evaluator_died", actor=NAME, error=str(error))
        supervisor.others = [part for part in supervisor.others if part is not self._actor]
        supervisor.end(self._actor)  # where it lives, and did not answer
        pause = supervisor.budget.spend(NAME)
        if pause is None:
            raise error
        log.warning("%s; started again in %.1f s", error, pause)
        supervisor.planned[NAME] = self._part
        try:
            end = time.monotonic() + pause
            while time.monotonic() < end:
                self._look()
            self._wait_for_room()
        finally:  # where the run goes back meanwhile, nobody starts it before the next evaluation
            supervisor.planned.pop(NAME, None)
        self._actor = self._start()
        supervisor.others.append(self._actor)
        supervisor.run_dir.event("part_started", actor=NAME)

    def _wait_for_room(self) -> None:
        """Returns when a node has room for it.

        Raises:
            PlanError: none has, for `cluster.start_s`.
        """
        supervisor, seconds = self._supervisor, self._config.cluster.start_s
        end = time.monotonic() + seconds
        said = False
        while not supervisor.has_room(self._part):
            if time.monotonic() > end:
                raise supervisor.no_room(self._part, f"{NAME} died", seconds)
            if not said:
                log.warning("the cluster has no room for the evaluator now: it is waited for, up to %.0f s", seconds)
                supervisor.run_dir.event("part_missing", part=NAME)
                said = True
            self._look()

    def _look(self) -> None:
        self._tick()
        self._supervisor.check()
        time.sleep(POLL_S)
