"""Rows -> prompts with ids, split into train, validation and test.

A prompt's id is a hash of the source's name and its content, so it is the same in every process and on every machine.
Equal prompts are one prompt: the copies are removed and counted. Where the copies lie in different splits, the held-out
one stays, so that nothing that is evaluated was trained on.
"""

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import ValidationError

from services.errors import UserError
from services.records import Message, Prompt
from services.text.config import CLASS_NAME, DataSection
from services.text.corpora.instructions import generate_instructions
from services.text.corpora.pairs import Pair
from services.text.corpora.qa import generate_qa
from services.text.readers import SPLIT_NAMES, Row, read_rows

SplitName = Literal["train", "validation", "test"]

USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "instruction", "query", "input", "text"),
    "messages": ("messages", "conversation"),
    "response": ("response", "reference", "answer", "completion", "output", "target"),
    "id": (),
    "facts": ("facts",),
    "principles": ("principles",),
    "prompt_class": ("prompt_class",),
    "keywords": ("keywords",),
    "split": ("split",),
}


@dataclass(frozen=True)
class Splits:
    """`duplicates` is the number of rows that were removed because an equal prompt stood before them."""

    train: Sequence[Prompt]
    validation: Sequence[Prompt]
    test: Sequence[Prompt]
    duplicates: int

    def named(self, name: SplitName) -> Sequence[Prompt]:
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


def prompt_id_of(source: str, content: str) -> str:
    """16 hexadecimal digits of BLAKE2b over (source, content)."""
    return blake2b(json.dumps([source, content], ensure_ascii=False).encode(), digest_size=8).hexdigest()


def source_name(source: str) -> str:
    """What stands for the source in a prompt's id: a file's name without its directory, so that moving it changes
    nothing."""
    path = Path(source).expanduser()
    return path.resolve().name if path.exists() else source


def hash_split(prompt_id: str, seed: int, validation: float, test: float) -> SplitName:
    digest = blake2b(f"{seed}:{prompt_id}".encode(), digest_size=8).digest()
    share = int.from_bytes(digest, "big") / 2**64
    if share < test:
        return "test"
    return "validation" if share < test + validation else "train"


def load_prompts(section: DataSection) -> Splits:
    """All prompts of the section's source. The same section gives the same splits in every process.

    A split that the source lacks is cut from its training rows by hash, where its fraction is not 0.
    Raises UserError, naming file and line or row, for what cannot be read or is no prompt.
    """
    if section.source.startswith("generated:"):
        rows = _generated_rows(section)
        name = section.source
    else:
        rows = list(read_rows(section))
        name = source_name(section.source)
    if not rows:
        raise UserError(f"data.source: {section.source} has no rows")
    columns = _resolve_columns(section, _names_in(rows))
    placed: list[tuple[SplitName | None, Prompt]] = [
        (_own_split(row, columns), _to_prompt(row, columns, name, section.prompt_class)) for row in rows
    ]
    owned = {split for split, _ in placed if split is not None}
    if section.split == "own" and "train" not in owned:
        raise UserError(f"data.split: own, but {section.source} has no training split of its own")
    if section.split == "hash":
        owned = set[SplitName]()
    # Held-out rows first: of two equal prompts the held-out one stays.
    rank: dict[SplitName | None, int] = {"test": 0, "validation": 1, "train": 2, None: 3}
    seen: dict[str, Prompt] = {}
    splits: dict[SplitName, list[tuple[int, Prompt]]] = {"train": [], "validation": [], "test": []}
    for place in sorted(range(len(placed)), key=lambda i: rank[placed[i][0]] if owned else 0):
        own, prompt = placed[place]
        if prompt.prompt_id in seen:
            if columns["id"] is not None and seen[prompt.prompt_id] != prompt:
                raise UserError(f"{rows[place].where}: the id in column {columns['id']!r} names another prompt already")
            continue
        seen[prompt.prompt_id] = prompt
        target: SplitName | None = own if owned else None
        if target in (None, "train"):
            validation = 0.0 if "validation" in owned else section.validation_fraction
            test = 0.0 if "test" in owned else section.test_fraction
            target = hash_split(prompt.prompt_id, section.seed, validation, test)
        splits[target].append((place, prompt))
    if not splits["train"]:
        raise UserError(f"data.source: {section.source} leaves no prompts to train on ({len(seen)} unique prompts)")
    ordered = {split: tuple(prompt for _, prompt in sorted(found, key=_first)) for split, found in splits.items()}
    return Splits(ordered["train"], ordered["validation"], ordered["test"], duplicates=len(rows) - len(seen))


def _first(pair: tuple[int, Prompt]) -> int:
    return pair[0]


def _generated_rows(section: DataSection) -> list[Row]:
    held_out = (section.validation_fraction, section.test_fraction)
    make = generate_qa if section.source == "generated:qa" else generate_instructions
    pairs: Sequence[Pair] = make(section.seed, validation_fraction=held_out[0], test_fraction=held_out[1])
    return [
        Row(f"{section.source} row {i}", pair.row(), None) for i, pair in enumerate(pairs[: section.limit], start=1)
    ]


def _names_in(rows: Iterable[Row]) -> Counter[str]:
    names: Counter[str] = Counter()
    for row in rows:
        names.update(row.values.keys())
    return names


def _resolve_columns(section: DataSection, names: Counter[str]) -> dict[str, str | None]:
    """field -> column. A column that the recipe names must exist somewhere; a usual name counts where it exists."""
    columns: dict[str, str | None] = {}
    for field, usual in USUAL_NAMES.items():
        asked = cast(str | None, getattr(section.columns, field))
        if asked is not None and asked not in names:
            raise UserError(
                f"data.columns.{field}: {section.source} has no column {asked!r}{_nearest(asked, names)}"
                f" (columns: {', '.join(names)})"
            )
        columns[field] = asked or next((name for name in usual if name in names), None)
    if section.columns.prompt is not None and section.columns.messages is not None:
        raise UserError("data.columns: give prompt or messages, not both")
    if section.columns.prompt is not None:
        columns["messages"] = None
    if columns["messages"] is not None:
        columns["prompt"] = None
    if columns["prompt"] is None and columns["messages"] is None:
        raise UserError(
            f"data.columns.prompt: {section.source} has no column named {', '.join(USUAL_NAMES['prompt'])} or messages"
            f"{_nearest('prompt', names)} (columns: {', '.join(names)})"
        )
    return columns


def _nearest(word: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(word.lower(), list(names), n=1, cutoff=0.5)
    return f"; the nearest is {near[0]!r}" if near else ""


def _own_split(row: Row, columns: dict[str, str | None]) -> SplitName | None:
    column = columns["split"]
    value = row.split if column is None else row.values.get(column, row.split)
    if value is None:
        return None
    known = SPLIT_NAMES.get(str(value).lower())
    if known is None:
        raise UserError(f"{row.where}: column {column!r} is {value!r}, allowed are train, validation and test")
    return cast(SplitName, known)


def _to_prompt(row: Row, columns: dict[str, str | None], source: str, prompt_class: str | None) -> Prompt:
    """`prompt_class` is that of rows that name none."""
    column = columns["messages"] or columns["prompt"]
    assert column is not None
    if column not in row.values:
        raise UserError(f"{row.where}: has no {column!r}{_nearest(column, row.values)}")
    value: Any = row.values[column]
    reference = _text(row, columns["response"])
    text: str | None = None
    messages: tuple[Message, ...] | None = None
    if isinstance(value, list):
        messages = _messages(row, column, cast(list[Any], value))
        if messages[-1].role == "assistant":
            reference = reference if reference is not None else messages[-1].content
            messages = messages[:-1]
        if not messages or messages[-1].role != "user":
            raise UserError(f"{row.where}: the last message of {column!r} before the response must be the user's")
        if not messages[-1].content.strip():
            raise UserError(f"{row.where}: the prompt is empty (the last user message of {column!r})")
    elif isinstance(value, str) and columns["messages"] is None:
        if not value.strip():
            raise UserError(f"{row.where}: the prompt is empty (column {column!r})")
        text = value
    elif value is None:
        raise UserError(f"{row.where}: the prompt is empty (column {column!r} is null)")
    else:
        wanted = "a list of messages" if columns["messages"] else "text or a list of messages"
        raise UserError(f"{row.where}: column {column!r} is {type(value).__name__}, not {wanted}")
    content = (
        text if text is not None else json.dumps([[m.role, m.content] for m in messages or ()], ensure_ascii=False)
    )
    if columns["id"] is not None:
        own_id = row.values.get(columns["id"])
        if own_id is None or own_id == "":
            raise UserError(f"{row.where}: has no id in column {columns['id']!r}")
        content = f"id:{own_id}"
    return Prompt(
        prompt_id=prompt_id_of(source, content),
        source=source,
        text=text,
        messages=messages,
        reference=reference,
        facts=_texts(row, columns["facts"]),
        principles=_texts(row, columns["principles"]),
        prompt_class=_class(row, columns["prompt_class"]) or prompt_class,
        keywords=_texts(row, columns["keywords"]),
    )


def _messages(row: Row, column: str, values: list[Any]) -> tuple[Message, ...]:
    if not values:
        raise UserError(f"{row.where}: the prompt is empty (no messages in {column!r})")
    found: list[Message] = []
    for place, value in enumerate(values):
        try:
            found.append(Message(role=value["role"], content=value["content"]))
        except (ValidationError, KeyError, TypeError) as error:
            raise UserError(
                f"{row.where}: message {place} of {column!r} is not {{role, content}} with texts"
            ) from error
    return tuple(found)


def _text(row: Row, column: str | None) -> str | None:
    value = None if column is None else row.values.get(column)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{row.where}: column {column!r} is {type(value).__name__}, not text")
    return value


def _class(row: Row, column: str | None) -> str | None:
    value = _text(row, column)
    if value is not None and not re.fullmatch(CLASS_NAME, value):
        raise UserError(f"{row.where}: column {column!r} is {value!r}, allowed are names of a-z, 0-9 and _")
    return value


def _texts(row: Row, column: str | None) -> tuple[str, ...]:
    value: Any = None if column is None else row.values.get(column)
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in cast(list[Any], value)):
        raise UserError(f"{row.where}: column {column!r} is not a text or a list of texts")
    return tuple(cast(list[str], value))
