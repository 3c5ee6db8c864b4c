"""Evaluation during training: an actor with an engine of its own, so that no rollout actor is taken from its work."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.config import Config
from cluster.evaluate import EvaluationPrompt, evaluate
from cluster.evaluation_config import EvaluationSection
from cluster.evaluation_prompts import attention_options, evaluation_prompts
from cluster.plan import Part
from cluster.supervise import Running, Supervisor
from cluster.training_data import TrainingData
from rollout.config import RolloutSection
from rollout.worker import build_oracle
from services.attention.config import CaptureSection
from services.attention.options import AttentionOptions
from services.models import load_tokenizer
from services.models_config import PolicySection

NAME = "evaluator"


@dataclass(frozen=True)
class Evaluation:
    """Figures for metrics.jsonl, and the one that chooses the best policy (`larger`: larger is better)."""

    metrics: dict[str, float]
    value: float
    larger: bool

    def better_than(self, best: float | None) -> bool:
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

    async def evaluate(self, published: str) -> tuple[dict[str, float], float]:
        """Loads published weights and measures them; returns the scalars and the figure that chooses."""
        await self._engine.load_weights(published, NAME)
        result = await evaluate(
            self._engine,
            self._prompts,
            self._section,
            self._options,
            max_tokens=self._max_tokens,
            decode=lambda ids: self._tokenizer.decode(list(ids), skip_special_tokens=True),
        )
        return result.scalars(), result.figure(self._section.chooses_by).value


class Evaluator:
    """The driver's side."""

    def __init__(
        self, supervisor: Supervisor, part: Part, config: Config, data: TrainingData, tick: Callable[[], None]
    ) -> None:
        section = config.evaluation
        prompts = evaluation_prompts(config, data, section.split, section.prompts)
        self._config = config
        self._supervisor = supervisor
        self._tick = tick
        self._actor = Running(
            NAME,
            supervisor.actor(
                EvaluationWorker,
                part,
                {"OMP_NUM_THREADS": str(config.rollout.threads)},
                config.policy,
                config.attention,
                config.rollout,
                section,
                attention_options(config),
                prompts,
            ),
        )
        supervisor.others.append(self._actor)

    def evaluate(self, published: str, serve: Callable[[], object] | None = None) -> Evaluation:
        """Measures the weights of a manifest, or of an offer to NAME, which `serve` then sends."""
        reference = self._actor.handle.evaluate.remote(published)
        if serve is not None:
            serve()
        scalars, value = self._supervisor.wait(
            [reference],
            [self._actor.name],
            what="the evaluation",
            seconds=self._config.cluster.step_s,
            tick=self._tick,
        )[0]
        return Evaluation(scalars, value, larger=self._config.evaluation.best_goal == "max")
