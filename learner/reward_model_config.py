"""The settings of reward-model training (`attune reward-model`)."""

from typing import Literal, Self

from pydantic import Field, model_validator

from learner.sft_config import SftSection
from services.config_base import Section
from services.scoring_format import CHAT, FACTS_TEMPLATE, PRINCIPLE_TEMPLATE, Kind, ScorerFormat, StepRule

SHAPES = {"preference": "comparisons", "principle": "comparisons", "absolute": "ratings", "process": "steps"}
"""What each kind of model learns from; see `services/text/preference_data.py`."""


class LoraSection(Section):
    """Low-rank adapters in place of all weights (arXiv 2106.09685). They are merged into what is written."""

    rank: int = Field(default=0, ge=0, description="Rank of the adapters; 0 trains all weights.")
    alpha: float = Field(default=16.0, gt=0, description="Adapters are scaled by alpha / rank. 16: the paper's.")
    targets: tuple[str, ...] = Field(
        default=(), description="Names of the linear layers that are adapted; none: all but the score's own."
    )


class PretrainSection(Section):
    """Training on cheap preferences first (preference model pre-training, arXiv 2112.00861)."""

    source: str | None = Field(
        default=None, min_length=1, description="Labelled data of the same shape, as reward_model.source. null: none."
    )
    limit: int | None = Field(default=None, ge=1, description="Rows read from each file or split; null: all.")
    epochs: int = Field(default=1, ge=1, description="Passes over it, before those over reward_model.source.")


class RewardModelSection(SftSection):
    """How a model that scores is trained, starting from the policy. Ranks, device and dtype are the `learner`
    section's."""

    kind: Kind = Field(
        default="preference",
        description="preference: comparisons; absolute: ratings; principle: comparisons by the principles of each "
        "record; process: labels of steps.",
    )
    source: str | None = Field(
        default=None,
        min_length=1,
        description="Labelled data: a file, a directory, a hub dataset, or generated:preferences, generated:ratings, "
        "generated:principles, generated:steps by the kind.",
    )
    limit: int | None = Field(default=None, ge=1, description="Rows read from each file or split; null: all.")
    held_out: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of the prompts held out where the data has no split of its own. 0.1: enough for an accuracy "
        "to a few percent from some thousands.",
    )
    pretrain: PretrainSection = Field(
        default_factory=PretrainSection, description="Cheap preferences that are learnt first."
    )
    epochs: int = Field(
        default=1, ge=1, description="Passes over the training records. 1: a second one over-fits (arXiv 2203.02155)."
    )
    batch_size: int = Field(
        default=32, ge=1, description="Records (comparisons, ratings, responses with steps) of one update, all ranks."
    )
    comparison_loss: Literal["all_pairs", "plackett_luce"] = Field(
        default="all_pairs",
        description="all_pairs: the mean of Bradley-Terry over the pairs of a comparison; plackett_luce: of its whole "
        "order. With two responses both are Bradley-Terry.",
    )
    rating_loss: Literal["bce", "mse"] = Field(
        default="bce", description="Of the sigmoid of the score against the rating: cross-entropy, or squared error."
    )
    centring: float = Field(
        default=0.0,
        ge=0,
        description="Times the squared sum of a comparison's scores, added to the loss: draws their mean to 0. 0.01: "
        "arXiv 2312.09244's. 0: preferences leave it open.",
    )
    label_range: tuple[float, float] = Field(
        default=(0.0, 1.0), description="The lowest and the highest rating of the data; learnt as 0 and 1."
    )
    label_weights: dict[str, float] = Field(
        default={},
        description="Weights of the labels of a rating that has several; below 0: a label that counts against.",
    )
    sampling: Literal["all", "over", "under"] = Field(
        default="all",
        description="Uneven ratings: over repeats the rarer strata up to the most frequent; under keeps of each at "
        "most reward_model.under_ratio times the rarest.",
    )
    under_ratio: float = Field(default=1.0, ge=1, description="For sampling: under. 1: all strata alike.")
    strata: int = Field(default=5, ge=2, description="Equal parts of the range of ratings. 5: a five-point scale.")
    balance: bool = Field(
        default=False, description="Weigh the loss so that every stratum (of steps: every label) counts the same."
    )
    other_language: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Factor of a paraphrase's rating where its language is not the response's.",
    )
    evaluations: int = Field(
        default=4, ge=1, description="Times an epoch that the held-out records are scored; the best weights are kept."
    )
    patience: int = Field(
        default=3,
        ge=0,
        description="Evaluations without a lower held-out loss before training stops. 0: it never stops early.",
    )
    probes: int = Field(
        default=64,
        ge=0,
        description="Held-out prompts that are probed with best, bad, irrelevant, meaningless answers.",
    )
    lora: LoraSection = Field(default_factory=LoraSection, description="Adapters, or all weights.")
    input_template: str = Field(
        default=CHAT,
        description="chat: the tokenizer's chat template; or a text with {prompt} and after it {response}.",
    )
    principle_template: str = Field(
        default=PRINCIPLE_TEMPLATE, description="Written after the response, with {principles}."
    )
    facts_template: str = Field(
        default=FACTS_TEMPLATE, description="Written before the last user message, with {facts}."
    )
    step_rule: StepRule = Field(default_factory=StepRule, description="Kind process: how a response is split.")
    max_tokens: int = Field(
        default=1024, ge=1, description="Longest input, in tokens; the model's own context counts where it is lower."
    )

    @property
    def shape(self) -> str:
        return SHAPES[self.kind]

    def format(self, context: int | None, *, facts: bool = False) -> ScorerFormat:
        """What scorer.json will say. `context`: positions of the model, where it is bounded; `facts`: whether the data
        has any."""
        return ScorerFormat(
            kind=self.kind,
            input_template=self.input_template,
            principle_template=self.principle_template,
            facts_template=self.facts_template,
            facts=facts,
            step_rule=self.step_rule if self.kind == "process" else None,
            output="probability" if self.kind == "absolute" else "logit",
            label_range=self.label_range if self.kind == "absolute" else None,
            max_tokens=min(self.max_tokens, context or self.max_tokens),
        )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.label_range[0] >= self.label_range[1]:
            raise ValueError(f"label_range: [lowest, highest], got {list(self.label_range)}")
        if self.kind != "absolute" and (self.sampling != "all" or self.label_weights):
            raise ValueError(f"sampling and label_weights are for kind absolute, and kind is {self.kind}")
        if self.centring and self.shape != "comparisons":
            raise ValueError(f"centring is for comparisons, and kind is {self.kind}")
        if self.balance and self.shape == "comparisons":
            raise ValueError(f"balance is for ratings and steps, and kind is {self.kind}")
        return self
