"""Content and salient positions of a rendered prompt: S, I and w of the attention reward's specification.

The unit is the lower-cased word: all of a chosen word's sub-tokens, at all positions where it stands, are salient.
Where nothing is salient the sets say so (I is empty); what a score then does is the reward's own rule
(services/attention).
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from services.errors import UserError
from services.records import Prompt
from services.text.config import SalienceSection
from services.text.render import Rendered, Renderer, Span
from services.text.words import words_of


@dataclass(frozen=True)
class Idf:
    """Document frequencies `df` of words over `n` training prompts."""

    n: int
    df: dict[str, int]

    def weight(self, word: str) -> float:
        """ln((1+n)/(1+df)) + 1"""
        return math.log((1 + self.n) / (1 + self.df.get(word, 0))) + 1

    def to_json(self) -> str:
        return json.dumps({"schema_version": 1, "n": self.n, "df": dict(sorted(self.df.items()))}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Idf":
        """Raises UserError for what `to_json` has not written."""
        try:
            value = json.loads(text)
            if value["schema_version"] != 1:
                raise UserError(f"salience: schema_version {value['schema_version']!r} is not 1")
            return cls(n=int(value["n"]), df={str(word): int(count) for word, count in value["df"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"salience: not a record of document frequencies: {error!r}") from error


@dataclass(frozen=True)
class KeyPositions:
    """Positions in the prompt, ascending; `salient_weights` aligned to `salient`, of mean 1."""

    content: tuple[int, ...]
    salient: tuple[int, ...]
    salient_weights: tuple[float, ...]


def fit_idf(prompts: Iterable[Prompt], renderer: Renderer, section: SalienceSection) -> Idf:
    """Counts in how many of the prompts each word of the content stands.

    Renders every prompt, and so meets every prompt that is too long (UserError) before a run starts.
    """
    n = 0
    df: Counter[str] = Counter()
    for prompt in prompts:
        rendered = renderer.render(prompt)
        df.update({word for word, _ in _placed_words(rendered, section)})
        n += 1
    return Idf(n, dict(sorted(df.items())))


def key_positions(rendered: Rendered, prompt: Prompt, section: SalienceSection, idf: Idf | None) -> KeyPositions:
    """(S, I, w) of one prompt. `idf` may be None where neither the method nor the weights ask for it.

    Raises UserError where the tokenizer has no offsets and the section needs them, and where `idf` is missing.
    """
    content = content_positions(rendered, section)
    if section.method == "all" and section.weights == "uniform":
        return KeyPositions(content, content, (1.0,) * len(content))
    if idf is None and (section.method == "idf" or section.weights == "idf"):
        raise UserError("salience: idf is asked for and was not fitted to the training prompts")
    words = _placed_words(rendered, section)
    inside = frozenset(content)
    if section.method == "all":
        salient = content
    elif section.method == "idf":
        assert idf is not None
        chosen = _rarest(words, idf, section.top_k)
        salient = _positions(places for word, places in words if word in chosen)
    elif section.method == "keywords":
        salient = _keyword_positions(words, (*section.keywords, *prompt.keywords))
    else:
        salient = _entity_positions(rendered, section, inside)
    weights = [1.0] * len(salient)
    if section.weights == "idf" and salient:
        assert idf is not None
        # A position outside any word (punctuation) gets the least weight that the formula knows, 1.
        of_position: dict[int, float] = {}
        for word, places in words:
            for place in places:
                of_position[place] = max(of_position.get(place, 1.0), idf.weight(word))
        weights = [of_position.get(place, 1.0) for place in salient]
        mean = sum(weights) / len(weights)
        weights = [weight / mean for weight in weights]
    return KeyPositions(content, salient, tuple(weights))


def content_positions(rendered: Rendered, section: SalienceSection) -> tuple[int, ...]:
    """S. Where no template surrounds the user's words, `user` and `all_user` are all tokens that are not special."""
    if section.content == "all":
        return tuple(range(len(rendered.ids)))
    offsets = _offsets(rendered, f"salience.content: {section.content}")
    spans = _content_spans(rendered, section)
    return tuple(
        place
        for place, (start, end) in enumerate(offsets)
        if not rendered.special[place] and start < end and any(start < b and end > a for a, b in spans)
    )


def _content_spans(rendered: Rendered, section: SalienceSection) -> tuple[Span, ...]:
    if section.content == "all":
        return ((0, len(rendered.text)),)
    return rendered.user_spans if section.content == "all_user" else rendered.last_user_spans


def _offsets(rendered: Rendered, asked_by: str) -> tuple[Span, ...]:
    if rendered.offsets is None:
        raise UserError(
            f"{asked_by} needs to know which characters a token stands for, and this tokenizer does not say (it "
            f"is not a "
            "fast one); content: all with method: all works with any tokenizer"
        )
    return rendered.offsets


def _placed_words(rendered: Rendered, section: SalienceSection) -> list[tuple[str, tuple[int, ...]]]:
    """The words of S in order, each with its token positions; special tokens are no words."""
    offsets = _offsets(rendered, f"salience.method: {section.method}")
    by_start = [
        (start, end, place) for place, (start, end) in enumerate(offsets) if start < end and not rendered.special[place]
    ]
    found: list[tuple[str, tuple[int, ...]]] = []
    for low, high in _content_spans(rendered, section):
        words = words_of(rendered.text, low, high)
        first = 0
        for word, start, end in words:
            while first < len(by_start) and by_start[first][1] <= start:
                first += 1
            places: list[int] = []
            for token_start, token_end, place in by_start[first:]:
                if token_start >= end:
                    break
                if token_end > start:
                    places.append(place)
            if places:
                found.append((word, tuple(places)))
    return found


def _rarest(words: Sequence[tuple[str, tuple[int, ...]]], idf: Idf, k: int) -> frozenset[str]:
    """The k different words of largest idf. A stable sort of the words in order of appearance: ties by first
    position."""
    different = list(dict.fromkeys(word for word, _ in words))
    return frozenset(sorted(different, key=idf.weight, reverse=True)[:k])


def _keyword_positions(words: Sequence[tuple[str, tuple[int, ...]]], keywords: Iterable[str]) -> tuple[int, ...]:
    """Positions of keywords; a phrase counts where its words follow one another."""
    phrases = {tuple(word for word, _, _ in words_of(keyword)) for keyword in keywords}
    found: list[tuple[int, ...]] = []
    for first in range(len(words)):
        for phrase in phrases:
            run = words[first : first + len(phrase)]
            if phrase and tuple(word for word, _ in run) == phrase:
                found += [places for _, places in run]
    return _positions(found)


def _positions(groups: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(sorted({place for places in groups for place in places}))


@cache
def _entity_pipeline(name: str) -> Any:
    try:
        spacy: Any = import_module("spacy")
    except ImportError as error:
        raise UserError("salience.method: entities needs spaCy: pip install 'attune[entities]'") from error
    try:
        return spacy.load(name)
    except OSError as error:
        raise UserError(f"salience.entity_model: {name!r} is not installed: python -m spacy download {name}") from error


def _entity_positions(rendered: Rendered, section: SalienceSection, inside: frozenset[int]) -> tuple[int, ...]:
    pipeline = _entity_pipeline(section.entity_model)
    offsets = _offsets(rendered, "salience.method: entities")
    found: list[int] = []
    for low, high in _content_spans(rendered, section):
        for entity in pipeline(rendered.text[low:high]).ents:
            start, end = low + int(entity.start_char), low + int(entity.end_char)
            found += [
                place for place, (a, b) in enumerate(offsets) if a < end and b > start and a < b and place in inside
            ]
    return tuple(sorted(set(found)))
