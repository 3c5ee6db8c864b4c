"""How attention statistics become a reward: the options of the specification, under the names that users meet.

The terms: coverage (how much attention goes to the salient tokens), focus (minus the entropy of the attention on the
prompt), repeat (repeated n-grams), spike (rows sharper than a floor). `reward.py` has the formulas.
Source: Kiruluta, Lemos, Burity, "A Self-Supervised Reinforcement Learning Approach for Fine-Tuning Large Language
Models Using Cross-Attention Signals" (CAGSR), arXiv 2502.10482.
"""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from services.config_base import Section

Weight = Annotated[float, Field(allow_inf_nan=False)]


class AttentionOptions(Section):
    """Weights and forms of the terms. The defaults are the paper's; `PRESETS` names the two usual choices."""

    coverage_weight: Weight = Field(default=1.0, description="factor of coverage; alpha of the paper, its value 1.0")
    focus_weight: Weight = Field(default=0.5, description="factor of focus; beta of the paper, its value 0.5")
    repetition_weight: Weight = Field(
        default=1.0, description="factor of repeat, subtracted; gamma of the paper, its value 1.0"
    )
    spike_weight: Weight = Field(default=0.0, description="factor of spike, subtracted; 0 (off), the paper has none")
    mass: Literal["raw", "renormalised"] = Field(
        default="raw",
        description="coverage counts attention as it is (the paper's form: it sees a response that ignores "
        "its prompt), or as a share of the attention on the content",
    )
    focus_mass: Literal["renormalised", "raw"] = Field(
        default="renormalised",
        description="focus is of the row as a distribution over the content, or of the paper's sum as printed, "
        "which falls when the model ignores its prompt",
    )
    per_token: bool = Field(
        default=True, description="divide coverage by the number of salient tokens, as the paper does"
    )
    normalised: bool = Field(
        default=False,
        description="divide focus and spike by the log of the number of content tokens; the paper does not",
    )
    repeat_count: Literal["types", "excess"] = Field(
        default="types",
        description="count the distinct n-grams that occur more than once (the paper), or every repeated occurrence",
    )
    ngrams: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(2, 3), min_length=1, description="lengths of the n-grams of repeat, in tokens; the paper's 2 and 3"
    )
    rate: bool = Field(default=False, description="divide repeat by the number of n-grams; the paper does not")
    entropy_floor: Weight = Field(
        default=0.0,
        ge=0,
        description="nats below which sharper attention earns no more focus and counts as spike; 0: no floor",
    )

    @field_validator("ngrams")
    @classmethod
    def _distinct(cls, ngrams: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(ngrams)) != len(ngrams):
            raise ValueError(f"n-gram lengths are distinct, got {list(ngrams)}")
        return ngrams


PRESETS: dict[str, AttentionOptions] = {
    "paper": AttentionOptions(),
    "comparable": AttentionOptions(per_token=False, normalised=True, repeat_count="excess", rate=True),
}
"""`paper`: the published weights and forms. `comparable`: all terms on comparable scales."""
