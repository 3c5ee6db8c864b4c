"""What all sources with a model of their own share: loading, encoding in a thread, rows through one micro-batcher."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, TypeVar

from reward_server.batching import MicroBatcher
from reward_server.model_sources_config import JudgeSource, ModelSource
from reward_server.runner import ModelFacts, ModelRunner, ModelSpec, Output, Row, Task
from reward_server.schema import ErrorCode, Item
from reward_server.scorers.base import ItemFailure, Scored, failed
from services.errors import UserError
from services.scoring_format import Example, InputTooLong, ScorerFormat, TemplateRefused

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


def load(name: str, source: ModelSource | JudgeSource, task: Task, runner: ModelRunner | None = None) -> Loaded:
    """The model of a source. `runner`: one that lives elsewhere; None loads it into this process.

    Raises UserError for what an operator can get wrong, a missing package among it.
    """
    field_name = f"reward.sources.{name}"
    spec = ModelSpec(source.model, source.model_revision, task, source.dtype, source.device, field_name)
    try:
        transformers: Any = import_module("transformers")
        running: ModelRunner = runner or import_module("reward_server.local_model").LocalModel(spec)
    except ImportError as error:
        raise UserError(f"{field_name}: a model needs torch and transformers: pip install 'attune[cpu]'") from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source.model, revision=source.model_revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{field_name}.model: {source.model} has no tokenizer that can be loaded") from error
    batcher = MicroBatcher(running, tokens=source.batch_tokens, wait_s=source.batch_wait_ms / 1000, name=name)
    return Loaded(tokenizer, batcher)


def limited(loaded: Loaded, form: ScorerFormat, source: ModelSource) -> ScorerFormat:
    """The format with the longest input that recipe, tokenizer and model allow (the model's own is laid on later)."""
    limits = [form.max_tokens]
    if source.max_tokens is not None:
        limits = [source.max_tokens]
    known: Any = getattr(loaded.tokenizer, "model_max_length", None)
    if isinstance(known, int) and known < 10**6:  # transformers writes a huge number where nothing bounds it
        limits.append(known)
    return form.model_copy(update={"max_tokens": min(limits)})


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
            return self.prepare(item)
        except ItemFailure as failure:
            return failed(failure)


def _finished(asked: Asked, outputs: list[Output]) -> Scored:
    try:
        scored = asked.finish(outputs)
    except ItemFailure as failure:
        scored = failed(failure)
    return replace(scored, flags=(*asked.flags, *scored.flags))
