"""The `reward` section of a recipe: which sources score, how they are combined, and how the service behaves."""

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_serializer, model_validator

from services.attention.options import PRESETS, AttentionOptions
from services.config_base import Section
from services.errors import UserError

Weight = Annotated[float, Field(allow_inf_nan=False)]


class SourceBase(Section):
    """What every source has: its part in the combination, `weight * clip(scale * value + offset)`."""

    weight: Weight = Field(default=1.0, description="Factor of this source in the combined reward; may be negative.")
    required: bool = Field(
        default=True,
        description="A required source that failed fails the item; an optional one is left out and flagged.",
    )
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


SourceSection = Annotated[
    AttentionSource | LengthSource | RepetitionSource | ExactMatchSource, Field(discriminator="kind")
]


class WorkerSection(Section):
    """The scoring worker: stream -> HTTP -> stream."""

    url: str | None = Field(
        default=None,
        pattern=r"^https?://[^\s@]+$",
        description="A reward server outside the run, http(s)://host:port, without a password: its token comes from "
        "reward.token_env. null: the run starts its own from this section.",
    )
    workers: int = Field(default=1, ge=1, description="Scoring workers of a run, each a reader of the stream.")
    groups: int = Field(default=8, ge=1, description="Groups read from the stream at a time.")
    batch_items: int = Field(default=64, ge=1, description="Most items of one HTTP request.")
    timeout_s: float = Field(default=30.0, gt=0, description="Deadline of one HTTP request, in seconds.")
    retries: int = Field(default=3, ge=0, description="Further tries of a request after an infra failure.")
    backoff_s: float = Field(default=0.2, gt=0, description="First pause between tries, s; doubles, with jitter, to 5.")
    outage_s: float = Field(
        default=120.0,
        gt=0,
        description="Seconds without one success after which the run ends and says what did not answer.",
    )
    block_ms: int = Field(default=500, ge=1, description="How long one read of the stream waits, in milliseconds.")
    min_idle_ms: int = Field(
        default=300_000,
        ge=1000,
        description="Idle time after which another worker's entry is taken over; above outage_s.",
    )
    infra_budget: int = Field(
        default=8, ge=0, description="Failures of kind infra that a group may have before it is failed."
    )
    data_budget: int = Field(
        default=1,
        ge=0,
        description="Failures of kind data before a group is failed; small, as the same data fails again.",
    )

    @model_validator(mode="after")
    def _takes_over_late(self) -> Self:
        if self.min_idle_ms <= self.outage_s * 1000:
            raise ValueError(f"min_idle_ms ({self.min_idle_ms}) must be above outage_s ({self.outage_s:g} s)")
        return self


class AdaptersSection(Section):
    """How other clients' wire formats are read; docs/reward-server.md has their routes."""

    split_at: str | None = Field(
        default=None,
        min_length=1,
        description="What stands before the response where a client sends prompt and response as one text (verl, TEI), "
        "for example the chat template's start of the assistant's turn; the last one counts. null: such a text is "
        "scored as it is, by sources that take one.",
    )
    end_texts: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>", "<eos>", "</s>"),
        description="Texts of end-of-sequence tokens, taken off the end of a response: OpenRLHF and chat templates "
        "leave them there.",
    )


def _default_sources() -> dict[str, SourceSection]:
    return {"attention": AttentionSource()}


class RewardSection(Section):
    """The reward server. Without a token it binds to loopback only."""

    sources: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")], SourceSection] = Field(
        default_factory=_default_sources,
        min_length=1,
        description="Sources by name; each has a kind. Default: the attention reward as the paper has it.",
    )
    allow_options: bool | None = Field(
        default=None,
        description="Whether attention_options of a request count. null: only where attention is the single source, as "
        "a run's score must be a function of its recipe.",
    )
    host: str = Field(default="127.0.0.1", description="Address to bind. Any but loopback needs a token.")
    port: int = Field(
        default=0, ge=0, le=65535, description="Port; 0: a free one (in runs). The command's default is 8077."
    )
    token_env: str = Field(
        default="ATTUNE_REWARD_TOKEN", description="Environment variable that holds the bearer token."
    )
    keys_file: Path | None = Field(
        default=None,
        description="File of API keys with names and limits, written by `attune reward-key`; they hold beside the "
        "token of token_env. null: the token alone.",
    )
    max_bytes: int = Field(default=16 * 2**20, ge=1024, description="Largest body, in bytes: 413 above. Bounds memory.")
    max_items: int = Field(default=1024, ge=1, description="Most items of a request: 413 above.")
    max_text_chars: int = Field(
        default=262_144,
        ge=1,
        description="Longest text of an item (a prompt with its messages, a response, a reference, one fact), in "
        "characters: 413 above.",
    )
    max_tokens: int = Field(
        default=131_072,
        ge=1,
        description="Most tokens of a response: of response_ids, and rows or statistics of the attention: 413 above.",
    )
    concurrency: int = Field(
        default=2, ge=1, description="Requests scored at once; numpy scoring is bound by the processor."
    )
    max_requests: int = Field(
        default=64,
        ge=1,
        description="Requests admitted at once, scored and waiting: 429 above. Bounds memory with max_bytes.",
    )
    queue_timeout_s: float = Field(
        default=10.0, gt=0, description="Longest wait of an admitted request for its turn, in seconds: 429 after."
    )
    retry_after_s: int = Field(default=1, ge=1, description="Retry-After of a 429 or 503, in seconds.")
    idempotency_window_s: float = Field(
        default=300.0, gt=0, description="How long an answer is kept for its Idempotency-Key, in seconds."
    )
    idempotency_bytes: int = Field(
        default=64 * 2**20,
        ge=0,
        description="Most bytes of answers that are kept for idempotency keys; the oldest go first.",
    )
    body_timeout_s: float = Field(
        default=30.0, gt=0, description="Deadline for the arrival of a body, in seconds: 408 after."
    )
    source_timeout_s: float = Field(
        default=20.0,
        gt=0,
        description="Deadline of one source for one request, in seconds; its items then fail as infra.",
    )
    ready_timeout_s: float = Field(
        default=5.0, gt=0, description="Deadline of the item that /readyz scores, in seconds."
    )
    stalled_s: float = Field(
        default=60.0,
        gt=0,
        description="How long a source may fail every request before /readyz says so, in seconds, whatever it makes of "
        "the built-in item.",
    )
    drain_s: int = Field(
        default=20, ge=1, description="How long requests under way may take after SIGTERM, in seconds; then they end."
    )
    log_level: Literal["info", "warning"] = Field(
        default="info", description="`attune reward-server` logs JSON lines: info has one for each request."
    )
    adapters: AdaptersSection = Field(
        default=AdaptersSection(), description="How other clients' wire formats are read."
    )
    worker: WorkerSection = Field(default=WorkerSection(), description="The scoring worker of a run.")

    def options_allowed(self) -> bool:
        """Whether `attention_options` of a request count."""
        if self.allow_options is not None:
            return self.allow_options
        return [source.kind for source in self.sources.values()] == ["attention"]

    def token(self) -> str | None:
        """The bearer token of the environment variable `token_env`, or None where it is not set.

        Raises UserError where it is set and empty, which is a mistake.
        """
        token = os.environ.get(self.token_env)
        if token is not None and not token.strip():
            raise UserError(f"{self.token_env} is empty: give it the bearer token, or unset it")
        return None if token is None else token.strip()

    def worker_token(self) -> str | None:
        """The token that the scoring workers send to the server of `worker.url`; None where the run starts its own."""
        return None if self.worker.url is None else self.token()

    def recipe_revision(self) -> str:
        """What scores depend on, as 16 hexadecimal digits: the resolved sources, and whether requests change them."""
        sources = {name: resolved_source(source) for name, source in self.sources.items()}
        return digest({"sources": sources, "allow_options": self.options_allowed()})


def resolved_source(source: SourceSection) -> dict[str, Any]:
    """A source with its presets resolved, as JSON values."""
    values = source.model_dump(mode="json")
    if isinstance(source, AttentionSource):
        del values["preset"]
        values["options"] = source.resolved().model_dump(mode="json")
    return values


def digest(value: Any) -> str:
    """BLAKE2b-64 of the canonical JSON of a value, in hexadecimal."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(canonical.encode(), digest_size=8).hexdigest()
