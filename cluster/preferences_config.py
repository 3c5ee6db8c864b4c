"""The settings of synthetic preference data (`attune preferences`)."""

from typing import Literal, Self

from pydantic import Field, model_validator

from reward_server.model_sources_config import JudgeSource
from services.config_base import Section


class PreferencesSection(Section):
    """How comparisons are made without people. What they are made of are the prompts of the `data` section."""

    method: Literal["off_topic", "principles"] = Field(
        default="off_topic",
        description="off_topic: the reference response against one to another prompt; principles: a judge compares two "
        "responses by principles (SALMON, arXiv 2310.05910).",
    )
    negatives: int = Field(default=1, ge=1, description="off_topic: responses to other prompts, a comparison each.")
    responses: str | None = Field(
        default=None,
        min_length=1,
        description="principles: two or more responses a prompt, JSONL or Parquet: what `attune rollout` wrote for the "
        "prompts of data.source, or rows with prompt (or messages) and response.",
    )
    judge: JudgeSource | None = Field(default=None, description="principles: the model that compares.")
    set: str = Field(
        default="training",
        min_length=1,
        description="principles: the set they come from, by name (training, rl, interventions) or a YAML file.",
    )
    principles: int = Field(default=3, ge=1, description="Principles drawn for a comparison. 3: SALMON's.")
    negated: float = Field(
        default=0.5, ge=0, le=1, description="Share of the drawn principles that are turned round. 0.5: SALMON's."
    )
    soft_labels: bool = Field(
        default=False, description="principles: write the judge's probability as label_prob; false: plain labels."
    )
    seed: int = Field(default=0, ge=0, description="Of the draw of principles and of other prompts.")

    @model_validator(mode="after")
    def _a_judge_that_compares(self) -> Self:
        if self.judge is not None and self.judge.mode != "compare":
            raise ValueError(f"judge.mode: {self.judge.mode}; preferences need compare")
        if self.method == "principles" and (self.judge is None or self.responses is None):
            missing = "judge" if self.judge is None else "responses"
            raise ValueError(f"method principles needs preferences.{missing}")
        return self
