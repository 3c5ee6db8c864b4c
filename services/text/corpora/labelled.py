"""Generated labelled responses, with a ground truth that is known because it was put there.

The prompts are the generated questions about countries. What is better is a rule, written down beside each corpus, so
that the accuracy of a model that scores is measured against the truth and not against another opinion:

    generated:preferences  four answers in order: right, of a wrong value, to another question, of drawn letters
    generated:ratings      0.2 for words, 0.4 for this question, 0.8 for the right value, and 0.2 more for courtesy
    generated:principles   two answers that differ in brevity, courtesy, certainty and excitement, and principles; the
                           one with the largest difference decides. Each pair comes twice, the second time with its
                           principles turned round, so that nothing in the answers alone is better
    generated:usual_principles
                           the same as people mostly ask: one principle, which names what there is to be more of, and
                           seldom a negation; to be learnt before generated:principles (`reward_model.pretrain`)
    generated:steps        what comes next among days, months and numbers, a line a step; a line is correct if what it
                           names does come next, and neutral if it names nothing

The records are those of `services/text/preference_data.py`; held-out ones have questions of the held-out split.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

from services.errors import UserError
from services.text.corpora import facts
from services.text.corpora.pairs import Pair
from services.text.corpora.qa import generate_qa
from services.text.readers import Row

ATTRIBUTES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "brevity": (("brief", "short", "concise"), ("long", "detailed", "wordy")),
    "courtesy": (("polite", "courteous", "friendly"), ("rude", "impolite", "hostile")),
    "certainty": (("certain", "confident", "sure"), ("doubtful", "hesitant", "unsure")),
    "excitement": (("excited", "lively", "eager"), ("calm", "quiet", "sober")),
}
"""Attribute -> words for much of it, and for its opposite."""

FRAMES = (
    ("The answer should be {a}.", "The answer should not be {a}."),
    ("A good answer is {a}.", "A good answer is not {a}."),
    ("Prefer {a} answers.", "Avoid {a} answers."),
    ("I like an answer that is {a}.", "I do not like an answer that is {a}."),
)
"""Wordings that ask for something and wordings that turn it round; training sees these."""

HELD_OUT_FRAMES = (
    ("I like {a} answers.", "I do not like {a} answers."),
    ("A good answer should be {a}.", "A good answer should not be {a}."),
    ("Prefer an answer that is {a}.", "Avoid an answer that is {a}."),
)
"""Wordings that held-out records have and no training record."""

MARKS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "courtesy": (
        ("Thank you for asking.", "With pleasure.", "Please let me know if I can help."),
        ("What a silly question.", "Leave me alone.", "Look it up yourself."),
    ),
    "certainty": (
        ("I am certain of it.", "This is well known.", "Without any doubt."),
        ("But I may be wrong.", "Perhaps it is otherwise.", "I am only guessing."),
    ),
    "excitement": (("Wow!", "How wonderful!", "Amazing!"), ("Well.", "So it is.", "That is all.")),
}
"""Sentences that give an answer much of an attribute, or its opposite."""
PADDING = (
    "There is more to be said about this.",
    "Many people have asked about it before.",
    "One could look at it from several sides.",
    "It has been so for quite some time.",
)

CIRCLES = (
    ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    (
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ),
    ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
)
"""After the last comes the first."""

PAIRS = 2
"""Pairs of answers to each question of the principles' corpora."""
SELDOM = 0.25
"""How often a usual principle asks for the opposite, and how often by a negation. Away from one half each says
something alone, and a model finds the rule by way of what is usual; from even odds it has to find all of it at once."""

LETTERS = "bcdfghjklmnpqrstvwxz"


def generate_labelled(source: str, seed: int) -> list[Row]:
    """The records of `source`, one of GENERATED, in a random order by the seed. UserError: there is no such corpus."""
    if source not in GENERATED:
        raise UserError(f"reward_model.source: {source!r} is not one of {', '.join(GENERATED)}")
    rows = GENERATED[source](_questions(seed), Random(f"{source}:{seed}"))
    return [Row(f"{source} row {place}", row, None) for place, row in enumerate(rows, start=1)]


@lru_cache(maxsize=2)
def _questions(seed: int) -> tuple[Pair, ...]:
    return tuple(pair for pair in generate_qa(seed) if pair.kind == "country")


def _preferences(questions: Sequence[Pair], draw: Random) -> list[dict[str, Any]]:
    return [_record(pair, responses=list(_four(pair, questions, draw))) for pair in questions]


def _ratings(questions: Sequence[Pair], draw: Random) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for pair in questions:
        # Uneven as ratings are: most answers are good ones.
        for place in draw.choices(range(4), weights=(6, 2, 1, 1), k=3):
            text = _four(pair, questions, draw)[place]
            rating = (0.8, 0.4, 0.2, 0.0)[place]
            if place < 2 and draw.random() < 0.5:
                text, rating = f"{text} {draw.choice(MARKS['courtesy'][0])}", rating + 0.2
            rows.append(_record(pair, response=text, rating=round(rating, 1)))
    return rows


def _principles(questions: Sequence[Pair], draw: Random) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for pair in questions:
        for _ in range(PAIRS):
            # Mostly one principle; a second one now and then, which may be about what the answers do not differ in.
            asked = draw.sample(sorted(ATTRIBUTES), draw.choice((1, 1, 1, 2)))
            answers = [draw_answer(pair.response, asked, draw) for _ in range(2)]
            turned = {name: draw.random() < 0.5 for name in asked}
            for turn in (False, True):
                rows += _compared(pair, answers, {name: turned[name] != turn for name in asked}, draw)
    return rows


def _usual_principles(questions: Sequence[Pair], draw: Random) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for pair in questions:
        for _ in range(PAIRS):
            name = draw.choice(sorted(ATTRIBUTES))
            answers = [draw_answer(pair.response, [name], draw) for _ in range(2)]
            rows += _compared(pair, answers, {name: draw.random() < SELDOM}, draw, negated=SELDOM)
    return rows


def _compared(
    pair: Pair, answers: Sequence["Answer"], turned: Mapping[str, bool], draw: Random, negated: float = 0.5
) -> list[dict[str, Any]]:
    """The record of two answers by principles (attribute -> whether its opposite is asked for); none where nothing
    decides, or two do."""
    frames = FRAMES if pair.split == "train" else HELD_OUT_FRAMES
    gaps = {name: answers[0].levels[name] - answers[1].levels[name] for name in turned}
    sizes = sorted((abs(gap) for gap in gaps.values()), reverse=True)
    if sizes[0] == 0 or sizes.count(sizes[0]) > 1:
        return []
    decides = max(gaps, key=lambda name: abs(gaps[name]))
    first = (gaps[decides] > 0) != turned[decides]
    return [
        _record(
            pair,
            chosen=answers[0 if first else 1].text,
            rejected=answers[1 if first else 0].text,
            principles=[principle(name, turned[name], frames, draw, negated) for name in turned],
            decided_by=decides,
            turned=turned[decides],
        )
    ]


@dataclass(frozen=True)
class Answer:
    """A text, and how much it has of each of ATTRIBUTES: -1 to 1, of brevity half its sentences after the first,
    negative."""

    text: str
    levels: Mapping[str, float]


def draw_answer(core: str, attributes: Sequence[str], draw: Random) -> Answer:
    """`core` with a mark of each of `attributes`, of its opposite, or none; where brevity is among them, with up to
    four sentences that say nothing. In random order."""
    levels: dict[str, float] = dict.fromkeys(ATTRIBUTES, 0)
    after: list[str] = []
    for name in attributes:
        if name == "brevity":
            after += draw.sample(PADDING, draw.randint(0, len(PADDING)))
        else:
            levels[name] = level = draw.randint(-1, 1)
            after += [draw.choice(MARKS[name][0 if level > 0 else 1])] if level else []
    draw.shuffle(after)
    return Answer(" ".join((core, *after)), {**levels, "brevity": -len(after) / 2})


def principle(
    attribute: str, turned: bool, frames: Sequence[tuple[str, str]], draw: Random, negated: float = 0.5
) -> str:
    """A sentence that asks for an attribute, or (`turned`) for its opposite: `negated` of them by a negation of the
    contrary word."""
    words, opposites = ATTRIBUTES[attribute]
    plain, negation = draw.choice(frames)
    if draw.random() < negated:
        return negation.format(a=draw.choice(words if turned else opposites))
    return plain.format(a=draw.choice(opposites if turned else words))


def _steps(questions: Sequence[Pair], draw: Random) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for pair in questions:  # of these only the split is taken, so that all corpora are of one size
        circle = draw.choice(CIRCLES)
        here = first = draw.randrange(len(circle))
        lines, labels = list[str](), list[str]()
        for _ in range(draw.randint(3, 5)):
            wrong = draw.random() < 0.3
            following = (here + (draw.randrange(2, len(circle)) if wrong else 1)) % len(circle)
            lines.append(f"After {circle[here]} comes {circle[following]}.")
            labels.append("incorrect" if wrong else "correct")
            here = following
            if draw.random() < 0.2:
                lines.append(draw.choice(("Let us go on.", "This is the next step.")))
                labels.append("neutral")
        row = {"prompt": f"Go on from {circle[first]}.", "response": "\n".join(lines), "step_labels": labels}
        rows.append({**row, "split": pair.split})
    return rows


def _record(pair: Pair, **values: Any) -> dict[str, Any]:
    return {"prompt": pair.prompt, **values, "split": pair.split}


def _four(pair: Pair, questions: Sequence[Pair], draw: Random) -> tuple[str, str, str, str]:
    """Right, of a wrong value, to another question, of drawn letters."""
    code, attribute = pair.facts[0].split(".", 1)
    values = {country.code: str(getattr(country, attribute)) for country in facts.countries()}
    others = sorted({value for value in values.values() if value != values[code]})
    wrong = pair.response.replace(values[code], draw.choice(others))
    other = draw.choice(questions)
    while other.facts == pair.facts or other.response == pair.response:
        other = draw.choice(questions)
    nonsense = " ".join("".join(draw.choice(LETTERS) for _ in word) for word in pair.response.split())
    return pair.response, wrong, other.response, nonsense


GENERATED: dict[str, Callable[[Sequence[Pair], Random], list[dict[str, Any]]]] = {
    "generated:preferences": _preferences,
    "generated:ratings": _ratings,
    "generated:principles": _principles,
    "generated:usual_principles": _usual_principles,
    "generated:steps": _steps,
}
