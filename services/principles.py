"""Sets of judging principles: reading one, and drawing from it as a function of a seed and an item's id.

SALMON (arXiv 2310.05910): the principles are part of what the reward model reads, so they can be changed while a
policy is trained. A draw has no state: the same seed, id and revision give the same principles, whatever was drawn
before (design, invariant 8).
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from services.errors import UserError

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")]
Text = Annotated[str, Field(min_length=1, max_length=2000)]


class Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Principle(Part):
    """`text` says what is good; `negative`, written apart, asks for the opposite."""

    id: Name
    text: Text
    negative: Text | None = None


class PromptClass(Part):
    """Prompts of one kind: which words tell them, and the weights of the principles that matter more for them."""

    words: tuple[Text, ...] = Field((), description="A prompt with one of these, whole words in any case, is one.")
    weights: Mapping[Name, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict)


class PrincipleSet(Part):
    schema_version: Literal[1] = 1
    version: str = Field(min_length=1, description="Raised by the author; the revision is of the content.")
    principles: tuple[Principle, ...] = Field(min_length=1)
    classes: Mapping[Name, PromptClass] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        ids = [principle.id for principle in self.principles]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            raise ValueError(f"principle {twice[0]} stands there twice")
        for name, prompt_class in self.classes.items():
            for principle in prompt_class.weights:
                if principle not in ids:
                    raise ValueError(f"classes.{name}.weights: there is no principle {principle}")
        return self

    @property
    def revision(self) -> str:
        """BLAKE2b-64 of the set's content, in hexadecimal."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def class_of(self, prompt: str) -> str | None:
        """The first class that has a word of the prompt; None where none has."""
        lowered = prompt.casefold()
        for name, prompt_class in self.classes.items():
            if any(re.search(rf"(?<!\w){re.escape(word.casefold())}(?!\w)", lowered) for word in prompt_class.words):
                return name
        return None


@dataclass(frozen=True)
class Drawn:
    """`texts` in the order of the draw; `negated` [texts] says which are in their negated words."""

    texts: tuple[str, ...]
    negated: tuple[bool, ...]


def draw(
    principles: PrincipleSet,
    *,
    seed: int,
    sample_id: str,
    revision: str,
    count: int,
    prompt_class: str | None = None,
    negated: float = 0.0,
) -> Drawn:
    """`count` different principles (all, where there are fewer), likelier the heavier they are for the class.

    Weighted sampling without replacement by exponential keys (Efraimidis, Spirakis 2006), from hashes of the seed, the
    item's id and the revision. A principle without negated words is never negated.
    """
    weights: Mapping[str, float] = {}
    if prompt_class is not None and prompt_class in principles.classes:
        weights = principles.classes[prompt_class].weights

    def uniform(what: str, name: str) -> float:
        text = json.dumps([what, seed, sample_id, revision, name]).encode()
        return (int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") + 0.5) / 2**64

    def key(principle: Principle) -> float:
        return -math.log(uniform("key", principle.id)) / weights.get(principle.id, 1.0)

    drawn = sorted(principles.principles, key=key)[:count]
    turned = [p.negative is not None and uniform("negate", p.id) < negated for p in drawn]
    texts = [p.negative if turn and p.negative else p.text for p, turn in zip(drawn, turned, strict=True)]
    return Drawn(tuple(texts), tuple(turned))


def read_set(path: str | Path) -> PrincipleSet:
    """The set of a YAML file. Raises UserError where there is none, or it is not one."""
    try:
        value: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return PrincipleSet.model_validate(value)
    except OSError as error:
        raise UserError(f"principles: {path} cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise UserError(f"principles: {path} is not YAML: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(step) for step in first["loc"]) or "the file"
        raise UserError(f"principles: {path}: {place}: {first['msg']}") from None
