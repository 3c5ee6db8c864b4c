"""Sources that compute on the item alone: length, repetition, exact and numeric match, pattern, language."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

from reward_server.schema import ErrorCode, Item
from reward_server.scorers.base import (
    FunctionScorer,
    ItemFailure,
    Scored,
    ok,
    prompt_turns,
    response_ids,
    response_text,
    revision_of,
)
from reward_server.sources_config import (
    ExactMatchSource,
    LanguageSource,
    LengthSource,
    NumericMatchSource,
    PatternSource,
    RepetitionSource,
)
from services.attention.options import AttentionOptions
from services.attention.reward import repetition
from services.errors import UserError


def length_scorer(source: LengthSource) -> FunctionScorer:
    """bonus * min(n, target) / target - penalty * max(0, n - target) / target."""

    def score(item: Item) -> Scored:
        count = _count_units(item, source.unit)
        bonus = source.bonus * min(count, source.target) / source.target
        penalty = source.penalty * max(0, count - source.target) / source.target
        return ok(bonus - penalty, {"length": count, "bonus": bonus, "penalty": penalty})

    return FunctionScorer(revision_of(source), score)


def repetition_scorer(source: RepetitionSource) -> FunctionScorer:
    """Minus the `repeat` term of the attention reward, over tokens or words."""
    options = AttentionOptions(ngrams=source.ngrams, repeat_count=source.repeat_count, rate=source.rate)

    def score(item: Item) -> Scored:
        units = response_ids(item) if source.unit == "tokens" else _word_ids(response_text(item))
        repeat = repetition(units, (), options)  # a trailing end of sequence is cut off already
        return ok(0.0 - repeat, {"repeat": repeat})

    return FunctionScorer(revision_of(source), score)


def exact_match_scorer(source: ExactMatchSource) -> FunctionScorer:
    """1 where the response is the reference after normalisation, else 0."""
    normalise = NORMALISATIONS[source.normalise]

    def score(item: Item) -> Scored:
        if item.reference is None:
            raise ItemFailure(ErrorCode.MISSING_REFERENCE, "exact_match needs `reference`")
        return ok(float(normalise(response_text(item)) == normalise(item.reference)), {})

    return FunctionScorer(revision_of(source), score)


_WORD = re.compile(r"[-+−]?\d+(?:[.,]\d+)*|\w+(?:['’]\w+)*")


def words(text: str) -> list[str]:
    """Lower-cased words: numbers with sign and decimals, and runs of letters, digits and underscores."""
    return _WORD.findall(text.casefold())


NORMALISATIONS: dict[str, Callable[[str], object]] = {
    "none": str,
    "whitespace": str.split,
    # Text without any word (an emoticon, a formula's sign) is compared as it stands.
    "words": lambda text: words(text) or text.split(),
}


def _word_ids(text: str) -> list[int]:
    numbers: dict[str, int] = {}
    return [numbers.setdefault(word, len(numbers)) for word in words(text)]


def _count_units(item: Item, unit: str) -> int:
    if unit == "tokens":
        return len(response_ids(item))
    text = response_text(item)
    return len(text.split()) if unit == "words" else len(text)


_NUMBER = re.compile(r"(?<![\w.,])[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?:/\d+(?![\d.,/]\d))?")


def numbers(text: str) -> list[float]:
    """Finite numbers of a text: sign, thousands separated by commas, decimals, exponents, fractions a/b."""
    found: list[float] = []
    for match in _NUMBER.finditer(text):
        above, _, below = match.group().replace(",", "").replace("−", "-").partition("/")
        value = float(above) / (float(below or 1) or float("nan"))
        if abs(value) < float("inf"):  # neither infinite nor, for a division by zero, no number
            found.append(value)
    return found


def numeric_match_scorer(source: NumericMatchSource) -> FunctionScorer:
    """1 where |response - reference| <= absolute + relative * |reference|, else 0."""

    def score(item: Item) -> Scored:
        if item.reference is None:
            raise ItemFailure(ErrorCode.MISSING_REFERENCE, "numeric_match needs `reference`")
        wanted = numbers(item.reference)
        if not wanted:
            raise ItemFailure(ErrorCode.INVALID_REFERENCE, "numeric_match needs a number in `reference`")
        given = numbers(response_text(item))
        detail: dict[str, float | int] = {"numbers": len(given), "reference": wanted[-1]}
        if not given or (source.which == "only" and len(given) > 1):
            return ok(0.0, detail)
        number = given[0] if source.which == "first" else given[-1]
        near = abs(number - wanted[-1]) <= source.absolute + source.relative * abs(wanted[-1])
        return ok(float(near), {**detail, "number": number})

    return FunctionScorer(revision_of(source), score)


def pattern_scorer(source: PatternSource) -> FunctionScorer:
    """1 where the pattern fits. Raises UserError for what is no pattern, or where the engine is not installed.

    The engine is the package `regex`, which gives up after a time: a pattern that backtracks cannot hold up a thread.
    """
    try:
        regex: Any = import_module("regex")
    except ImportError as error:
        raise UserError("sources: pattern needs the package regex: pip install 'attune[server]'") from error
    try:
        compiled: Any = regex.compile(source.pattern)
    except regex.error as error:
        raise UserError(f"sources: pattern: {source.pattern!r} is no regular expression: {error}") from error
    find: Callable[..., Any] = compiled.fullmatch if source.match == "full" else compiled.search

    def score(item: Item) -> Scored:
        try:
            # Without the lock of the interpreter, other threads go on while it searches.
            found = find(response_text(item), timeout=source.timeout_s, concurrent=True)
        except TimeoutError:
            message = f"the pattern was not decided within {source.timeout_s:g} s"
            raise ItemFailure(ErrorCode.PATTERN_TIMEOUT, message) from None
        return ok(float(found is not None), {})

    return FunctionScorer(revision_of(source), score)


@lru_cache(maxsize=1 << 16)
def script_of(character: str) -> str | None:
    """The script of a letter by the first word of its Unicode name; None of what is no letter.

    Hiragana and katakana are one, kana; compatibility forms count as what they stand for.
    """
    if not character.isalpha():
        return None
    name = unicodedata.name(unicodedata.normalize("NFKC", character)[0], "").partition(" ")[0]
    return "KANA" if name in ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA") else name or None


def scripts(text: str) -> Counter[str]:
    """Letters of a text by script."""
    return Counter(script for character in text if (script := script_of(character)) is not None)


def language_scorer(source: LanguageSource) -> FunctionScorer:
    """Share of the response's letters in the scripts of the prompt's last message of the user.

    A rule of scripts: it tells Russian from English, not French from English.
    """

    def score(item: Item) -> Scored:
        turns = prompt_turns(item)
        asked = scripts(next((turn.content for turn in reversed(turns) if turn.role == "user"), turns[-1].content))
        given = scripts(response_text(item))
        for name, counts in (("prompt", asked), ("response", given)):
            if not counts:
                raise ItemFailure(ErrorCode.NO_LETTERS, f"the {name} has no letters: its script is not known")
        wanted = {script for script, count in asked.items() if count >= source.prompt_share * asked.total()}
        share = sum(count for script, count in given.items() if script in wanted) / given.total()
        value = share if source.threshold is None else float(share >= source.threshold)
        return ok(value, {"share": share})

    return FunctionScorer(revision_of(source), score)
