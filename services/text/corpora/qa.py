"""The generated question/answer corpus: single-sentence questions, answers that take up the question's words.

The shape is the published one of CAGSR (arXiv 2502.10482): 10,000 pairs, questions of 5 to 20 tokens, answers of 3
to 40, split 80/10/10. Some 700 atomic facts are asked for in many phrasings and combinations, so that a model of a
few million parameters can learn them in minutes, and a held-out question combines known facts and known phrasings
in a new way.
"""

from itertools import combinations

from services.text.corpora import facts
from services.text.corpora.pairs import Pair, choose, hold_out, sentence, upper_first

SHARES = {
    "country": 3350,
    "country_reverse": 450,
    "country_two": 1500,
    "country_same": 1000,
    "country_larger": 600,
    "element": 650,
    "element_reverse": 250,
    "element_compare": 500,
    "month": 500,
    "weekday": 250,
    "unit": 600,
    "holiday": 350,
}

# attribute -> the words that ask for it
NOUNS = {
    "capital": ("capital", "capital city"),
    "continent": ("continent",),
    "currency": ("currency", "official currency"),
    "language": ("main language",),
    "calling_code": ("telephone code", "calling code"),
    "code": ("two-letter code",),
    "domain": ("internet domain",),
}

FRAMES = (
    "What is the {noun} of {country}?",
    "Can you tell me the {noun} of {country}?",
    "Could you tell me what the {noun} of {country} is?",
    "Do you know the {noun} of {country}?",
    "Please, what is the {noun} of {country}?",
    "Would you please name the {noun} of {country}?",
    "For {country}, what is the {noun}?",
    "What would you say is the {noun} of {country}?",
    "I want to know, what is the {noun} of {country}?",
    "Which {noun} does {country} have?",
)

COUNT_WORDS = ("one", "two", "three", "four", "five", "six")
LARGER_BY = 1.3
"""Areas are compared only where sources cannot disagree about which is larger."""


def generate_qa(
    seed: int, n: int = 10_000, *, validation_fraction: float = 0.1, test_fraction: float = 0.1
) -> list[Pair]:
    """`n` question/answer pairs with unique questions, shuffled, with their splits. A function of its arguments and of
    the libraries' versions. Raises ValueError for an `n` that the phrasings do not give."""
    pools = {
        "country": _country(),
        "country_reverse": _country_reverse(),
        "country_two": _country_two(),
        "country_same": _country_same(),
        "country_larger": _country_larger(),
        "element": _element(),
        "element_reverse": _element_reverse(),
        "element_compare": _element_compare(),
        "month": _month(),
        "weekday": _weekday(),
        "unit": _unit(),
        "holiday": _holiday(),
    }
    return hold_out(choose(pools, SHARES, n, seed), validation_fraction, test_fraction, seed)


def _pair(kind: str, question: str, answer: str, known: tuple[str, ...], combination: str | None = None) -> Pair:
    question = upper_first(question)
    return Pair(question, sentence(answer), kind, known, combination or f"{kind}:{question}")


def _fact(country: facts.Country, attribute: str) -> str:
    return f"{country.code}.{attribute}"


def _value(country: facts.Country, attribute: str) -> str:
    return str(getattr(country, attribute))


def _country() -> list[Pair]:
    return [
        _pair(
            "country",
            frame.format(noun=noun, country=country.name),
            f"the {noun} of {country.name} is {_value(country, attribute)}",
            (_fact(country, attribute),),
        )
        for country in facts.countries()
        for attribute, nouns in NOUNS.items()
        for noun in nouns
        for frame in FRAMES
    ]


def _country_reverse() -> list[Pair]:
    frames = (
        "Which country has the {noun} {value}?",
        "What country has the {noun} {value}?",
        "Can you name the country with the {noun} {value}?",
        "Do you know which country has the {noun} {value}?",
    )
    return [
        _pair(
            "country_reverse",
            frame.format(noun=noun, value=_value(country, attribute)),
            f"the country with the {noun} {_value(country, attribute)} is {country.name}",
            (_fact(country, attribute),),
        )
        for country in facts.countries()
        for attribute in ("capital", "code", "domain")
        for noun in NOUNS[attribute]
        for frame in frames
        if not (attribute == "capital" and _value(country, attribute) in country.name)
    ]


def _country_two() -> list[Pair]:
    frames = (
        "What are the {a} and the {b} of {country}?",
        "Can you tell me the {a} and the {b} of {country}?",
        "For {country}, what are the {a} and the {b}?",
        "Do you know the {a} and the {b} of {country}?",
    )
    found: list[Pair] = []
    for country in facts.countries():
        for one, other in combinations(NOUNS, 2):
            a, b = NOUNS[one][0], NOUNS[other][0]
            found += [
                _pair(
                    "country_two",
                    frame.format(a=a, b=b, country=country.name),
                    f"the {a} of {country.name} is {_value(country, one)} and the {b} is {_value(country, other)}",
                    (_fact(country, one), _fact(country, other)),
                    f"two:{country.code}:{one}:{other}",
                )
                for frame in frames
            ]
    return found


# attribute -> question frames; answer where it is the same; answer where it is not
SAME = {
    "continent": (
        ("Are {x} and {y} on the same continent?", "Do {x} and {y} lie on the same continent?"),
        "yes, {x} and {y} are both in {v}",
        "no, {x} is in {v} and {y} is in {w}",
    ),
    "currency": (
        ("Do {x} and {y} use the same currency?", "Do people in {x} and {y} pay with the same currency?"),
        "yes, {x} and {y} both use {v}",
        "no, {x} uses {v} and {y} uses {w}",
    ),
    "language": (
        ("Do {x} and {y} have the same main language?", "Do people in {x} and {y} speak the same main language?"),
        "yes, people in {x} and {y} both speak {v}",
        "no, people in {x} speak {v} and people in {y} speak {w}",
    ),
}


def _country_same() -> list[Pair]:
    alike: list[Pair] = []
    different: list[Pair] = []
    for attribute, (frames, yes, no) in SAME.items():
        for x, y in combinations(facts.countries(), 2):
            v, w = _value(x, attribute), _value(y, attribute)
            for frame in frames:
                pair = _pair(
                    "country_same",
                    frame.format(x=x.name, y=y.name),
                    (yes if v == w else no).format(x=x.name, y=y.name, v=v, w=w),
                    (_fact(x, attribute), _fact(y, attribute)),
                    f"same:{attribute}:{x.code}:{y.code}",
                )
                (alike if v == w else different).append(pair)
    # As many of the one as of the other: else "no" would be the better guess whatever the countries.
    stride = len(different) // len(alike)
    return alike + different[:: stride or 1][: len(alike)]


def _country_larger() -> list[Pair]:
    frames = (
        "Which country is larger, {x} or {y}?",
        "Which is the larger country, {x} or {y}?",
        "Which of {x} and {y} is larger?",
    )
    found: list[Pair] = []
    for x, y in combinations(facts.countries(), 2):
        if not x.area * LARGER_BY < y.area and not y.area * LARGER_BY < x.area:
            continue
        big, small = (x, y) if x.area > y.area else (y, x)
        found += [
            _pair(
                "country_larger",
                frame.format(x=x.name, y=y.name),
                f"{big.name} is larger than {small.name}",
                (_fact(x, "area"), _fact(y, "area")),
                f"larger:{x.code}:{y.code}",
            )
            for frame in frames
        ]
    return found


def _element() -> list[Pair]:
    frames = (
        "What is the {noun} of {element}?",
        "Can you tell me the {noun} of {element}?",
        "Do you know the {noun} of {element}?",
        "Please, what is the {noun} of {element}?",
        "For the element {element}, what is the {noun}?",
        "Which {noun} does the element {element} have?",
        "Could you tell me what the {noun} of {element} is?",
        "Would you please name the {noun} of {element}?",
    )
    return [
        _pair(
            "element",
            frame.format(noun=noun, element=element.name),
            f"the {noun} of {element.name} is {value}",
            (f"{element.symbol}.{noun}",),
        )
        for element in facts.elements()
        for noun, value in (("chemical symbol", element.symbol), ("atomic number", element.number))
        for frame in frames
    ]


def _element_reverse() -> list[Pair]:
    frames = (
        "Which element has the {noun} {value}?",
        "What element has the {noun} {value}?",
        "Can you name the element with the {noun} {value}?",
        "Do you know which element has the {noun} {value}?",
    )
    return [
        _pair(
            "element_reverse",
            frame.format(noun=noun, value=value),
            f"the element with the {noun} {value} is {element.name}",
            (f"{element.symbol}.{noun}",),
        )
        for element in facts.elements()
        for noun, value in (("chemical symbol", element.symbol), ("atomic number", element.number))
        for frame in frames
    ]


def _element_compare() -> list[Pair]:
    frames = (
        "Which element has the higher atomic number, {x} or {y}?",
        "Which of {x} and {y} has the higher atomic number?",
        "Does {x} or {y} have the higher atomic number?",
    )
    found: list[Pair] = []
    for x, y in combinations(facts.elements(), 2):
        low, high = sorted((x, y), key=lambda element: element.number)
        found += [
            _pair(
                "element_compare",
                frame.format(x=x.name, y=y.name),
                f"{high.name} has the higher atomic number, {high.number}, and {low.name} has {low.number}",
                (f"{x.symbol}.atomic number", f"{y.symbol}.atomic number"),
                f"higher:{x.symbol}:{y.symbol}",
            )
            for frame in frames
        ]
    return found


def _steps(names: tuple[str, ...], unit: str, kind: str) -> list[Pair]:
    found: list[Pair] = []
    for place, name in enumerate(names):
        for count, word in enumerate(COUNT_WORDS, start=1):
            plural = unit if count == 1 else f"{unit}s"
            for direction, sign in (("after", 1), ("before", -1)):
                answer = names[(place + sign * count) % len(names)]
                found += [
                    _pair(
                        kind,
                        frame.format(word=word, plural=plural, direction=direction, name=name),
                        f"{answer} comes {word} {plural} {direction} {name}",
                        (f"{kind}.{name}", f"{kind}.{answer}"),
                    )
                    for frame in (
                        f"Which {unit} comes {{word}} {{plural}} {{direction}} {{name}}?",
                        f"What {unit} is {{word}} {{plural}} {{direction}} {{name}}?",
                        f"Can you tell me which {unit} comes {{word}} {{plural}} {{direction}} {{name}}?",
                    )
                ]
    return found


def _weekday() -> list[Pair]:
    return _steps(facts.weekdays(), "day", "weekday")


def _month() -> list[Pair]:
    found = _steps(facts.months(), "month", "month")
    for number, name in enumerate(facts.months(), start=1):
        days = facts.days_in_month(number)
        common = " in a common year" if name == "February" else ""
        for frame in (
            "How many days does {name} have{common}?",
            "How many days are there in {name}{common}?",
            "Can you tell me how many days {name} has{common}?",
            "Do you know how many days {name} has{common}?",
            "What is the number of days of {name}{common}?",
        ):
            question = frame.format(name=name, common=common)
            found.append(_pair("month", question, f"{name} has {days} days{common}", (f"days.{name}",)))
        for frame in (
            "Which place in the year has {name}?",
            "What is the number of {name} in the year?",
            "Can you tell me which number {name} has in the year?",
            "Do you know the number of {name} in the year?",
        ):
            found.append(
                _pair("month", frame.format(name=name), f"{name} is month {number} of the year", (f"number.{name}",))
            )
    return found


def _unit() -> list[Pair]:
    frames = (
        "How many {small} are in {count} {large}?",
        "How many {small} are there in {count} {large}?",
        "Can you tell me how many {small} are in {count} {large}?",
        "How many {small} make {count} {large}?",
        "If I have {count} {large}, how many {small} is that?",
    )
    return [
        _pair(
            "unit",
            frame.format(small=unit.smaller, large=unit.larger, count=count),
            f"there are {count * unit.factor} {unit.smaller} in {count} {unit.larger}",
            (f"unit.{unit.larger}.{unit.smaller}",),
            f"unit:{unit.larger}:{unit.smaller}:{count}",
        )
        for unit in facts.conversions()
        for count in range(2, 13)
        for frame in frames
    ]


def _holiday() -> list[Pair]:
    found: list[Pair] = []
    for holiday in facts.holidays():
        known = (f"{holiday.country}.{holiday.name}",)
        for frame in (
            "On which date is {name} celebrated in {country}?",
            "On what date does {country} celebrate {name}?",
            "When does {country} celebrate {name}?",
            "Can you tell me when {country} celebrates {name}?",
            "Do you know the date of {name} in {country}?",
        ):
            question = frame.format(name=holiday.name, country=holiday.country)
            answer = f"{holiday.country} celebrates {holiday.name} on {holiday.day} {holiday.month}"
            found.append(_pair("holiday", question, answer, known))
        for frame in ("In which month does {country} celebrate {name}?", "In what month is {name} in {country}?"):
            question = frame.format(name=holiday.name, country=holiday.country)
            found.append(
                _pair("holiday", question, f"{holiday.country} celebrates {holiday.name} in {holiday.month}", known)
            )
    return found
