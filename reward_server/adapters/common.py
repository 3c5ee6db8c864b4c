"""What the adapters share: the base of their requests, texts, and items of prompt and response."""

import math
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from reward_server.config import AdaptersSection
from reward_server.schema import Item, Many


class Foreign(BaseModel):
    """A request of another's format: immutable, strict in the types of what is read. Fields that change nothing here
    are ignored; those that ask for what this server does not do are in the models with what is allowed, and refused."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Told(BaseModel):
    """An answer, or a part of one, in another's format."""

    model_config = ConfigDict(frozen=True)


ONE_TAG, MANY_TAG = "<one>", "<many>"


def one_or_many(value: Any) -> str:
    """Which branch of a union a value belongs to, a text or a list, so that a refusal names what is wrong in it."""
    return ONE_TAG if isinstance(value, str) else MANY_TAG


Texts = Annotated[Annotated[str, Tag(ONE_TAG)] | Annotated[Many[str], Tag(MANY_TAG)], Discriminator(one_or_many)]


def _label(value: Any) -> Any:
    """A label that a data set has as a number is compared as its text; anything else is what it is."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Label = Annotated[
    str | None, BeforeValidator(_label, json_schema_input_type=Annotated[str | int | float | None, Field()])
]


class Usage(Told):
    """Part of the formats; this server counts no tokens for them."""

    prompt_tokens: int = 0
    total_tokens: int = 0


def without_end(text: str, reading: AdaptersSection) -> str:
    """A response without the texts of end-of-sequence tokens, and white space between them, at its end."""
    end = at = len(text)
    while True:
        # An index moves, and the text is cut once: it may be millions of end texts long.
        while at and text[at - 1].isspace():
            at -= 1
        ended = next((one for one in reading.end_texts if text.endswith(one, 0, at)), None)
        if ended is None:
            return text[:end]
        end = at = at - len(ended)


def text_item(index: int, text: str, reading: AdaptersSection) -> Item:
    """An item of prompt and response in one text: split where the recipe says how, else as it is."""
    if reading.split_at is not None:
        prompt, found, response = text.rpartition(reading.split_at)
        if found:
            return Item(id=str(index), prompt=prompt + found, response=without_end(response, reading))
    return Item(id=str(index), text=text)


def pair_item(index: int, prompt: str, response: str, reference: str | None = None) -> Item:
    return Item(id=str(index), prompt=prompt, response=response, reference=reference)


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


def as_list(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def descending(values: Sequence[float]) -> list[int]:
    """Indices from the highest value to the lowest; equal ones in their order."""
    return sorted(range(len(values)), key=lambda i: -values[i])
