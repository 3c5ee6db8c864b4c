"""The scoring contract on the wire: what `POST /v1/rewards` takes and answers, and the closed list of failure codes.

Imports nothing of ours: the client imports this module alone. Requests are closed (an unknown field or a wrong type is
the request's fault, 422); answers may gain fields, so the client's side ignores those it does not know.

Invariant (design, 2): a failure is never a number. A component and a result are `ok` with a finite value or `failed`
with a code of `ErrorCode`, and nothing else can be constructed.

NaN: `NaN`, `Infinity` and numbers beyond float64 are not JSON, but Python's encoder writes them. In an attention
statistic they are taken for what they are, like `null` and the strings of `NotANumber`, and fail that item
(`non_finite_attention`); anywhere else they are a wrong type.
"""

import math
from enum import StrEnum
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Strict, Tag, field_validator, model_validator

T = TypeVar("T")
Many = Annotated[tuple[T, ...], Field(fail_fast=True)]
"""A list in a request. Only its first wrong entry is told: one for each of millions would take gigabytes."""

FailureKind = Literal["infra", "data"]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
NotANumber = Literal["NaN", "Infinity", "-Infinity", "nan", "inf", "-inf"]
Statistic = Annotated[Annotated[float, Strict()] | NotANumber | None, Field(union_mode="left_to_right")]


class ErrorCode(StrEnum):
    """Why an item, or one source of it, has no score."""

    # of the attention reward, in the order in which they are checked: `services.attention.failures`, by a test
    EMPTY_RESPONSE = "empty_response"
    NO_CONTENT_TOKENS = "no_content_tokens"
    LENGTH_MISMATCH = "length_mismatch"
    RAGGED_ROWS = "ragged_rows"
    INDEX_OUT_OF_RANGE = "index_out_of_range"
    DUPLICATE_POSITION = "duplicate_position"
    SALIENT_OUTSIDE_CONTENT = "salient_outside_content"
    INVALID_WEIGHTS = "invalid_weights"
    NON_FINITE_ATTENTION = "non_finite_attention"
    NEGATIVE_ATTENTION = "negative_attention"
    NO_ATTENTION_MASS = "no_attention_mass"
    MISSING_ATTENTION = "missing_attention"
    # of what else a source needs
    MISSING_RESPONSE = "missing_response"
    MISSING_RESPONSE_IDS = "missing_response_ids"
    MISSING_REFERENCE = "missing_reference"
    MISSING_PROMPT = "missing_prompt"
    MISSING_FACTS = "missing_facts"
    MISSING_PRINCIPLES = "missing_principles"
    INVALID_REFERENCE = "invalid_reference"
    NO_LETTERS = "no_letters"
    PATTERN_TIMEOUT = "pattern_timeout"
    # of a model: what it is fed, and what it says
    INPUT_TOO_LONG = "input_too_long"
    TEMPLATE_REFUSED = "template_refused"
    JUDGE_UNCLEAR = "judge_unclear"
    # of the result
    NON_FINITE_SCORE = "non_finite_score"
    # of the client's side: the server refuses an item of this size
    TOO_LARGE = "too_large"
    # of the service
    SOURCE_ERROR = "source_error"
    SOURCE_TIMEOUT = "source_timeout"
    # nobody was there to score, so that it says nothing of the item: no replica of the model lives, nobody listens at
    # another service's address
    SOURCE_DOWN = "source_down"
    # of another service that a source asks: it gave no usable answer, or it says itself that the item failed
    UPSTREAM_UNAVAILABLE = "upstream_unavailable"
    UPSTREAM_FAILED = "upstream_failed"


INFRA_CODES = frozenset(
    {ErrorCode.SOURCE_ERROR, ErrorCode.SOURCE_TIMEOUT, ErrorCode.SOURCE_DOWN, ErrorCode.UPSTREAM_UNAVAILABLE}
)
"""Codes of kind `infra`: the same item may well be scored elsewhere, or later. All others are of kind `data`."""


class Body(BaseModel):
    """A part of a request: immutable, strict in its types, closed to unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Answer(BaseModel):
    """A part of an answer: immutable; unknown fields of a newer server are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Message(Body):
    role: str
    content: str


class AttentionStatistics(Body):
    """T numbers each: M_t, C_t, E_t and X_t of the specification, and the sizes of the position sets."""

    mass: Many[Statistic]
    salient_mass: Many[Statistic]
    neg_entropy_sum: Many[Statistic]
    peak: Many[Statistic]
    salient_count: Annotated[int, Field(ge=0, lt=2**31)]
    content_count: Annotated[int, Field(ge=0, lt=2**31)]
    flags: Many[Annotated[str, Field(max_length=64)]] = Field((), max_length=32)


class AttentionRows(Body):
    """Dense rows [T][P], and positions in 0 .. P-1; `salient_weights` is aligned to `salient`."""

    rows: Many[Many[Statistic]]
    content: Many[int]
    salient: Many[int] = ()
    salient_weights: Many[Statistic] | None = None


STATISTICS_TAG = "<statistics>"
ROWS_TAG = "<rows>"


def _attention_form(value: Any) -> str:
    has_rows = "rows" in value if isinstance(value, dict) else isinstance(value, AttentionRows)
    return ROWS_TAG if has_rows else STATISTICS_TAG


AttentionBody = Annotated[
    Annotated[AttentionStatistics, Tag(STATISTICS_TAG)] | Annotated[AttentionRows, Tag(ROWS_TAG)],
    Discriminator(_attention_form),
]


class AttentionOptionsBody(Body):
    """Options of the attention reward that a request lays over the recipe's; null or absent: as in the recipe.

    Kept in step with `services.attention.options.AttentionOptions` by a test.
    """

    coverage_weight: FiniteFloat | None = None
    focus_weight: FiniteFloat | None = None
    repetition_weight: FiniteFloat | None = None
    spike_weight: FiniteFloat | None = None
    mass: Literal["raw", "renormalised"] | None = None
    focus_mass: Literal["raw", "renormalised"] | None = None
    per_token: bool | None = None
    normalised: bool | None = None
    repeat_count: Literal["types", "excess"] | None = None
    ngrams: Annotated[Many[Annotated[int, Field(ge=1, le=64)]], Field(min_length=1, max_length=16)] | None = None
    rate: bool | None = None
    entropy_floor: Annotated[FiniteFloat, Field(ge=0)] | None = None

    @field_validator("ngrams")
    @classmethod
    def _distinct(cls, ngrams: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if ngrams is not None and len(set(ngrams)) != len(ngrams):
            raise ValueError("n-gram lengths are distinct")
        return ngrams


class Item(Body):
    """One response to score. Which fields are needed is a matter of the source: what is missing fails the item.

    `id` comes back with the result; results are in the order of the items, and ids need not be unique. `text` is prompt
    and response in one, as a client renders them for a reward model of its own; it stands in the place of both.
    """

    id: Annotated[str, Field(max_length=512)]
    prompt: str | None = None
    messages: Many[Message] | None = None
    response: str | None = None
    text: str | None = None
    response_ids: Many[TokenId] | None = None
    eos_ids: Many[TokenId] = ()
    reference: str | None = None
    facts: Many[str] | None = None
    principles: Many[str] | None = None
    prompt_class: Annotated[str, Field(max_length=64)] | None = None
    attention: AttentionBody | None = None
    attention_options: AttentionOptionsBody | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if self.prompt is not None and self.messages is not None:
            raise ValueError("an item has either `prompt` or `messages`, not both")
        if self.text is not None and (self.prompt, self.messages, self.response) != (None, None, None):
            raise ValueError("an item has either `text` or prompt and response, not both")
        return self


class RewardRequest(Body):
    """`sources` absent or null: all that the server is configured with."""

    items: Many[Item]
    sources: Many[str] | None = Field(None, min_length=1)


class ItemError(Answer):
    code: ErrorCode
    kind: FailureKind
    message: str


def item_error(code: ErrorCode, message: str) -> ItemError:
    return ItemError(code=code, kind="infra" if code in INFRA_CODES else "data", message=message)


def _check_outcome(status: str, value: float | None, error: ItemError | None, name: str) -> None:
    if status == "ok":
        if value is None or not math.isfinite(value) or error is not None:
            raise ValueError(f"`ok` has a finite {name} and no error")
    elif value is not None or error is None:
        raise ValueError(f"`failed` has an error and no {name}")


class Component(Answer):
    """What one source says of one item. `principles` are those it judged by, in the words that the model read."""

    status: Literal["ok", "failed"]
    value: float | None = None
    detail: dict[str, float | int] = {}
    principles: tuple[str, ...] = ()
    error: ItemError | None = None

    @model_validator(mode="after")
    def _number_or_failure(self) -> Self:
        _check_outcome(self.status, self.value, self.error, "value")
        return self


class Result(Answer):
    """The recipe's combination of the components of one item."""

    id: str
    status: Literal["ok", "failed"]
    reward: float | None
    components: dict[str, Component]
    error: ItemError | None
    flags: tuple[str, ...] = ()
    detail: dict[str, float | int] = {}

    @model_validator(mode="after")
    def _number_or_failure(self) -> Self:
        _check_outcome(self.status, self.reward, self.error, "reward")
        return self


class SourceInfo(Answer):
    revision: str


class ServerInfo(Answer):
    """Who scored: a score is a function of the item and `recipe_revision` (design, invariant 8)."""

    version: str
    recipe_revision: str
    sources: dict[str, SourceInfo]
    latency_ms: float


class RewardResponse(Answer):
    results: tuple[Result, ...]
    server: ServerInfo


class FieldProblem(Answer):
    """`loc` is the path of the field in the request, `path` the same as text: `items[0].attention.mass[3]`."""

    loc: tuple[str | int, ...]
    path: str
    msg: str
    type: str


class Problem(Answer):
    code: str
    message: str


class ErrorResponse(Answer):
    """The body of every answer that is not 2xx; `detail` names the fields, for 422 and 413."""

    error: Problem
    detail: tuple[FieldProblem, ...] = ()


def failed_component(code: ErrorCode, message: str) -> Component:
    return Component(status="failed", error=item_error(code, message))
