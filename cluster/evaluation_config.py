"""The `evaluation` section: how often held-out prompts are answered, how, and which figure chooses `policy-best/`."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from services.config_base import Section

Decoding = Literal["greedy", "nucleus", "sample"]


class EvaluationSection(Section):
    every: int = Field(
        default=0,
        ge=0,
        description="Steps between evaluations during training; 0: none, for they take time from the run.",
    )
    split: Literal["validation", "test"] = Field(
        default="validation",
        description="Prompts of the evaluations during training. The test split is for the last word only: what "
        "chooses `policy-best/` must not have seen it.",
    )
    prompts: int = Field(
        default=64,
        ge=1,
        description="Held-out prompts, the first of the split, or all that it has. 64: as many as a step.",
    )
    decodings: tuple[Decoding, ...] = Field(
        default=("greedy", "nucleus"),
        min_length=1,
        description="`greedy`; `nucleus`: top-p sampling; `sample`: the untruncated distribution that is trained.",
    )
    samples: int = Field(
        default=4,
        ge=1,
        description="Responses a prompt where decoding draws (greedy has one). 2 and more give the within-prompt "
        "standard deviation; 4 as in training (CAGSR, arXiv 2502.10482).",
    )
    top_p: float = Field(
        default=0.9, gt=0, le=1, description="Nucleus mass (Holtzman et al., arXiv 1904.09751: 0.9 to 0.95)."
    )
    temperature: float = Field(default=1.0, gt=0, description="Softmax temperature of `nucleus` and `sample`.")
    max_tokens: int | None = Field(
        default=None, ge=1, description="Longest response, in tokens; null: rollout.max_tokens, as in training."
    )
    batch_prompts: int = Field(default=16, ge=1, description="Prompts given to the engine at once: bounds memory.")
    seed: int = Field(default=0, ge=0, description="Seeds the draws, prompt by prompt: the same at every evaluation.")
    resamples: int = Field(
        default=2000,
        ge=100,
        description="Bootstrap resamples of prompts. 2000: Efron and Tibshirani (1993) ask for 1000 and more.",
    )
    level: float = Field(default=0.95, gt=0, lt=1, description="Probability that the intervals hold.")
    best_metric: str | None = Field(
        default=None,
        description="Figure that chooses `policy-best/`, as DECODING/METRIC, e.g. greedy/rouge_l; null: the attention "
        "reward under the first decoding.",
    )
    best_goal: Literal["max", "min"] = Field(default="max", description="Which end of `best_metric` is the better one.")

    @field_validator("decodings")
    @classmethod
    def _each_once(cls, value: tuple[Decoding, ...]) -> tuple[Decoding, ...]:
        if len(set(value)) != len(value):
            raise ValueError(f"decodings are named once each, got {list(value)}")
        return value

    @model_validator(mode="after")
    def _known_best_metric(self) -> Self:
        if self.best_metric is not None:
            decoding, separator, metric = self.best_metric.partition("/")
            if not separator or decoding not in self.decodings or metric not in METRICS:
                raise ValueError(
                    f"best_metric {self.best_metric!r} must be DECODING/METRIC with DECODING one of "
                    f"{', '.join(self.decodings)} and METRIC one of {', '.join(METRICS)}"
                )
        return self

    @property
    def chooses_by(self) -> str:
        """`best_metric` as resolved: DECODING/METRIC."""
        return self.best_metric or f"{self.decodings[0]}/reward"

    @property
    def measure(self) -> str:
        """What the figure that chooses is of: figures of different measures are not compared."""
        return f"the {self.best_goal} of {self.chooses_by} over {self.prompts} prompts of {self.split}"


ATTENTION_METRICS = ("reward", "coverage", "focus", "repeat", "spike", "mass", "peak_share", "entropy_q05")
REFERENCE_METRICS = ("exact_match", "token_f1", "rouge_l")
TEXT_METRICS = ("repetition", "length", "finished")
CORPUS_METRICS = ("distinct_1", "distinct_2", "perplexity")
NEED_REFERENCE = (*REFERENCE_METRICS, "perplexity")
METRICS = (*ATTENTION_METRICS, *REFERENCE_METRICS, *TEXT_METRICS, *CORPUS_METRICS)
