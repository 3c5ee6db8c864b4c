import math
from importlib.util import find_spec

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.errors import UserError
from services.records import Message, Prompt
from services.text.config import DataSection, SalienceSection
from services.text.render import Renderer
from services.text.salience import Idf, fit_idf, key_positions
from services.text.words import words_of

CORPUS = ["What is the capital of France?", "What is the currency of Japan?", "Do you know the capital of Japan?"]


def prompt_of(text, **fields):
    return Prompt(prompt_id="p" * 16, source="s", text=text, **fields)


def texts_at(rendered, positions):
    return [rendered.text[slice(*rendered.offsets[p])].strip() for p in positions]


def keys(tokenizer, text, salience, *, data=None, prompts=CORPUS, **fields):
    renderer = Renderer(tokenizer, data or DataSection())
    prompt = prompt_of(text, **fields)
    idf = fit_idf([prompt_of(t) for t in prompts], renderer, salience)
    rendered = renderer.render(prompt)
    return rendered, key_positions(rendered, prompt, salience, idf)


def test_words():
    assert [word for word, _, _ in words_of("All Saints' Day, two-letter CODE of the Netherlands' £5?")] == [
        "all", "saints", "day", "two-letter", "code", "of", "the", "netherlands", "5",
    ]  # fmt: skip
    assert words_of("ab cd", 3) == [("cd", 3, 5)]


def test_idf_is_the_formula_of_the_specification(decoder_tokenizer):
    renderer = Renderer(decoder_tokenizer, DataSection())
    idf = fit_idf([prompt_of(t) for t in CORPUS], renderer, SalienceSection(content="user"))
    assert idf.n == 3
    assert (idf.df["the"], idf.df["capital"], idf.df["france"]) == (3, 2, 1)
    assert idf.weight("capital") == pytest.approx(math.log(4 / 3) + 1)
    assert idf.weight("unseen") == pytest.approx(math.log(4) + 1)
    assert Idf.from_json(idf.to_json()) == idf
    for text in ("[]", "x", '{"schema_version": 2}', '{"schema_version": 1, "n": 1}'):
        with pytest.raises(UserError, match="salience"):
            Idf.from_json(text)


def test_a_word_counts_once_a_prompt_and_template_words_never_for_user(decoder_tokenizer):
    renderer = Renderer(decoder_tokenizer, DataSection())
    idf = fit_idf([prompt_of("user user User")], renderer, SalienceSection(content="user"))
    assert idf.df == {"user": 1}


def test_the_rarest_words_with_ties_by_first_position(decoder_tokenizer):
    text = "What is the capital of France?"
    rendered, found = keys(decoder_tokenizer, text, SalienceSection(content="user", top_k=1))
    assert texts_at(rendered, found.salient) == ["France"]
    # What, is, capital, of ... of 3: capital has df 2, like what and is, which stand before it.
    rendered, found = keys(decoder_tokenizer, text, SalienceSection(content="user", top_k=3))
    assert texts_at(rendered, found.salient) == ["What", "is", "France"]
    assert found.salient_weights == (1.0, 1.0, 1.0)


def test_all_sub_tokens_at_all_positions(subword_tokenizer):
    text = "Is Mongolia, or mongolia, the capital?"
    rendered, found = keys(
        subword_tokenizer, text, SalienceSection(content="user", top_k=1), prompts=["is or the capital"]
    )
    covered = "".join(texts_at(rendered, found.salient))
    assert covered == "Mongoliamongolia"
    assert len(found.salient) > 2
    assert found.salient == tuple(sorted(found.salient))


def test_content_user_is_the_last_users_words_without_special_tokens(decoder_tokenizer):
    turns = (("user", "one two"), ("assistant", "3"), ("user", "four <eos>"))
    messages = tuple(Message(role=role, content=content) for role, content in turns)
    prompt = Prompt(prompt_id="p", source="s", messages=messages)
    rendered = Renderer(decoder_tokenizer, DataSection()).render(prompt)
    for content, expected in (("user", ["four"]), ("all_user", ["one", "two", "four"])):
        section = SalienceSection(method="all", content=content)
        found = key_positions(rendered, prompt, section, None)
        # Small vocabularies split words: what counts is which characters are covered.
        assert "".join(texts_at(rendered, found.content)) == "".join(expected)
        assert found.salient == found.content
    everything = key_positions(rendered, prompt, SalienceSection(method="all"), None)
    assert everything.content == tuple(range(len(rendered.ids)))


def test_without_a_template_all_tokens_that_are_not_special(t5_tokenizer):
    rendered, found = keys(t5_tokenizer, "What is the capital of France?", SalienceSection(content="user"))
    assert found.content == tuple(range(len(rendered.ids) - 1))
    assert rendered.ids[-1] == t5_tokenizer.eos_token_id


def test_keywords_and_phrases(decoder_tokenizer):
    section = SalienceSection(method="keywords", content="user", keywords=("Capital", "of france"))
    text = "What of the capital of France and of Japan?"
    rendered, found = keys(decoder_tokenizer, text, section, keywords=("japan",))
    assert texts_at(rendered, found.salient) == ["capital", "of", "France", "Japan"]
    _, nothing = keys(decoder_tokenizer, "Hello there?", section)
    assert (nothing.salient, nothing.salient_weights) == ((), ())
    assert nothing.content


def test_idf_weights_have_mean_one(decoder_tokenizer):
    section = SalienceSection(content="user", weights="idf")
    rendered, found = keys(decoder_tokenizer, "What is the capital of France?", section)
    weights = dict(zip(texts_at(rendered, found.salient), found.salient_weights, strict=True))
    assert sum(found.salient_weights) == pytest.approx(len(found.salient))
    assert weights["France"] / weights["What"] == pytest.approx((math.log(4 / 2) + 1) / (math.log(4 / 3) + 1))


def test_what_cannot_be(decoder_tokenizer):
    renderer = Renderer(decoder_tokenizer, DataSection())
    rendered = renderer.render(prompt_of("Hi?"))
    with pytest.raises(UserError, match="not fitted"):
        key_positions(rendered, prompt_of("Hi?"), SalienceSection(), None)
    slow = type(rendered)(**{**rendered.__dict__, "offsets": None})
    with pytest.raises(UserError, match=r"salience\.content: user"):
        key_positions(slow, prompt_of("Hi?"), SalienceSection(method="all", content="user"), None)
    with pytest.raises(UserError, match=r"salience\.method: keywords"):
        key_positions(slow, prompt_of("Hi?"), SalienceSection(method="keywords"), None)
    assert key_positions(slow, prompt_of("Hi?"), SalienceSection(method="all"), None).content


@pytest.mark.skipif(find_spec("spacy") is not None, reason="spaCy is installed")
def test_entities_say_how_to_install(decoder_tokenizer):
    renderer = Renderer(decoder_tokenizer, DataSection())
    prompt = prompt_of("Where is Paris?")
    with pytest.raises(UserError, match=r"attune\[entities\]"):
        key_positions(renderer.render(prompt), prompt, SalienceSection(method="entities", content="user"), None)


def test_too_long_prompts_are_met_when_idf_is_fitted(decoder_tokenizer):
    with pytest.raises(UserError, match="allowed are 5"):
        keys(decoder_tokenizer, "Hi?", SalienceSection(), data=DataSection(max_prompt_tokens=5))


@given(
    text=st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=60).filter(lambda t: t.strip()),
    content=st.sampled_from(["all", "user", "all_user"]),
    k=st.integers(1, 5),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80)
def test_salient_positions_are_content_and_words(subword_tokenizer, text, content, k):
    rendered, found = keys(subword_tokenizer, text, SalienceSection(content=content, top_k=k, weights="idf"))
    assert set(found.salient) <= set(found.content)
    assert list(found.salient) == sorted(set(found.salient))
    assert all(0 <= p < len(rendered.ids) for p in found.content)
    assert all(not rendered.special[p] for p in found.salient)
    if found.salient:
        assert sum(found.salient_weights) == pytest.approx(len(found.salient))
