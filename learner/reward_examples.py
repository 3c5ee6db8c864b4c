"""Labelled records -> token ids and targets, through `services/scoring_format.py` alone.

What an epoch repeats, leaves out or weighs is settled here as well, so that training sees a plain list of examples.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from learner.reward_metrics import PROBES
from learner.reward_model_config import RewardModelSection
from learner.reward_sampling import (
    aggregate,
    even_weights,
    over_sample,
    paraphrase_rating,
    stratum,
    under_sample,
)
from services.errors import UserError
from services.scoring_format import Encoded, InputTooLong, ScorerFormat, TemplateRefused, encode, encode_steps
from services.scoring_format import Example as Input
from services.text.preference_data import Asked, Comparison, Labelled, Rating, Steps

Similarity = Callable[[Sequence[tuple[str, str]]], list[float]]
"""Cosines of the embeddings of pairs of texts."""


@dataclass(frozen=True)
class Example:
    """One unit of the loss.

    inputs       token ids: one a response of a comparison, one of a rating or of a response with steps
    targets      comparison: the ranks (smaller is better); rating: one number in [0, 1]; steps: a class a step
    weights      comparison and rating: one; steps: one a step
    step_ends    of steps: index in the input of each step's last token
    probability  of a comparison: that the better one is preferred
    """

    inputs: tuple[tuple[int, ...], ...]
    targets: tuple[float, ...]
    weights: tuple[float, ...]
    step_ends: tuple[int, ...] = ()
    probability: float = 1.0


@dataclass(frozen=True)
class Encoding:
    """`cut` is the number of inputs whose conversation lost its beginning."""

    examples: list[Example]
    cut: int


def encode_records(
    records: Sequence[Labelled],
    tokenizer: Any,
    form: ScorerFormat,
    section: RewardModelSection,
    *,
    end: int | None = None,
) -> Encoding:
    """All records as examples, every one of its own weight. UserError names the record that cannot be encoded.

    `end`: an id that every input must have once, as an encoder-decoder is scored at its end of sequence.
    """
    cut = 0
    examples: list[Example] = []
    for record in records:
        encoded, example = _encode(record, tokenizer, form, section)
        cut += sum(bool(each.flags) for each in encoded)
        for each in encoded:
            if end is not None and each.ids.count(end) != 1:
                raise UserError(
                    f"{record.asked.where}: the input has {each.ids.count(end)} end-of-sequence tokens; an "
                    "encoder-decoder is scored at its only one, which the tokenizer writes"
                )
        examples.append(example)
    return Encoding(examples, cut)


def prepared(examples: Sequence[Example], section: RewardModelSection, seed: int) -> list[Example]:
    """What is trained on: over- or under-sampled, and weighed, by the section. Held-out examples stay as they are."""
    if section.shape == "ratings":
        strata = [stratum(example.targets[0], section.strata) for example in examples]
        places = list(range(len(examples)))
        if section.sampling == "over":
            places = over_sample(strata, seed)
        elif section.sampling == "under":
            places = under_sample(strata, section.under_ratio, seed)
        chosen = [examples[place] for place in places]
        return _reweighed(chosen, [[strata[place]] for place in places]) if section.balance else chosen
    if section.shape == "steps" and section.balance:
        return _reweighed(examples, [[int(target) for target in example.targets] for example in examples])
    return list(examples)


def _reweighed(examples: Sequence[Example], strata: Sequence[Sequence[int]]) -> list[Example]:
    weights = iter(even_weights([each for row in strata for each in row]))
    return [replace(example, weights=tuple(own * next(weights) for own in example.weights)) for example in examples]


def rated(record: Rating, section: RewardModelSection) -> float:
    """The rating in [0, 1]: several labels aggregated, and the range of the data mapped to it. UserError."""
    low, high = section.label_range
    named = record.labels or {"rating": cast(float, record.rating)}
    for name, value in named.items():
        if not low <= value <= high:
            raise UserError(
                f"{record.asked.where}: {name} is {value:g}, allowed are {low:g} to {high:g} (reward_model.label_range)"
            )
    scaled = {name: (value - low) / (high - low) for name, value in named.items()}
    if not record.labels:
        return scaled["rating"]
    if not section.label_weights:
        raise UserError(
            f"{record.asked.where}: has labels {', '.join(named)}, and reward_model.label_weights says of none what it "
            "weighs"
        )
    try:
        return aggregate(scaled, section.label_weights)
    except ValueError as error:
        raise UserError(f"{record.asked.where}: {error}") from error


def with_paraphrases(
    records: Sequence[Labelled], section: RewardModelSection, similarity: Similarity
) -> list[Labelled]:
    """The records and, after each rating, its paraphrases with the rating that is left to them.

    `similarity` is asked where the data does not say it. Languages are compared where both are named; one alone is an
    error, for a match would be a guess.
    """
    asked = [
        (record.response, paraphrase.text)
        for record in records
        if isinstance(record, Rating)
        for paraphrase in record.paraphrases
        if paraphrase.similarity is None
    ]
    computed = iter(similarity(asked) if asked else [])
    low, high = section.label_range
    found: list[Labelled] = []
    for record in records:
        found.append(record)
        for paraphrase in record.paraphrases if isinstance(record, Rating) else ():
            assert isinstance(record, Rating)
            if (record.language is None) != (paraphrase.language is None):
                raise UserError(
                    f"{record.asked.where}: language is given for one of response and paraphrase; give both or none"
                )
            near = next(computed) if paraphrase.similarity is None else paraphrase.similarity
            same = record.language == paraphrase.language
            rating = paraphrase_rating(rated(record, section), near, same, section.other_language)
            found.append(Rating(record.asked, paraphrase.text, low + rating * (high - low), {}, paraphrase.language))
    return found


def probes_of(records: Sequence[Labelled], count: int, seed: int) -> list[Comparison]:
    """At most `count` prompts with a best, a bad, an irrelevant and a meaningless answer, ranked in this order.

    Best and bad are a prompt's own highest answer and the next below it, the irrelevant one is the best of another
    prompt, and the meaningless one is its own best with every word's letters drawn anew. Steps have no probes.
    """
    ends = _best_and_next(records)
    draw = random.Random(f"probes:{seed}")
    draw.shuffle(ends)
    half = len(ends) // 2
    if half == 0:
        return []
    found: list[Comparison] = []
    for place, (asked, best, bad) in enumerate(ends[:count]):
        other, irrelevant, _ = ends[(place + half) % len(ends)]
        if other.key == asked.key:
            continue
        nonsense = " ".join("".join(draw.choice("bcdfghjklmnpqrstvwxz") for _ in word) for word in best.split())
        found.append(Comparison(asked, (best, bad, irrelevant, nonsense), tuple(range(len(PROBES)))))
    return found


def _best_and_next(records: Sequence[Labelled]) -> list[tuple[Asked, str, str]]:
    """(asked, best, next below it) of comparisons, and of prompts that have several ratings."""
    answers: dict[str, tuple[Asked, list[tuple[float, str]]]] = {}
    for place, record in enumerate(records):
        if isinstance(record, Comparison) and record.probability > 0.5:
            ranked = [(float(rank), text) for rank, text in zip(record.ranks, record.responses, strict=True)]
            answers[f"{place}"] = (record.asked, ranked)
        elif isinstance(record, Rating) and record.rating is not None:
            answers.setdefault(record.asked.key, (record.asked, []))[1].append((-record.rating, record.response))
    ends: list[tuple[Asked, str, str]] = []
    for asked, ranked in answers.values():
        best = min(ranked)
        below = min((answer for answer in ranked if answer[0] > best[0]), default=None)
        if below is not None:
            ends.append((asked, best[1], below[1]))
    return ends


def _encode(
    record: Labelled, tokenizer: Any, form: ScorerFormat, section: RewardModelSection
) -> tuple[list[Encoded], Example]:
    asked = record.asked
    if form.kind == "principle" and not asked.principles:
        raise UserError(f"{asked.where}: principles is empty, and reward_model.kind principle judges by them")
    if isinstance(record, Comparison) and section.comparison_loss == "plackett_luce":
        if record.probability == 0.5:  # a tie, which this loss knows by equal ranks
            record = replace(record, ranks=(0, 0), probability=1.0)
        elif record.probability < 1:
            raise UserError(
                f"{asked.where}: label_prob is a soft label; reward_model.comparison_loss all_pairs takes those"
            )
    # As in serving: models of the other kinds are never shown principles, which data that a judge made always has.
    principles = asked.principles if form.kind == "principle" else ()
    responses = record.responses if isinstance(record, Comparison) else (record.response,)
    encoded: list[Encoded] = []
    for response in responses:
        given = Input(asked.turns, response, principles, asked.facts if form.facts else ())
        try:
            encoded.append((encode_steps if isinstance(record, Steps) else encode)(tokenizer, form, given))
        except (InputTooLong, TemplateRefused) as error:
            raise UserError(f"{asked.where}: {error}") from error
    inputs = tuple(each.ids for each in encoded)
    if isinstance(record, Comparison):
        targets = tuple(float(rank) for rank in record.ranks)
        return encoded, Example(inputs, targets, (asked.weight,), probability=record.probability)
    if isinstance(record, Rating):
        return encoded, Example(inputs, (rated(record, section),), (asked.weight,))
    ends = encoded[0].step_ends
    if len(ends) != len(record.labels):
        raise UserError(
            f"{asked.where}: step_labels has {len(record.labels)} labels, and the response has {len(ends)} steps by "
            f"reward_model.step_rule"
        )
    return encoded, Example(
        inputs, tuple(float(label) for label in record.labels), (asked.weight,) * len(ends), step_ends=ends
    )
