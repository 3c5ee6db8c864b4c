"""What a model that scores is fed: order of the parts, BOS, steps, cuts, and scorer.json."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from services import scoring_format
from services.errors import UserError
from services.scoring_format import (
    PROMPT_TRUNCATED,
    Example,
    InputTooLong,
    ScorerFormat,
    StepRule,
    TemplateRefused,
    Turn,
    directory_revision,
    encode,
    encode_prefixes,
    encode_steps,
    read_format,
    render,
    split_steps,
    turns_of,
    write_format,
)

PLAIN = "Q: {prompt}\nA: {response}"
LINES = StepRule()


@pytest.fixture(scope="module")
def tokenizer(tiny_decoder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_decoder)


def example(prompt: str = "Where is Rome?", response: str = "In Italy.", **more: Any) -> Example:
    return Example(turns_of(prompt), response, **more)


def test_facts_stand_before_the_question_and_principles_after_the_response(tokenizer: Any) -> None:
    form = ScorerFormat(kind="principle", principle_template="RULES\n{principles}", facts_template="FACTS\n{facts}\n")
    asked = example(principles=("be brief", "be true"), facts=("Rome is old.",))
    assert render(tokenizer, form, asked) == (
        "<bos><user>FACTS\n- Rome is old.\nWhere is Rome?<assistant>In Italy.<eos><user>RULES\n- be brief\n- be true"
    )
    plain = form.model_copy(update={"input_template": PLAIN})
    assert render(tokenizer, plain, asked) == (
        "Q: FACTS\n- Rome is old.\nWhere is Rome?\nA: In Italy.\n\nRULES\n- be brief\n- be true"
    )
    assert render(tokenizer, plain, example()) == "Q: Where is Rome?\nA: In Italy."


def test_words_of_the_item_are_never_taken_for_places(tokenizer: Any) -> None:
    form = ScorerFormat(kind="preference", input_template=PLAIN)
    asked = example("say {response}", "say {prompt} {facts}", facts=("{response}",))
    assert render(tokenizer, form, asked).endswith("- {response}\n\nsay {response}\nA: say {prompt} {facts}")


def test_a_conversation_without_a_chat_template_names_who_speaks(tokenizer: Any) -> None:
    form = ScorerFormat(kind="preference", input_template="{prompt}\n\nAssistant: {response}")
    asked = Example((Turn("user", "Hi"), Turn("assistant", "Hello"), Turn("user", "Rome?")), "Yes")
    assert render(tokenizer, form, asked) == "User: Hi\n\nAssistant: Hello\n\nUser: Rome?\n\nAssistant: Yes"


@pytest.mark.parametrize(("strip", "count"), [(True, 1), (False, 2)])
def test_the_bos_of_template_and_tokenizer(tiny_decoder: Path, strip: bool, count: int) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    adding = AutoTokenizer.from_pretrained(tiny_decoder)
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    form = ScorerFormat(kind="process", step_rule=LINES, strip_bos=strip)
    asked = example(response="one\ntwo")
    encoded = encode_steps(adding, form, asked)
    assert encoded.ids[: count + 1].count(adding.bos_token_id) == count
    assert encoded.ids[count:] == tuple(adding(render(adding, form, asked), add_special_tokens=False)["input_ids"])[1:]
    assert [adding.decode(encoded.ids[: end + 1])[-3:] for end in encoded.step_ends] == ["one", "two"]


@pytest.mark.parametrize(
    ("rule", "text", "steps"),
    [
        (LINES, "a b\n\n  c\n", ["a b", "c"]),
        (StepRule(by="paragraphs"), "a\nb\n \n\nc\n\n", ["a\nb", "c"]),
        (StepRule(by="marker", marker="(ok)"), "a (ok) b(ok)\nc", ["a (ok)", "b(ok)", "c"]),
        (LINES, " \n ", []),
    ],
)
def test_steps(rule: StepRule, text: str, steps: list[str]) -> None:
    assert [text[start:end] for start, end in split_steps(text, rule)] == steps


def test_step_ends_and_prefixes_agree(tokenizer: Any) -> None:
    form = ScorerFormat(kind="process", step_rule=LINES, input_template="{prompt}\n{response}")
    asked = example(response="Rome is in Italy.\nItaly is large.\nSo is Rome.")
    encoded = encode_steps(tokenizer, form, asked)
    prefixes = encode_prefixes(tokenizer, form, asked)
    assert [encoded.ids[: end + 1] for end in encoded.step_ends] == [prefix.ids for prefix in prefixes]
    assert prefixes[-1].ids == encoded.ids == encode(tokenizer, form, asked).ids


def test_a_step_that_also_stands_elsewhere_is_found_in_the_response(tokenizer: Any) -> None:
    form = ScorerFormat(kind="process", step_rule=LINES)
    encoded = encode_steps(tokenizer, form, example("<eos> eos", "  eos\neos "))
    decoded = [tokenizer.decode(encoded.ids[: end + 1]) for end in encoded.step_ends]
    assert [text.partition("<assistant>")[2].split() for text in decoded] == [["eos"], ["eos", "eos"]]


def test_a_long_prompt_loses_its_beginning_only(tokenizer: Any) -> None:
    form = ScorerFormat(kind="principle", max_tokens=400)
    turns = (Turn("system", " large" * 40), Turn("user", " city" * 300), Turn("assistant", " large" * 50),
             Turn("user", "first " + " is" * 200 + "last?"))  # fmt: skip
    asked = Example(turns, "In Italy.", ("be brief",), ("Rome is old.",))
    encoded = encode(tokenizer, form, asked)
    assert encoded.flags == (PROMPT_TRUNCATED,)
    assert 395 <= len(encoded.ids) <= 400
    text = tokenizer.decode(encoded.ids)
    assert text.startswith("<bos><user> city city")
    assert "Rome is old." in text
    assert "last?<assistant> In Italy.<eos>" in text
    assert text.endswith("be brief")
    whole = encode(tokenizer, form.model_copy(update={"max_tokens": 4000}), asked)
    assert whole.flags == ()
    assert whole.ids[-60:] == encoded.ids[-60:]


def test_a_cut_conversation_still_begins_with_the_user(tokenizer: Any) -> None:
    turns = (Turn("user", " city" * 300), Turn("assistant", " large" * 300), Turn("user", "And Lima?"))
    encoded = encode(tokenizer, ScorerFormat(kind="preference"), Example(turns, "Yes."), max_tokens=310)
    text = tokenizer.decode(encoded.ids)
    assert text.startswith("<bos><user><assistant> large large")
    assert text.endswith("<user> And Lima?<assistant> Yes.<eos>")


@pytest.mark.parametrize(("prompt_words", "response_words"), [(600, 150), (200, 210)])
def test_what_does_not_fit_is_an_error_and_never_a_cut_response(
    tokenizer: Any, prompt_words: int, response_words: int
) -> None:
    asked = example(" city" * prompt_words, " large" * response_words)
    with pytest.raises(InputTooLong) as raised:
        encode(tokenizer, ScorerFormat(kind="preference", max_tokens=400), asked)
    assert raised.value.tokens > raised.value.allowed == 400
    assert encode(tokenizer, ScorerFormat(kind="preference", max_tokens=1000), asked).flags == ()


def test_at_least_256_tokens_of_the_prompt_are_kept(tokenizer: Any) -> None:
    form = ScorerFormat(kind="preference", input_template="{prompt}{response}")
    asked = example(" city" * 600, "Lima")
    fixed = len(encode(tokenizer, form, example("city", "Lima")).ids) - 1
    encoded = encode(tokenizer, form, asked, max_tokens=scoring_format.MIN_PROMPT_TOKENS + fixed + 1)
    assert len(encoded.ids) >= scoring_format.MIN_PROMPT_TOKENS + fixed - 1
    with pytest.raises(InputTooLong):
        encode(tokenizer, form, asked, max_tokens=scoring_format.MIN_PROMPT_TOKENS + fixed - 2)


def test_refusals_say_what_is_wrong(tokenizer: Any, tiny_encoder_decoder: Path) -> None:
    from transformers import AutoTokenizer

    form = ScorerFormat(kind="preference")
    with pytest.raises(TemplateRefused, match="roles alien"):
        encode(tokenizer, form, Example((Turn("alien", "x"),), "y"))
    with pytest.raises(UserError, match="no chat template"):
        encode(AutoTokenizer.from_pretrained(tiny_encoder_decoder), form, example())


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"input_template": "{response}{prompt}"}, "prompt"),
        ({"input_template": "{prompt}"}, "response"),
        ({"principle_template": "none"}, "principles"),
        ({"label_range": (1, 1)}, "label_range"),
        ({"step_rule": {}}, "step_rule"),
        ({"kind": "process"}, "step_rule"),
        ({"kind": "process", "step_rule": {"by": "marker"}}, "marker"),
        ({"surprise": 1}, "surprise"),
        ({"schema_version": 2}, "schema_version"),
    ],
)
def test_a_wrong_format_is_refused(values: dict[str, Any], named: str, tmp_path: Path) -> None:
    values = {"kind": "preference", **values}
    with pytest.raises(ValidationError, match=named):
        ScorerFormat.model_validate(values)
    (tmp_path / "scorer.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"scorer\.json"):
        read_format(tmp_path)


def test_scorer_json_comes_back_with_a_revision_of_the_files(tmp_path: Path) -> None:
    assert read_format(tmp_path) is None
    with pytest.raises(UserError, match="no model"):
        directory_revision(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    form = ScorerFormat(kind="process", step_rule=StepRule(by="marker", marker=" ки"), label_range=(1, 5))
    written = write_format(tmp_path, form)
    assert read_format(tmp_path) == written
    assert written.revision == directory_revision(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert directory_revision(tmp_path) != written.revision
    assert write_format(tmp_path, form.model_copy(update={"revision": "r1"})).revision == "r1"
