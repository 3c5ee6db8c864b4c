"""Sources of score that ask a model, here or behind an address of the operator, as a recipe configures them."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from reward_server.runner import ModelEngine
from reward_server.sources_config import SourceBase, Weight
from services.config_base import Section
from services.scoring_format import StepRule

Url = Annotated[str, Field(pattern=r"^https?://[^\s@]+$")]


class PlacedSource(SourceBase):
    """Where the model of a source lives: in a run in actors of its own, in a server alone in processes of its own."""

    replicas: int = Field(default=1, ge=1, description="Actors or processes that hold this model, each a copy.")
    threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads of each. null: in a run as many as cpus, at least one; in a server alone the cores "
        "shared out among all replicas of all models.",
    )
    cpus: float = Field(default=0.25, ge=0, description="In a run: CPUs that Ray reserves for each.")
    gpus: float = Field(
        default=0.0,
        ge=0,
        description="GPUs for each: in a run reserved by Ray, in a server alone shared out of those it sees; a share "
        "below 1 is of one that others use too. 0: none of its own; `device` says which is used.",
    )
    restarts: int = Field(
        default=3,
        ge=0,
        description="How often in a row a replica that died is started again; five minutes of life give them back. "
        "Its requests go to another or fail as infra.",
    )


class ModelSource(PlacedSource):
    """A model of a directory or the hub, from safetensors. Its `scorer.json` says how it is fed;
    what is given here lies over it."""

    model: str = Field(min_length=1, description="Directory or hub name of the model; a directory of that name wins.")
    model_revision: str | None = Field(
        default=None, description="Branch, tag or commit of a hub model; null: its main branch."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Of the weights; float32 keeps scores apart from their batch to 1e-5."
    )
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: the first GPU where there is one."
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Longest input, in tokens; null: what scorer.json and the model allow.",
    )
    batch_tokens: int = Field(
        default=8192, ge=1, description="Tokens of one forward, padding included; a longer input runs alone."
    )
    batch_wait_ms: float = Field(
        default=5.0, ge=0, description="Longest wait of an input for company from other requests, in milliseconds."
    )
    input_template: str | None = Field(
        default=None,
        description="chat, or a text with {prompt} before {response}; null: scorer.json's, else the chat template.",
    )
    strip_bos: bool | None = Field(
        default=None,
        description="Keep one beginning-of-sequence token where template and tokenizer both write one; null: "
        "scorer.json's, else true.",
    )


class MayShowFacts(Section):
    """Of a source whose model is shown facts where it was trained so."""

    facts: bool | None = Field(
        default=None,
        description="Write the item's facts, where it has any, before the last user message; null: scorer.json's, "
        "which says whether training showed facts.",
    )


class SequenceSource(ModelSource):
    """A model with one number for the whole input."""

    output: Literal["logit", "probability"] | None = Field(
        default=None,
        description="The raw logit, or its sigmoid; null: scorer.json's, else logit, as bounded scores flatten the "
        "signal (Khan 2024).",
    )


class PreferenceSource(MayShowFacts, SequenceSource):
    """A reward model trained on comparisons: the raw logit."""

    kind: Literal["preference"] = "preference"


class AbsoluteSource(MayShowFacts, SequenceSource):
    """A model of rated quality, trained with a sigmoid head on ratings mapped to [0, 1]."""

    kind: Literal["absolute"] = "absolute"


class FactsSource(SequenceSource):
    """A reward model that is shown facts before the user's message (LLaVA-RLHF, arXiv 2309.14525)."""

    kind: Literal["facts"] = "facts"
    facts_template: str | None = Field(
        default=None, description="Text with {facts}, written before the last user message; null: scorer.json's."
    )
    correctness_penalty: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Taken off where the item has a reference whose words do not stand in the response in a row.",
    )


class PrincipleSource(MayShowFacts, SequenceSource):
    """A reward model that judges by principles in its input, after the response (SALMON, arXiv 2310.05910)."""

    kind: Literal["principle"] = "principle"
    principle_template: str | None = Field(
        default=None, description="Text with {principles}, written after the response; null: scorer.json's."
    )
    principles: str | None = Field(
        default="rl",
        description="Set to draw from for items without principles of their own: rl, training, or a YAML file; null: "
        "such items fail.",
    )
    count: int = Field(default=3, ge=1, le=64, description="Principles drawn for an item (SALMON: 3).")
    negated: float = Field(
        default=0.0, ge=0, le=1, description="Probability that a drawn principle is put in its negated words."
    )
    seed: int = Field(default=0, ge=0, description="Of the draw, with the item's id and the revision of the set.")
    interventions: bool = Field(
        default=True, description="Put interventions (reward.interventions) before the principles of every item."
    )


class ProcessSource(MayShowFacts, ModelSource):
    """A verifier of steps: the probability that each step of the response is correct, aggregated."""

    kind: Literal["process"] = "process"
    step_rule: StepRule | None = Field(
        default=None, description="How the response is split; null: scorer.json's, else lines."
    )
    aggregate: Literal["min", "product", "last", "log_sum", "correct_steps", "outcome_and_process"] = Field(
        default="min",
        description="Of the steps' probabilities: lowest, product, the last one's, sum of logs, number of steps that "
        "are correct at `threshold`, or outcome_weight * last + (1 - outcome_weight) * lowest.",
    )
    outcome_weight: float = Field(
        default=0.5, ge=0, le=1, description="Of the last step's probability in outcome_and_process."
    )
    neutral: float = Field(
        default=1.0, ge=0, le=1, description="Share of the label neutral's probability that counts as correct."
    )
    threshold: float = Field(default=0.5, ge=0, le=1, description="Probability from which a step counts as correct.")


class PerplexitySource(ModelSource):
    """Mean negative log-likelihood of the response, nats a token, under a frozen causal language model."""

    kind: Literal["perplexity"] = "perplexity"
    weight: Weight = Field(
        default=-1.0, description="Factor of this source in the combined reward; negative: likely text is rewarded."
    )


COMPARE = (
    "Two answers to the same conversation follow. Say which one is better.\n{principles}\n"
    "Conversation:\n{prompt}\n\nAnswer (A):\n{first}\n\nAnswer (B):\n{second}\n\n"
    "Reply with the letter of the better answer, (A) or (B), and nothing else."
)
RATE = (
    "Rate an answer to a conversation on a scale from {lowest} (poor) to {highest} (excellent).\n{principles}\n"
    "Conversation:\n{prompt}\n\nAnswer:\n{response}\n\n"
    "Reply with the number alone."
)


class JudgeSource(PlacedSource):
    """A language model that compares the response with the reference, or rates it."""

    kind: Literal["judge"] = Field(default="judge", description="Which source this is.")
    mode: Literal["compare", "rate"] = Field(
        default="compare",
        description="compare: log-odds that the response is better than the reference, over both orders; rate: "
        "expected value of the rating.",
    )
    rubric: str | None = Field(
        default=None,
        description="What the judge is asked: a text with {prompt}, {principles} and, to compare, {first} and "
        "{second}, to rate, {response}, {lowest}, {highest}; {reference} may stand in it. null: a plain one.",
    )
    principles: tuple[str, ...] = Field(
        default=(), description="Principles for {principles} where the item has none of its own."
    )
    lowest: int = Field(default=1, ge=0, le=8, description="Lowest rating.")
    highest: int = Field(default=5, ge=1, le=9, description="Highest rating; one digit.")
    output: Literal["logit", "probability"] = Field(
        default="logit", description="To compare: the log-odds, or their sigmoid."
    )
    min_mass: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Probability that the judge must give to its allowed answers together; below, judge_unclear.",
    )
    model: str = Field(min_length=1, description="Directory or hub name; with `url`, the model's name there.")
    model_revision: str | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Of the weights.")
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: the first GPU where there is one."
    )
    max_tokens: int | None = Field(default=None, ge=1, description="Longest input, in tokens; of a model here.")
    batch_tokens: int = Field(default=8192, ge=1, description="Tokens of one forward, padding included.")
    batch_wait_ms: float = Field(
        default=5.0, ge=0, description="Longest wait of an input for company from other requests, in milliseconds."
    )
    answer_prefix: str = Field(
        default="(", description="What the judge's answer begins with, of a model here: the letter or digit is next."
    )
    engine: ModelEngine = Field(
        default="transformers",
        description="What runs a model here. vllm: batches of its own, and a cache of common beginnings.",
    )
    kv_cache_mib: int | None = Field(
        default=None,
        ge=1,
        description="vllm: memory of the KV cache (MiB); null: 1 GiB on a CPU, on GPUs what vLLM finds free: set it "
        "where the GPU is shared.",
    )
    url: Url | None = Field(
        default=None,
        description="An OpenAI-compatible endpoint, http(s)://host:port/v1, without a password; null: the model runs "
        "here.",
    )
    key_env: str | None = Field(default=None, description="Environment variable with the endpoint's key.")
    timeout_s: float = Field(default=20.0, gt=0, description="Deadline of one call of the endpoint, in seconds.")
    concurrency: int = Field(default=8, ge=1, description="Most calls of the endpoint at once.")
    retries: int = Field(default=2, ge=0, description="Further tries of a call after an infra failure.")

    @model_validator(mode="after")
    def _a_judge_that_can_answer(self) -> Self:
        if self.engine == "vllm" and self.url is not None:
            raise ValueError("engine: vllm runs the model here, and url says that it runs elsewhere: give one of them")
        if self.engine == "vllm" and self.device != "auto":
            raise ValueError(
                f"device: {self.device}: vLLM takes the devices that its process sees; only auto is allowed"
            )
        if self.lowest >= self.highest:
            raise ValueError(f"lowest ({self.lowest}) must be below highest ({self.highest})")
        needed = ("first", "second") if self.mode == "compare" else ("response",)
        missing = [place for place in needed if f"{{{place}}}" not in self.text()]
        if missing:
            raise ValueError(f"rubric: {self.mode} needs {{{missing[0]}}} in it")
        return self

    def text(self) -> str:
        """The rubric, or the plain one of the mode."""
        return self.rubric or (COMPARE if self.mode == "compare" else RATE)


class ExternalSource(SourceBase):
    """Another service that scores, at an address of the operator."""

    kind: Literal["external"] = "external"
    url: Url = Field(
        description="native: http(s)://host:port; openrlhf: the whole address; vllm: http(s)://host:port, asked at "
        "/score. Without a password."
    )
    format: Literal["native", "openrlhf", "vllm"] = Field(
        default="native", description="This server's /v1/rewards, OpenRLHF's remote_rm_url, or vLLM's /score."
    )
    sources: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="native: the other server's sources; null: all of them."
    )
    model: str | None = Field(default=None, description="vllm: the served model's name.")
    key_env: str | None = Field(default=None, description="Environment variable with the bearer token.")
    timeout_s: float = Field(default=15.0, gt=0, description="Deadline of one try, in seconds.")
    retries: int = Field(default=2, ge=0, description="Further tries after an infra failure.")
    service_revision: str = Field(
        default="1", min_length=1, description="Of the other service: raise it when that one changes."
    )

    @field_validator("url")
    @classmethod
    def _no_trailing_slash(cls, url: str) -> str:
        return url.rstrip("/")

    @model_validator(mode="after")
    def _vllm_names_its_model(self) -> Self:
        if self.format == "vllm" and self.model is None:
            raise ValueError("format vllm needs model, the served model's name")
        return self


LocalModelSource = PreferenceSource | AbsoluteSource | FactsSource | PrincipleSource | ProcessSource | PerplexitySource
AnySequenceSource = PreferenceSource | AbsoluteSource | FactsSource | PrincipleSource
AskingSource = LocalModelSource | JudgeSource | ExternalSource
"""Sources whose revision is more than the recipe says: of files, of interventions, of another service."""
