"""What all sources with a model of their own share: loading, encoding in a thread, rows through one micro-batcher."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, TypeVar

from reward_server.batching import MicroBatcher
from reward_server.model_sources_config import JudgeSource, ModelSource
from reward_server.placement import model_spec
from reward_server.runner import ModelFacts, ModelRunner, Output, Row, load_model
from reward_server.schema import ErrorCode, Item
from reward_server.scorers.base import ItemFailure, Scored, failed
from services.errors import UserError
from services.scoring_format import CHAT, Example, InputTooLong, ScorerFormat, TemplateRefused

T = TypeVar("T")


@dataclass(frozen=True)
class Loaded:
    """A model's tokenizer, and the queue of the model itself."""

    tokenizer: Any
    batcher: MicroBatcher
    lock: threading.Lock = field(default_factory=threading.Lock)
    """A fast tokenizer is not to be used by two threads at once: it refuses to be borrowed twice."""

    @property
    def facts(self) -> ModelFacts:
        return self.batcher.runner.facts

    def encoded(self, encode: Callable[..., T], form: ScorerFormat, example: Example) -> T:
        """What a function of `services.scoring_format` gives; its errors as failures of the item."""
        try:
            with self.lock:
                return encode(self.tokenizer, form, example, self.facts.max_tokens)
        except InputTooLong as error:
            raise ItemFailure(ErrorCode.INPUT_TOO_LONG, str(error)) from error
        except TemplateRefused as error:
            raise ItemFailure(ErrorCode.TEMPLATE_REFUSED, str(error)) from error


def load(name: str, source: ModelSource | JudgeSource, runner: ModelRunner | None = None) -> Loaded:
    """The model of a source. `runner`: one that lives elsewhere; None loads it into this process.

    Raises UserError for what an operator can get wrong, a missing package among it.
    """
    spec = model_spec(name, source)
    try:
        transformers: Any = import_module("transformers")
        running: ModelRunner = runner or load_model(spec)
    except ImportError as error:
        raise UserError(f"{spec.field}: a model needs torch and transformers: pip install 'attune[cpu]'") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source.model, revision=source.model_revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{spec.field}.model: {source.model} has no tokenizer that can be loaded") from error
    batcher = MicroBatcher(running, tokens=source.batch_tokens, wait_s=source.batch_wait_ms / 1000, name=name)
    return Loaded(tokenizer, batcher)


def limited(name: str, loaded: Loaded, form: ScorerFormat, source: ModelSource) -> ScorerFormat:
    """The format with the longest input that recipe, tokenizer and model allow (the model's own is laid on later).

    Raises UserError where the tokenizer cannot write what the format asks for.
    """
    if form.input_template == CHAT and getattr(loaded.tokenizer, "chat_template", None) is None:
        raise UserError(
            f"reward.sources.{name}.input_template: {source.model} has no chat template: give a text with {{prompt}} "
            "and {response}"
        )
    if form.kind == "process" and not getattr(loaded.tokenizer, "is_fast", False):
        raise UserError(f"reward.sources.{name}.model: {source.model} has no tokenizer with offsets (a fast one)")
    limits = [form.max_tokens]
    if source.max_tokens is not None:
        limits = [source.max_tokens]
    known: Any = getattr(loaded.tokenizer, "model_max_length", None)
    if isinstance(known, int) and known < 10**6:  # transformers writes a huge number where nothing bounds it
        limits.append(known)
    return form.model_copy(update={"max_tokens": min(limits)})


def shown_facts(form: ScorerFormat, item: Item) -> tuple[str, ...]:
    """Of the item, where the model is fed facts."""
    return (item.facts or ()) if form.facts else ()


@dataclass(frozen=True)
class Asked:
    """The rows that one item's score needs, and how it comes out of their outputs."""

    rows: tuple[Row, ...]
    finish: Callable[[list[Output]], Scored]
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelScorer:
    """A source whose items are prepared in a thread, run in company, and finished one by one."""

    revision: str
    batcher: MicroBatcher
    prepare: Callable[[Item], Asked]

    async def score(self, items: Sequence[Item]) -> Sequence[Scored]:
        asked = await asyncio.to_thread(lambda: [self._prepared(item) for item in items])
        rows = [row for one in asked if isinstance(one, Asked) for row in one.rows]
        outputs = await self.batcher.submit(rows)
        scored: list[Scored] = []
        at = 0
        for one in asked:
            if isinstance(one, Scored):
                scored.append(one)
                continue
            scored.append(_finished(one, outputs[at : at + len(one.rows)]))
            at += len(one.rows)
        return scored

    def _prepared(self, item: Item) -> Asked | Scored:
        try:
            asked = self.prepare(item)
            if not all(row.ids for row in asked.rows):
                raise ItemFailure(ErrorCode.EMPTY_RESPONSE, "the input has no tokens")
        except ItemFailure as failure:
            return failed(failure)
        return asked


def _finished(asked: Asked, outputs: list[Output]) -> Scored:
    try:
        scored = asked.finish(outputs)
    except ItemFailure as failure:
        scored = failed(failure)
    return replace(scored, flags=(*asked.flags, *scored.flags))
