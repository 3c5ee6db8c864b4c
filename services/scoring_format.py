"""How a model that scores is fed: one place for training and serving. Pure functions of a tokenizer that is passed in.

The input of a model is, in this order: facts (before the last user message), the conversation, the response, and the
principles it is judged by (after the response: SALMON, arXiv 2310.05910). `scorer.json` beside the weights says how
these are written down, and both sides read it: a held-out logit is then the same in both (design, "A model that
scores").

Where the input has more tokens than the model takes, the conversation is cut from its beginning, down to
`MIN_PROMPT_TOKENS`; facts, response and principles are never cut. A cut is flagged, and what still does not fit raises
`InputTooLong`.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from services.errors import UserError

FILE = "scorer.json"
CHAT = "chat"
PROMPT_TRUNCATED = "prompt_truncated"
"""Flag of an input whose conversation has lost its beginning."""
MIN_PROMPT_TOKENS = 256
"""Tokens of the conversation that a cut leaves; a shorter conversation is not cut at all."""
STEP_LABELS = ("incorrect", "neutral", "correct")
"""Labels of a step, in the order of the classes that training writes; `id2label` of a model's configuration counts."""

PRINCIPLE_TEMPLATE = "Judge the last answer above by these principles:\n{principles}"
FACTS_TEMPLATE = "Known facts:\n{facts}\n\n"

Offsets = tuple[tuple[int, int], ...]
Kind = Literal["preference", "absolute", "principle", "process"]


class StepRule(BaseModel):
    """Where a response's steps end. White space around a step is no part of it; empty steps are none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: Literal["lines", "paragraphs", "marker"] = Field(
        default="lines", description="Steps are lines, runs of lines between blank ones, or end with a marker's text."
    )
    marker: str | None = Field(
        default=None, min_length=1, description="Text that ends a step and belongs to it; for by: marker."
    )

    @model_validator(mode="after")
    def _marker_where_asked_for(self) -> Self:
        if (self.by == "marker") != (self.marker is not None):
            raise ValueError("marker is given with by: marker, and only with it")
        return self


class ScorerFormat(BaseModel):
    """`scorer.json`: what a model is fed and what its output means."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    kind: Kind
    input_template: str = Field(
        default=CHAT,
        description="chat: the tokenizer's chat template, the response as the assistant's message; or a text with "
        "{prompt} before {response}.",
    )
    principle_template: str = Field(
        default=PRINCIPLE_TEMPLATE,
        description="Written after the response, with {principles} (a line each, with a dash); with chat it is a "
        "further user message.",
    )
    facts_template: str = Field(
        default=FACTS_TEMPLATE,
        description="Written before the last user message, with {facts} (a line each, with a dash).",
    )
    facts: bool = Field(
        default=False, description="Whether the facts of an item are written at all: true where training showed them."
    )
    step_rule: StepRule | None = Field(default=None, description="Of kind process: how a response is split.")
    strip_bos: bool = Field(
        default=True,
        description="Of several beginning-of-sequence tokens at the start (the chat template's and the tokenizer's) "
        "only one is kept; false: as they come, for a model that was trained so.",
    )
    output: Literal["logit", "probability"] = Field(
        default="logit", description="What the score is: the raw logit, or its sigmoid."
    )
    label_range: tuple[float, float] | None = Field(
        default=None, description="Lowest and highest rating that training mapped to 0 and 1 (kind absolute)."
    )
    max_tokens: Annotated[int, Field(ge=1)] = Field(default=2048, description="Longest input, in tokens.")
    revision: str | None = Field(
        default=None, min_length=1, description="Of the model; written by `write_format` where it is null."
    )

    @model_validator(mode="after")
    def _templates_have_their_places(self) -> Self:
        for name, field in (("principle_template", "principles"), ("facts_template", "facts")):
            if getattr(self, name).count(f"{{{field}}}") != 1:
                raise ValueError(f"{name} has {{{field}}} once")
        if self.input_template != CHAT and _PLACES.findall(self.input_template) != ["prompt", "response"]:
            raise ValueError("input_template is chat, or a text with {prompt} once and after it {response} once")
        if self.label_range is not None and self.label_range[0] >= self.label_range[1]:
            raise ValueError(f"label_range is [lowest, highest], got {list(self.label_range)}")
        if (self.kind == "process") != (self.step_rule is not None):
            raise ValueError("step_rule is given for kind process, and only for it")
        return self


@dataclass(frozen=True)
class Turn:
    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """What a model scores: a conversation that the response answers, and what is known beside it."""

    turns: tuple[Turn, ...]
    response: str
    principles: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """`ids` [n] of one input. `step_ends` [steps]: index in `ids` of the last token of each step, where steps were
    asked for."""

    ids: tuple[int, ...]
    flags: tuple[str, ...] = ()
    step_ends: tuple[int, ...] = ()


class InputTooLong(Exception):  # noqa: N818 - what it is
    """More tokens than the model takes, and nothing more that may be cut."""

    def __init__(self, tokens: int, allowed: int) -> None:
        super().__init__(
            f"the input has {tokens} tokens, the model takes {allowed}: facts, response and principles are never cut, "
            f"and {MIN_PROMPT_TOKENS} tokens of the prompt are kept"
        )
        self.tokens = tokens
        self.allowed = allowed


class TemplateRefused(Exception):  # noqa: N818
    """The chat template does not take this conversation, or leaves nothing of the response that could be found."""


_PLACES = re.compile(r"\{(prompt|response)\}")


def turns_of(prompt: str) -> tuple[Turn, ...]:
    """A prompt without roles is one user message."""
    return (Turn("user", prompt),)


def render(tokenizer: Any, form: ScorerFormat, example: Example) -> str:
    """The model's input as text, special tokens of the chat template included."""
    turns = _with_facts(form, example)
    block = _block(form.principle_template, "principles", example.principles)
    if form.input_template != CHAT:
        before, _, between, _, after = _PLACES.split(form.input_template)
        return before + plain_text(turns) + between + example.response + after + (f"\n\n{block}" if block else "")
    turns = [*turns, Turn("assistant", example.response)]
    return chat_text(tokenizer, [*turns, Turn("user", block)] if block else turns)


def chat_text(tokenizer: Any, turns: Sequence[Turn], *, generation_prompt: bool = False) -> str:
    """The chat template's text. Raises TemplateRefused, and UserError where there is no template."""
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError("input_template: chat, but the tokenizer has no chat template: give a text with {prompt}")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt))
    except Exception as error:
        # A template is a program of the model's author: whatever it raises is about these messages.
        roles = ", ".join(turn.role for turn in turns)
        raise TemplateRefused(f"the chat template refuses messages with roles {roles}: {error}") from error


def encode(tokenizer: Any, form: ScorerFormat, example: Example, max_tokens: int | None = None) -> Encoded:
    """Token ids of one input. `max_tokens` counts where it is lower than the format's own.

    Raises InputTooLong, TemplateRefused, and UserError for a tokenizer that cannot do what the format asks for.
    """
    _, encoded = _fitted(tokenizer, form, example, max_tokens)
    return encoded


def encode_steps(tokenizer: Any, form: ScorerFormat, example: Example, max_tokens: int | None = None) -> Encoded:
    """Like `encode`, with the last token of each step, for a model that labels tokens."""
    assert form.step_rule is not None
    fitted, encoded = _fitted(tokenizer, form, example, max_tokens)
    text = render(tokenizer, form, fitted)
    start, shown = _response_in(tokenizer, form, fitted, text)
    ids, offsets = _tokens(tokenizer, form, text)
    assert ids == encoded.ids
    if offsets is None:
        raise UserError("scoring steps needs a tokenizer with offsets (a fast one)")
    ends = [start + end for _, end in split_steps(shown, form.step_rule)]
    return replace(encoded, step_ends=tuple(_last_token(offsets, start, end) for end in ends))


def encode_prefixes(
    tokenizer: Any, form: ScorerFormat, example: Example, max_tokens: int | None = None
) -> tuple[Encoded, ...]:
    """An input for each step, its response ending with that step, for a model that scores sequences.

    All have the beginning that fits the whole response: a step's score does not depend on a cut of its own.
    """
    assert form.step_rule is not None
    fitted, encoded = _fitted(tokenizer, form, example, max_tokens)
    return tuple(
        Encoded(_tokens(tokenizer, form, render(tokenizer, form, part))[0], encoded.flags)
        for _, end in split_steps(example.response, form.step_rule)
        for part in [replace(fitted, response=example.response[:end])]
    )


def encode_continuation(
    tokenizer: Any, form: ScorerFormat, example: Example, max_tokens: int | None = None
) -> tuple[Encoded, int]:
    """The prompt as a policy sees it and the response's tokens after it; and where the response begins in the ids.

    For a language model that says how likely the response is: no end of sequence is written.
    """
    response = tuple(int(i) for i in tokenizer(example.response, add_special_tokens=False)["input_ids"])

    def write(turns: tuple[Turn, ...]) -> tuple[int, ...]:
        shown = _with_facts(form, replace(example, turns=turns))
        if form.input_template == CHAT:
            text = chat_text(tokenizer, shown, generation_prompt=True)
        else:
            before, _, between, _, _ = _PLACES.split(form.input_template)
            text = before + plain_text(shown) + between
        return _tokens(tokenizer, form, text)[0] + response

    _, encoded = fit(tokenizer, example.turns, write, _allowed(form, max_tokens))
    return encoded, len(encoded.ids) - len(response)


def encode_text(tokenizer: Any, form: ScorerFormat, text: str) -> tuple[int, ...]:
    """Token ids of a text that is rendered already, with the format's rule for the beginning of sequence."""
    return _tokens(tokenizer, form, text)[0]


def encode_rendered(tokenizer: Any, form: ScorerFormat, example: Example, max_tokens: int | None = None) -> Encoded:
    """An example whose response is the whole input as a client rendered it. Raises InputTooLong."""
    ids = encode_text(tokenizer, form, example.response)
    if len(ids) > _allowed(form, max_tokens):
        raise InputTooLong(len(ids), _allowed(form, max_tokens))
    return Encoded(ids)


def split_steps(text: str, rule: StepRule) -> tuple[tuple[int, int], ...]:
    """(first character, end) of each step, white space around it left out."""
    if rule.by == "marker":
        assert rule.marker is not None
        pattern = re.escape(rule.marker)
    else:
        pattern = r"\n" if rule.by == "lines" else r"\n[^\S\n]*\n\s*"
    cuts = [match.end() for match in re.finditer(pattern, text)]
    spans: list[tuple[int, int]] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        part = text[start:end]
        if part.strip():
            spans.append((start + len(part) - len(part.lstrip()), start + len(part.rstrip())))
    return tuple(spans)


def read_format(directory: str | Path) -> ScorerFormat | None:
    """`scorer.json` of a model directory, None where there is none. Raises UserError where it is not one."""
    path = Path(directory) / FILE
    if not path.is_file():
        return None
    try:
        return ScorerFormat.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(step) for step in first["loc"]) or "the file"
        raise UserError(f"{path}: {place}: {first['msg']}") from None


def write_format(directory: str | Path, form: ScorerFormat) -> ScorerFormat:
    """Writes `scorer.json`, last of a model's files; a revision that is null becomes `directory_revision`."""
    form = form if form.revision is not None else form.model_copy(update={"revision": directory_revision(directory)})
    path = Path(directory) / FILE
    path.write_text(json.dumps(form.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return form


def directory_revision(directory: str | Path) -> str:
    """BLAKE2b-64 of the names and contents of a model's own files, `scorer.json` apart, in hexadecimal.

    Raises UserError where there is none.
    """
    root = Path(directory)
    total = hashlib.blake2b(digest_size=8)
    files = sorted(
        path
        for path in (root.iterdir() if root.is_dir() else ())
        if path.is_file() and path.name != FILE and path.suffix in _MODEL_FILES
    )
    if not files:
        raise UserError(f"{root}: there is no model directory")
    for path in files:
        with path.open("rb") as file:
            total.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "blake2b").digest())
    return total.hexdigest()


_MODEL_FILES = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt"})


def _block(template: str, name: str, lines: Sequence[str]) -> str:
    return template.replace(f"{{{name}}}", "\n".join(f"- {line}" for line in lines)) if lines else ""


def _with_facts(form: ScorerFormat, example: Example) -> list[Turn]:
    turns = list(example.turns)
    block = _block(form.facts_template, "facts", example.facts)
    if block:
        place = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=len(turns) - 1)
        turns[place] = replace(turns[place], content=block + turns[place].content)
    return turns


def plain_text(turns: Sequence[Turn]) -> str:
    """One message is its content; several are told apart by their roles."""
    if len(turns) == 1:
        return turns[0].content
    return "\n\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in turns)


def _tokens(tokenizer: Any, form: ScorerFormat, text: str) -> tuple[tuple[int, ...], Offsets | None]:
    """Ids and, of a fast tokenizer, the characters that each stands for."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoding = tokenizer(text, return_offsets_mapping=fast, return_attention_mask=False, truncation=False)
    ids = tuple(int(i) for i in encoding["input_ids"])
    offsets = tuple((int(a), int(b)) for a, b in encoding["offset_mapping"]) if fast else None
    double = 0
    if form.strip_bos and tokenizer.bos_token_id is not None:
        while ids[double : double + 2] == (tokenizer.bos_token_id,) * 2:
            double += 1
    return ids[double:], None if offsets is None else offsets[double:]


def fit(
    tokenizer: Any, turns: Sequence[Turn], write: Callable[[tuple[Turn, ...]], tuple[int, ...]], allowed: int
) -> tuple[tuple[Turn, ...], Encoded]:
    """As much of a conversation as leaves at most `allowed` ids, and those: `write` gives the ids of an input.

    Raises InputTooLong.
    """
    fitted = tuple(turns)
    dropped = 0
    while True:
        ids = write(fitted)
        if len(ids) <= allowed:
            return fitted, Encoded(ids, (PROMPT_TRUNCATED,) if dropped else ())
        if not getattr(tokenizer, "is_fast", False):  # one without offsets: where a token begins is not known
            raise InputTooLong(len(ids), allowed)
        sizes = [_starts(tokenizer, turn.content) for turn in turns]
        spare = sum(len(size) for size in sizes) - MIN_PROMPT_TOKENS
        if dropped >= spare:
            raise InputTooLong(len(ids), allowed)
        # What a cut saves is known only when the rest is tokenised again; each round drops one token at least.
        dropped = min(dropped + len(ids) - allowed, spare)
        fitted = _without(turns, sizes, dropped)


def _fitted(tokenizer: Any, form: ScorerFormat, example: Example, max_tokens: int | None) -> tuple[Example, Encoded]:
    """The example with as much of its conversation as fits, and its ids."""

    def write(turns: tuple[Turn, ...]) -> tuple[int, ...]:
        return _tokens(tokenizer, form, render(tokenizer, form, replace(example, turns=turns)))[0]

    turns, encoded = fit(tokenizer, example.turns, write, _allowed(form, max_tokens))
    return replace(example, turns=turns), encoded


def _allowed(form: ScorerFormat, max_tokens: int | None) -> int:
    return form.max_tokens if max_tokens is None else min(form.max_tokens, max_tokens)


def _starts(tokenizer: Any, content: str) -> list[int]:
    """The first character of each token of a message's content."""
    offsets = tokenizer(content, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [int(start) for start, _ in offsets]


def _without(turns: Sequence[Turn], sizes: Sequence[Sequence[int]], dropped: int) -> tuple[Turn, ...]:
    """The conversation without its first `dropped` tokens. Messages of which nothing is left go, but a user's message
    stays, empty, before an assistant's that is kept: templates ask for it."""
    kept: list[Turn] = []
    for i, (turn, starts) in enumerate(zip(turns, sizes, strict=True)):
        if dropped and dropped >= len(starts) and i < len(turns) - 1:
            dropped -= len(starts)
            continue
        if not kept and turn.role == "assistant" and i > 0 and turns[i - 1].role == "user":
            kept.append(Turn("user", ""))
        kept.append(replace(turn, content=turn.content[starts[dropped] :].lstrip()) if dropped else turn)
        dropped = 0
    return tuple(kept)


def _response_in(tokenizer: Any, form: ScorerFormat, example: Example, text: str) -> tuple[int, str]:
    """First character of the response in the rendered text, and the response as it stands there: templates trim."""
    fence = "\ue000"
    while fence in text:
        fence += "\ue001"
    before, *rest = render(tokenizer, form, replace(example, response=fence)).split(fence)
    response = example.response
    for shown in dict.fromkeys((response, response.rstrip(), response.lstrip(), response.strip())):
        if len(rest) == 1 and text == before + shown + rest[0]:
            return len(before), shown
    raise TemplateRefused("the chat template rewrites the response, so that its steps cannot be located")


def _last_token(offsets: Sequence[tuple[int, int]], start: int, end: int) -> int:
    """The token that has the character before `end`."""
    found = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and a < b]
    if not found:
        raise TemplateRefused("the tokenizer leaves nothing of the response's first step")
    return found[-1]
