"""Sections of the configuration that say what the prompts are and which of their words count as salient."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from services.config_base import Section

GENERATED = ("generated:qa", "generated:instructions")

CLASS_NAME = r"^[a-z][a-z0-9_]{0,63}$"
"""What a class of prompts may be called: as in a set of principles."""


class Columns(Section):
    """Which column of the source holds what. A field left out is recognised by its usual names."""

    prompt: str | None = Field(
        default=None,
        description="column of the prompt: text, or a list of {role, content} messages; null: found by name",
    )
    messages: str | None = Field(
        default=None,
        description="column of a list of {role, content} messages; an assistant message at its end is the reference",
    )
    response: str | None = Field(
        default=None, description="column of the reference response (fine-tuning, exact match)"
    )
    id: str | None = Field(
        default=None,
        description="column of a unique id; null: a prompt is identified by its content, and equal prompts are one",
    )
    facts: str | None = Field(
        default=None, description="column of facts (a text or a list of texts) that judges are shown"
    )
    principles: str | None = Field(
        default=None, description="column of principles (a text or a list of texts) for judges"
    )
    prompt_class: str | None = Field(
        default=None,
        description="column of the prompt's class, such as reasoning or red_team: which principles weigh more for it",
    )
    keywords: str | None = Field(
        default=None, description="column of keywords (a text or a list of texts): salience.method keywords"
    )
    split: str | None = Field(
        default=None, description="column that says train, validation or test; null: `split` where it exists"
    )


class DataSection(Section):
    """Where prompts come from, how they are split, and how they are shown to the policy."""

    source: str = Field(
        default="generated:qa",
        min_length=1,
        description="a file, a directory, a dataset's name on the hub, generated:qa or generated:instructions; "
        "the generated questions need no network, so they are the default",
    )
    format: Literal["auto", "jsonl", "parquet", "datasets"] = Field(
        default="auto",
        description="how the source is read; auto: by the file's ending, else by what lies in the directory",
    )
    subset: str | None = Field(default=None, description="the configuration of a hub dataset that has several")
    revision: str | None = Field(default=None, description="the commit or tag of a hub dataset; null: its newest")
    split: Literal["auto", "own", "hash"] = Field(
        default="auto",
        description="own: the source's own train/validation/test; hash: by the hash of the prompt's id, so that "
        "a prompt "
        "stays in its split when others are added; auto: own where the source has one",
    )
    columns: Columns = Field(default=Columns(), description="which column holds what")
    template: str = Field(
        default="auto",
        description="auto: the tokenizer's chat template where it has one, else plain text; chat; none; or a text with "
        "{prompt} in it",
    )
    template_options: dict[str, Any] = Field(
        default={}, description="variables given to the chat template, such as enable_thinking or date_string"
    )
    system: str | None = Field(
        default=None, description="system message put before prompts that have none; needs a chat template"
    )
    prompt_class: str | None = Field(
        default=None,
        pattern=CLASS_NAME,
        description="class of the prompts whose row names none; null: the principle source goes by their words",
    )
    validation_fraction: float = Field(
        default=0.1, ge=0, lt=1, description="share held out for validation (the paper's 80/10/10)"
    )
    test_fraction: float = Field(
        default=0.1, ge=0, lt=1, description="share held out for the final test (the paper's 80/10/10)"
    )
    too_long: Literal["fail", "truncate"] = Field(
        default="fail",
        description="a prompt of more than max_prompt_tokens ends the run before it starts, or loses the "
        "beginning of its "
        "last user message; nothing is dropped without a word",
    )
    max_prompt_tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens of a rendered prompt; null: what the model's context leaves beside the response",
    )
    limit: int | None = Field(default=None, ge=1, description="rows read from each file or split; null: all")
    seed: int = Field(
        default=0,
        ge=0,
        description="of the generated corpora and of the split by hash; apart from run.seed, so that runs with "
        "different "
        "seeds share their held-out prompts",
    )

    @field_validator("template")
    @classmethod
    def _template(cls, value: str) -> str:
        if value not in ("auto", "chat", "none") and value.count("{prompt}") != 1:
            raise ValueError(f"{value!r} is not auto, chat, none or a text with {{prompt}} in it once")
        return value

    @field_validator("source")
    @classmethod
    def _source(cls, value: str) -> str:
        if value.startswith("generated:") and value not in GENERATED:
            raise ValueError(f"{value!r} is not one of {', '.join(GENERATED)}")
        return value

    @model_validator(mode="after")
    def _fractions(self) -> "DataSection":
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction + test_fraction leave nothing to train on: their sum must be below 1")
        return self


class SalienceSection(Section):
    """Which positions of the prompt are content, and which of those are salient (specification of the reward, S and
    I)."""

    method: Literal["idf", "keywords", "entities", "all"] = Field(
        default="idf",
        description="idf: the words that are rarest among the training prompts (the paper); keywords: from this "
        "section and "
        "the prompt's own; entities: named entities (extra `entities`); all: every content position",
    )
    top_k: int = Field(
        default=3, ge=1, description="words chosen by idf; 3 are the content words of a question of 5 to 20 tokens"
    )
    keywords: tuple[str, ...] = Field(
        default=(), description="words or phrases that are salient in every prompt that has them"
    )
    content: Literal["all", "user", "all_user"] = Field(
        default="all",
        description="all positions (the specification's default); user: the last user message; all_user: every "
        "user message. "
        "Recipes for decoder-only policies use user: special tokens act as attention sinks",
    )
    weights: Literal["uniform", "idf"] = Field(
        default="uniform",
        description="weight of a salient position before it is scaled to mean 1 (the specification's default is 1)",
    )
    entity_model: str = Field(
        default="en_core_web_sm", description="spaCy pipeline that finds the entities; its smallest English one"
    )

    @field_validator("keywords")
    @classmethod
    def _keywords(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not word.strip() for word in value):
            raise ValueError("a keyword is empty")
        return value
