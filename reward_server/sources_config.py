"""Sources of score that compute on the item alone, as a recipe configures them, and what every source has."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_serializer, model_validator

from services.attention.options import PRESETS, AttentionOptions
from services.config_base import Section

Weight = Annotated[float, Field(allow_inf_nan=False)]


class Summand(Section):
    """The part of a value in the combination, `weight * clip(scale * value + offset)`."""

    weight: Weight = Field(default=1.0, description="Factor of this source in the combined reward; may be negative.")
    offset: Weight = Field(default=0.0, description="Added to the scaled value; a constant of the recipe.")
    scale: Weight = Field(default=1.0, description="Multiplies the source's value, before the offset.")
    clip: tuple[Weight, Weight] | None = Field(
        default=None, description="[lowest, highest] of scale * value + offset; null: not clipped."
    )

    @model_validator(mode="after")
    def _clip_is_an_interval(self) -> Self:
        if self.clip is not None and self.clip[0] > self.clip[1]:
            raise ValueError(f"clip must be [lowest, highest], got {list(self.clip)}")
        return self


class SourceBase(Summand):
    """What every source has."""

    required: bool = Field(
        default=True,
        description="A required source that failed fails the item; an optional one is left out and flagged.",
    )


class AttentionSource(SourceBase):
    """The attention reward of the specification (CAGSR, arXiv 2502.10482)."""

    kind: Literal["attention"] = "attention"
    preset: Literal["paper", "comparable"] = Field(
        default="paper", description="Options to start from: the paper's, or all terms on comparable scales."
    )
    options: AttentionOptions = Field(
        default=AttentionOptions(), description="Options laid over the preset: only those that are given count."
    )

    @field_serializer("options")
    def _only_what_was_given(self, options: AttentionOptions) -> dict[str, Any]:
        """A saved recipe must resolve to the same: a default written down would count as given, over the preset."""
        return options.model_dump(exclude_unset=True)

    def resolved(self) -> AttentionOptions:
        """The preset with the given options laid over it."""
        given = self.options.model_dump(exclude_unset=True)
        return AttentionOptions.model_validate({**PRESETS[self.preset].model_dump(), **given})


class LengthSource(SourceBase):
    """bonus * min(n, target) / target - penalty * max(0, n - target) / target, for a response of n units."""

    kind: Literal["length"] = "length"
    unit: Literal["tokens", "words", "characters"] = Field(
        default="tokens", description="What is counted. Tokens: response_ids without a trailing end-of-sequence token."
    )
    target: int = Field(
        default=64, ge=1, description="Length, in units, up to which the bonus grows and past which it costs."
    )
    bonus: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="Value at the target; grows linearly from 0."
    )
    penalty: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="Taken off for every further `target` units past the target.",
    )


class RepetitionSource(SourceBase):
    """Minus the number of repeated n-grams, as in the `repeat` term of the attention reward."""

    kind: Literal["repetition"] = "repetition"
    unit: Literal["tokens", "words"] = Field(
        default="tokens", description="Over response_ids, or over lower-cased words."
    )
    ngrams: tuple[Annotated[int, Field(ge=1, le=64)], ...] = Field(
        default=(2, 3),
        min_length=1,
        max_length=16,
        description="Lengths of the n-grams, the specification's default.",
    )
    repeat_count: Literal["types", "excess"] = Field(
        default="excess", description="Count repeated n-grams once each (types) or every repetition (excess)."
    )
    rate: bool = Field(
        default=True, description="Divide by the number of n-grams, so that long responses are comparable."
    )


class ExactMatchSource(SourceBase):
    """1 where the response equals the item's reference, else 0."""

    kind: Literal["exact_match"] = "exact_match"
    normalise: Literal["none", "whitespace", "words"] = Field(
        default="words",
        description="Compared as they are; without regard to white space; or as the sequence of lower-cased words, "
        "without punctuation.",
    )


class NumericMatchSource(SourceBase):
    """1 where the response's number is the reference's within a tolerance, else 0; 0 where it has none."""

    kind: Literal["numeric_match"] = "numeric_match"
    which: Literal["last", "first", "only"] = Field(
        default="last",
        description="Which number of the response counts; only: a response with several is wrong. Of the reference "
        "it is the last.",
    )
    absolute: float = Field(
        default=1e-6, ge=0, allow_inf_nan=False, description="|response - reference| that is still a match."
    )
    relative: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="Added to it: this share of |reference|."
    )


class PatternSource(SourceBase):
    """1 where the response has the form of a pattern, else 0."""

    kind: Literal["pattern"] = "pattern"
    pattern: str = Field(
        min_length=1, max_length=10_000, description="Regular expression, in the syntax of the package `regex`."
    )
    match: Literal["full", "search"] = Field(
        default="full", description="The whole response has the form, or some part of it."
    )
    timeout_s: float = Field(
        default=0.1,
        gt=0,
        le=10,
        description="Longest time for one response, in seconds: pattern_timeout after; bounds what a pattern that "
        "backtracks can take.",
    )


class LanguageSource(SourceBase):
    """Share of the response's letters whose script is one of the prompt's; by Unicode scripts, without a model."""

    kind: Literal["language"] = "language"
    prompt_share: float = Field(
        default=0.2, gt=0, le=1, description="Share of the prompt's letters that makes a script one of the prompt's."
    )
    threshold: float | None = Field(
        default=0.8, gt=0, le=1, description="The value is 1 from this share on and 0 below; null: the share itself."
    )


SymbolicSource = (
    AttentionSource
    | LengthSource
    | RepetitionSource
    | ExactMatchSource
    | NumericMatchSource
    | PatternSource
    | LanguageSource
)
