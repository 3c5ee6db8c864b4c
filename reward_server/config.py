"""The `reward` section of a recipe: which sources score, how they are combined, and how the service behaves."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from reward_server.model_sources_config import AskingSource
from reward_server.sources_config import AttentionSource, Summand, SymbolicSource
from services.config_base import Section
from services.errors import UserError

SourceSection = Annotated[SymbolicSource | AskingSource, Field(discriminator="kind")]


class EnsembleSection(Summand):
    """Several sources as one: their values, shifted by their own constants, are reduced to one that is summed."""

    of: tuple[str, ...] = Field(min_length=2, description="Names of sources; they no longer count by themselves.")
    reduce: Literal["mean", "min", "quantile"] = Field(
        default="mean", description="Mean, lowest (the cautious choice), or a lower quantile of the values."
    )
    quantile: float = Field(
        default=0.25, ge=0, le=1, description="Of reduce: quantile; linear between neighbours, as numpy has it."
    )


class CrsSection(Section):
    """A preference and an absolute score side by side: weight * preference + (1 - weight) * absolute."""

    preference: str = Field(default="preference", description="Name of the preference source, or of an ensemble.")
    absolute: str = Field(default="absolute", description="Name of the absolute source, or of an ensemble.")
    weight: float = Field(
        default=0.5, ge=0, le=1, description="Of the preference; raw scores are averaged, as published."
    )


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


SourceName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]


def _default_sources() -> dict[str, SourceSection]:
    return {"attention": AttentionSource()}


class RewardSection(Section):
    """The reward server. Without a token it binds to loopback only."""

    sources: dict[SourceName, SourceSection] = Field(
        default_factory=_default_sources,
        min_length=1,
        description="Sources by name; each has a kind. Default: the attention reward as the paper has it.",
    )
    ensembles: dict[SourceName, EnsembleSection] = Field(
        default_factory=dict, description="Ensembles by name, of sources of this recipe."
    )
    crs: CrsSection | None = Field(
        default=None, description="Weights of a preference and an absolute source that add up to 1; null: their own."
    )
    disagreement: float | None = Field(
        default=None,
        gt=0,
        description="Standard deviation over the sources' shifted values above which a result is flagged "
        "sources_disagree; null: none is.",
    )
    interventions: str | None = Field(
        default=None,
        min_length=1,
        description="File of interventions (JSON lines, appended to by POST /v1/interventions); null: there are none.",
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
    concurrency: int | None = Field(
        default=None,
        ge=1,
        description="Requests scored at once. null: as many as are admitted where a source asks a model, as rows of "
        "many requests make its batches; else 2, as numpy scoring is bound by the processor.",
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

    @model_validator(mode="after")
    def _names_are_of_sources(self) -> Self:
        taken: dict[str, str] = {}
        for name, ensemble in self.ensembles.items():
            if name in self.sources:
                raise ValueError(f"ensembles.{name}: a source has that name already")
            for member in ensemble.of:
                if member not in self.sources:
                    raise ValueError(f"ensembles.{name}.of: {member} is no source; there are: {_names(self.sources)}")
                if member in taken:
                    raise ValueError(f"ensembles.{name}.of: {member} is in {taken[member]} already")
                taken[member] = name
        counting = [name for name in (*self.sources, *self.ensembles) if name not in taken]
        if self.crs is not None:
            for role in (self.crs.preference, self.crs.absolute):
                if role not in counting:
                    raise ValueError(f"crs: {role} is neither a source nor an ensemble; there are: {_names(counting)}")
            if self.crs.preference == self.crs.absolute:
                raise ValueError("crs: preference and absolute are two")
        return self

    def options_allowed(self) -> bool:
        """Whether `attention_options` of a request count."""
        if self.allow_options is not None:
            return self.allow_options
        return [source.kind for source in self.sources.values()] == ["attention"]

    def turns(self) -> int:
        """Requests scored at once."""
        if self.concurrency is not None:
            return self.concurrency
        asks = any(isinstance(source, AskingSource) for source in self.sources.values())
        return self.max_requests if asks else 2

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
        values: dict[str, Any] = {"sources": sources, "allow_options": self.options_allowed()}
        if self.ensembles:
            values["ensembles"] = {name: ensemble.model_dump(mode="json") for name, ensemble in self.ensembles.items()}
        if self.crs is not None:
            values["crs"] = self.crs.model_dump(mode="json")
        return digest(values)


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


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
