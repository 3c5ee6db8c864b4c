"""The generated instruction corpus: brainstorming, explanation, short composition, a third each.

The shape is the published one of CAGSR (arXiv 2502.10482), 5,000 pairs; the facts are those of the questions.
"""

from services.text.corpora import facts
from services.text.corpora.pairs import Pair, choose, hold_out, sentence

SHARES = {"brainstorming": 1, "explanation": 1, "composition": 1}

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo", "Ida", "Jack", "Lena", "Max")
TRIPS = ("summer", "winter", "family", "school", "short", "long")
AUDIENCES = ("a child", "a friend", "a tourist", "a student", "a colleague")
EVENTS = ("dinner", "lunch", "a walk", "a meeting", "a game")
NOUNS = {
    "capital": "capital",
    "continent": "continent",
    "currency": "currency",
    "language": "main language",
    "calling_code": "calling code",
    "domain": "internet domain",
}
COUNT_WORDS = {2: "two", 3: "three"}


def generate_instructions(
    seed: int, n: int = 5_000, *, validation_fraction: float = 0.1, test_fraction: float = 0.1
) -> list[Pair]:
    """`n` instruction/response pairs with unique instructions, shuffled, with their splits; as `generate_qa`."""
    pools = {"brainstorming": _brainstorming(), "explanation": _explanation(), "composition": _composition()}
    return hold_out(choose(pools, SHARES, n, seed), validation_fraction, test_fraction, seed)


def _pair(kind: str, prompt: str, response: str, *known: str) -> Pair:
    return Pair(prompt, sentence(response), kind, known, f"{kind}:{prompt}")


def _joined(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _brainstorming() -> list[Pair]:
    kind = "brainstorming"
    found: list[Pair] = []
    for country in facts.countries():
        for trip in TRIPS:
            response = (
                f"ideas for a {trip} trip to {country.name}: visit {country.capital}, speak {country.language} "
                f"and pay with "
                f"{country.currency}"
            )
            found += [
                _pair(
                    kind, frame, response, *(f"{country.code}.{part}" for part in ("capital", "language", "currency"))
                )
                for frame in (
                    f"Brainstorm ideas for a {trip} trip to {country.name}.",
                    f"Suggest some ideas for a {trip} trip to {country.name}.",
                    f"Give me ideas for a {trip} trip to {country.name}.",
                    f"I plan a {trip} trip to {country.name}, what could I do there?",
                )
            ]
        neighbours = [other for other in facts.countries() if other.continent == country.continent]
        place = neighbours.index(country)
        for count, word in COUNT_WORDS.items():
            others = [neighbours[(place + step) % len(neighbours)] for step in range(1, count + 1)]
            if country in others:
                continue
            response = f"{_joined([other.name for other in others])} are in {country.continent} too"
            found += [
                _pair(kind, frame, response, *(f"{other.code}.continent" for other in (country, *others)))
                for frame in (
                    f"Brainstorm {word} countries on the same continent as {country.name}.",
                    f"Suggest {word} countries on the continent of {country.name}.",
                    f"List {word} other countries in {country.continent} beside {country.name}.",
                )
            ]
    elements = facts.elements()
    for place in range(3, len(elements)):
        lower = [element.name for element in elements[place - 3 : place]]
        response = f"{_joined(lower)} have a lower atomic number than {elements[place].name}"
        found += [
            _pair(
                kind,
                frame,
                response,
                *(f"{element.symbol}.atomic number" for element in elements[place - 3 : place + 1]),
            )
            for frame in (
                f"Brainstorm three elements with a lower atomic number than {elements[place].name}.",
                f"List three elements that come before {elements[place].name}.",
                f"Suggest three elements with fewer protons than {elements[place].name}.",
            )
        ]
    days = facts.weekdays()
    for place, day in enumerate(days):
        first, second = days[(place + 1) % 7], days[(place + 2) % 7]
        for name in NAMES:
            found += [
                _pair(kind, frame, f"you could meet {name} on {first} or {second}", f"weekday.{day}")
                for frame in (
                    f"Suggest two days after {day} on which to meet {name}.",
                    f"Brainstorm two days after {day} for a meeting with {name}.",
                )
            ]
    return found


def _explanation() -> list[Pair]:
    kind = "explanation"
    found: list[Pair] = []
    for country in facts.countries():
        for attribute, noun in NOUNS.items():
            value = str(getattr(country, attribute))
            for audience in AUDIENCES:
                response = f"tell {audience} that the {noun} of {country.name} is {value}"
                found += [
                    _pair(kind, frame, response, f"{country.code}.{attribute}")
                    for frame in (
                        f"Explain to {audience} what the {noun} of {country.name} is.",
                        f"How would you explain the {noun} of {country.name} to {audience}?",
                    )
                ]
        response = f"{country.capital} is the capital of {country.name}, a country in {country.continent}"
        found += [
            _pair(kind, frame, response, f"{country.code}.capital", f"{country.code}.continent")
            for frame in (
                f"Explain where {country.capital} is.",
                f"Explain what {country.capital} is known for.",
                f"Describe in one sentence where {country.capital} lies.",
            )
        ]
    for unit in facts.conversions():
        for count in range(2, 13):
            response = (
                f"to convert {count} {unit.larger} to {unit.smaller}, multiply {count} by {unit.factor}, which gives "
                f"{count * unit.factor} {unit.smaller}"
            )
            found += [
                _pair(kind, frame, response, f"unit.{unit.larger}.{unit.smaller}")
                for frame in (
                    f"Explain how to convert {count} {unit.larger} to {unit.smaller}.",
                    f"Explain how many {unit.smaller} are in {count} {unit.larger}.",
                    f"Describe how {count} {unit.larger} become {unit.smaller}.",
                )
            ]
    elements = facts.elements()
    for element in elements:
        known = (f"{element.symbol}.atomic number", f"{element.symbol}.chemical symbol")
        response = (
            f"{element.symbol} is the chemical symbol of {element.name}, the element with the atomic "
            f"number {element.number}"
        )
        found += [
            _pair(kind, frame, response, *known)
            for frame in (
                f"Explain what the chemical symbol {element.symbol} means.",
                f"Explain the meaning of {element.symbol} in chemistry.",
                f"Describe what {element.symbol} stands for in chemistry.",
            )
        ]
    return found


def _composition() -> list[Pair]:
    kind = "composition"
    found: list[Pair] = []
    for country in facts.countries():
        for name in NAMES:
            response = (
                f"dear {name}, greetings from {country.capital}, the capital of {country.name}, where "
                f"people speak {country.language}"
            )
            found += [
                _pair(kind, frame, response, f"{country.code}.capital", f"{country.code}.language")
                for frame in (
                    f"Write a postcard from {country.capital} to {name}.",
                    f"Write {name} a short postcard from {country.capital}.",
                )
            ]
        response = (
            f"{country.name} lies in {country.continent}. Its capital is {country.capital}, and people there speak "
            f"{country.language} and pay with {country.currency}"
        )
        found += [
            _pair(
                kind,
                frame,
                response,
                *(f"{country.code}.{part}" for part in ("continent", "capital", "language", "currency")),
            )
            for form in ("text", "note", "introduction")
            for frame in (
                f"Write a short {form} about {country.name}.",
                f"Compose a short {form} about {country.name}.",
                f"Please write a {form} of two sentences about {country.name}.",
            )
        ]
    for element in facts.elements():
        response = (
            f"{element.name} is a chemical element. Its symbol is {element.symbol} and its atomic number "
            f"is {element.number}"
        )
        found += [
            _pair(kind, frame, response, f"{element.symbol}.atomic number", f"{element.symbol}.chemical symbol")
            for form in ("text", "note", "introduction")
            for frame in (
                f"Write a short {form} about the element {element.name}.",
                f"Compose a short {form} about the element {element.name}.",
            )
        ]
    for holiday in facts.holidays():
        for name in NAMES:
            found.append(
                _pair(
                    kind,
                    f"Write a reminder of {holiday.name} in {holiday.country} for {name}.",
                    f"dear {name}, remember that {holiday.country} celebrates {holiday.name} on {holiday.day} "
                    f"{holiday.month}",
                    f"{holiday.country}.{holiday.name}",
                )
            )
    days = facts.weekdays()
    for place, day in enumerate(days):
        for name in NAMES:
            for event in EVENTS:
                response = f"dear {name}, please come to {event} on {day}, the day after {days[place - 1]}"
                found.append(
                    _pair(kind, f"Write an invitation to {event} on {day} for {name}.", response, f"weekday.{day}")
                )
    return found
