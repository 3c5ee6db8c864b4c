"""Labelled responses from JSONL, Parquet or the hub: comparisons, ratings, and labels of steps.

Every record has the conversation as `prompt` (text) or `messages`, and may have `principles`, `facts`, `split` and a
`weight`. Beside them:

    comparison  `chosen` and `rejected`, or `responses` best first, or `responses` with `ranks` (smaller is better,
                equal is no preference); `label_prob`: the probability that the better of two is preferred (soft label)
    rating      `response` and `rating`, or `labels` {name: value}; `language`, and `paraphrases` [{text, similarity,
                language}]
    steps       `response` and `step_labels`, one a step: incorrect, neutral, correct (or -1, 0, 1, or false, true)

Other fields, such as the scores that a judge gave, are left alone. Every complaint names file and line, field, value
and what is allowed.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from services.errors import UserError
from services.scoring_format import STEP_LABELS, Turn, turns_of
from services.text.config import DataSection
from services.text.readers import SPLIT_NAMES, Row, read_rows
from services.text.sources import hash_split, prompt_id_of, source_name

Shape = Literal["comparisons", "ratings", "steps"]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Asked:
    """What the responses of a record answer. `where` names the record in messages, `key` its prompt: the records of one
    prompt are in one split."""

    where: str
    key: str
    turns: tuple[Turn, ...]
    principles: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    split: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Comparison:
    """`ranks`: smaller is better. `probability`, 0.5 to 1: that the better of two is preferred."""

    asked: Asked
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    probability: float = 1.0


@dataclass(frozen=True)
class Paraphrase:
    """`similarity` [-1, 1] of its embedding with the response's; None: to be computed."""

    text: str
    similarity: float | None = None
    language: str | None = None


@dataclass(frozen=True)
class Rating:
    """One of `rating` and `labels`, as they stand in the data: on the scale that the recipe says."""

    asked: Asked
    response: str
    rating: float | None
    labels: Mapping[str, float]
    language: str | None = None
    paraphrases: tuple[Paraphrase, ...] = ()


@dataclass(frozen=True)
class Steps:
    """`labels`: places in `STEP_LABELS`, one a step of the response."""

    asked: Asked
    response: str
    labels: tuple[int, ...]


Labelled = Comparison | Rating | Steps


@dataclass(frozen=True)
class LabelledSplits:
    train: tuple[Labelled, ...]
    held_out: tuple[Labelled, ...]


def load_labelled(source: str, shape: Shape, *, limit: int | None = None) -> list[Labelled]:
    """All records of a file, a directory or a hub dataset. UserError: none, or one that cannot be used."""
    section = DataSection(source=source, limit=limit)
    name = source_name(source)
    return _nonempty([labelled_of(row, shape, name) for row in read_rows(section)], source)


def labelled_of(row: Row, shape: Shape, source: str) -> Labelled:
    """One record of a row. Raises UserError."""
    reader = {"comparisons": _comparison, "ratings": _rating, "steps": _steps}[shape]
    return reader(_Fields(row), _asked(_Fields(row), source))


def split_labelled(records: Iterable[Labelled], held_out: float, seed: int) -> LabelledSplits:
    """By the records' own split (validation and test are held out), else by the hash of the prompt."""
    train: list[Labelled] = []
    kept: list[Labelled] = []
    for record in records:
        split = record.asked.split or hash_split(record.asked.key, seed, held_out, 0.0)
        (train if split == "train" else kept).append(record)
    return LabelledSplits(tuple(train), tuple(kept))


def _nonempty(records: list[Labelled], source: str) -> list[Labelled]:
    if not records:
        raise UserError(f"{source} has no rows")
    return records


@dataclass(frozen=True)
class _Fields:
    """Typed reading of a row's fields: what is wrong is said with the field, the value and what is allowed."""

    row: Row

    def fail(self, field: str, allowed: str) -> UserError:
        value = self.row.values.get(field)
        shown = repr(value)
        return UserError(f"{self.row.where}: {field} is {shown[:80]}, allowed is {allowed}")

    def has(self, field: str) -> bool:
        return self.row.values.get(field) is not None

    def text(self, field: str) -> str:
        value = self.row.values.get(field)
        if not isinstance(value, str) or not value.strip():
            raise self.fail(field, "a text that is not empty")
        return value

    def texts(self, field: str, at_least: int = 0) -> tuple[str, ...]:
        value: Any = self.row.values.get(field)
        if value is None and not at_least:
            return ()
        if isinstance(value, str) and at_least <= 1:
            return (value,)
        entries = cast(list[Any], value) if isinstance(value, list) else []
        if len(entries) < at_least or not isinstance(value, list) or not all(_is_text(entry) for entry in entries):
            raise self.fail(field, f"a list of at least {at_least} texts" if at_least else "a text or a list of texts")
        return tuple(entries)

    def number(self, field: str, low: float, high: float) -> float:
        value = self.row.values.get(field)
        if not _is_number(value) or not low <= float(cast(float, value)) <= high:
            raise self.fail(field, f"a number from {low:g} to {high:g}" if high < math.inf else f"at least {low:g}")
        return float(cast(float, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _asked(fields: _Fields, source: str) -> Asked:
    if fields.has("prompt") == fields.has("messages"):
        raise UserError(f"{fields.row.where}: needs one of prompt (a text) and messages (a list)")
    turns = turns_of(fields.text("prompt")) if fields.has("prompt") else _turns(fields)
    split = fields.row.split
    if fields.has("split"):
        split = SPLIT_NAMES.get(str(fields.row.values["split"]).lower())
        if split is None:
            raise fields.fail("split", "train, validation or test")
    content = "\n".join(f"{turn.role}: {turn.content}" for turn in turns)
    return Asked(
        where=fields.row.where,
        key=prompt_id_of(source, content),
        turns=turns,
        principles=fields.texts("principles"),
        facts=fields.texts("facts"),
        split=split,
        weight=fields.number("weight", 0, math.inf) if fields.has("weight") else 1.0,
    )


def _turns(fields: _Fields) -> tuple[Turn, ...]:
    value: Any = fields.row.values["messages"]
    found: list[Turn] = []
    for message in cast(list[Any], value) if isinstance(value, list) else []:
        known = cast(dict[str, Any], message) if isinstance(message, dict) else {}
        if known.get("role") not in ROLES or not isinstance(known.get("content"), str):
            raise fields.fail("messages", f"a list of {{role, content}} with roles {', '.join(ROLES)}")
        found.append(Turn(known["role"], known["content"]))
    if not found or found[-1].role != "user":
        raise fields.fail("messages", "a list that ends with a user's message")
    return tuple(found)


def _comparison(fields: _Fields, asked: Asked) -> Comparison:
    if fields.has("responses"):
        responses = fields.texts("responses", at_least=2)
        ranks = tuple(range(len(responses)))
        if fields.has("ranks"):
            value: Any = fields.row.values["ranks"]
            entries = cast(list[Any], value) if isinstance(value, list) else []
            if len(entries) != len(responses) or not all(isinstance(entry, int) for entry in entries):
                raise fields.fail("ranks", f"a list of {len(responses)} whole numbers, one a response")
            ranks = tuple(int(entry) for entry in entries)
    else:
        responses, ranks = (fields.text("chosen"), fields.text("rejected")), (0, 1)
    probability = 1.0
    if fields.has("label_prob"):
        if len(responses) != 2:
            raise fields.fail("label_prob", f"a soft label of two responses; here are {len(responses)}")
        probability = fields.number("label_prob", 0, 1)
    if len(set(ranks)) == 1 and len(responses) == 2 and probability == 1.0:
        probability, ranks = 0.5, (0, 1)  # a tie is a soft label that asks for equal scores
    if probability < 0.5:
        probability, ranks = 1.0 - probability, (ranks[1], ranks[0])
    return Comparison(asked, responses, ranks, probability)


def _rating(fields: _Fields, asked: Asked) -> Rating:
    if fields.has("rating") == fields.has("labels"):
        raise UserError(f"{fields.row.where}: needs one of rating (a number) and labels (a mapping of numbers)")
    labels: dict[str, float] = {}
    if fields.has("labels"):
        value: Any = fields.row.values["labels"]
        if not isinstance(value, dict) or not all(_is_number(each) for each in cast(dict[str, Any], value).values()):
            raise fields.fail("labels", "a mapping of names to numbers")
        labels = {str(name): float(each) for name, each in cast(dict[str, Any], value).items()}
    rating = fields.number("rating", -math.inf, math.inf) if fields.has("rating") else None
    language = fields.text("language") if fields.has("language") else None
    return Rating(asked, fields.text("response"), rating, labels, language, _paraphrases(fields))


def _paraphrases(fields: _Fields) -> tuple[Paraphrase, ...]:
    value: Any = fields.row.values.get("paraphrases")
    if value is None:
        return ()
    found: list[Paraphrase] = []
    for entry in cast(list[Any], value) if isinstance(value, list) else [None]:
        known = cast(dict[str, Any], entry) if isinstance(entry, dict) else {}
        similarity, language = known.get("similarity"), known.get("language")
        if (
            not _is_text(known.get("text"))
            or not (similarity is None or (_is_number(similarity) and -1 <= similarity <= 1))
            or not (language is None or _is_text(language))
        ):
            raise fields.fail(
                "paraphrases", "a list of {text, similarity from -1 to 1, language}, the last two if known"
            )
        found.append(Paraphrase(known["text"], None if similarity is None else float(similarity), language))
    return tuple(found)


_STEP_VALUES: dict[Any, int] = {**{name: place for place, name in enumerate(STEP_LABELS)}, -1: 0, 0: 1, 1: 2}


def _steps(fields: _Fields, asked: Asked) -> Steps:
    value: Any = fields.row.values.get("step_labels")
    entries = cast(list[Any], value) if isinstance(value, list) else []
    # Of truth values only: False is 0 to Python, which is neutral among the numbers.
    places = [
        (2 if entry else 0) if isinstance(entry, bool) else _STEP_VALUES.get(entry) if _is_label(entry) else None
        for entry in entries
    ]
    if not places or any(place is None for place in places):
        raise fields.fail("step_labels", f"a list of {', '.join(STEP_LABELS)} (or -1, 0, 1, or false, true)")
    return Steps(asked, fields.text("response"), tuple(place for place in places if place is not None))


def _is_label(value: Any) -> bool:
    return isinstance(value, str | int | float)
