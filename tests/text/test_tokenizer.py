import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from services.errors import UserError
from services.text.tokenizer import SPECIAL_TOKENS, train_tokenizer
from services.text.tokens import special_ids

some_text = st.text(st.characters(blacklist_categories=("Cs",)), max_size=80)


@given(text=some_text)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_text_comes_back(decoder_tokenizer, text):
    ids = decoder_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert decoder_tokenizer.decode(ids) == text


def test_special_tokens_have_fixed_ids(decoder_tokenizer, t5_tokenizer):
    for tokenizer in (decoder_tokenizer, t5_tokenizer):
        assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(6))
        assert {0, 2, 3, 4, 5} <= special_ids(tokenizer)
    assert decoder_tokenizer.chat_template
    assert t5_tokenizer.chat_template is None


def test_a_word_is_one_token_wherever_it_stands(decoder_tokenizer):
    start, inside = decoder_tokenizer("France is"), decoder_tokenizer("is France")
    assert start["input_ids"] == inside["input_ids"][::-1]


def test_offsets_cover_the_text_from_its_first_letter(decoder_tokenizer):
    for text in ("I plan a trip", "What is it?", "<user>A b"):
        encoding = decoder_tokenizer(text, return_offsets_mapping=True)
        assert "".join(text[a:b] for a, b in encoding["offset_mapping"]) == text


def test_numbers_are_digits(decoder_tokenizer):
    assert len(decoder_tokenizer("12345")["input_ids"]) == 5


def test_training_is_deterministic_and_bounded(qa_pairs):
    texts = [pair.prompt for pair in qa_pairs[:500]]
    one, other = train_tokenizer(texts, vocab_size=400), train_tokenizer(texts, vocab_size=400)
    assert one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    assert len(one) == 400
    with pytest.raises(UserError, match="vocab_size: 100"):
        train_tokenizer(texts, vocab_size=100)


@pytest.mark.parametrize("model_type", ["llama", "t5"])
def test_a_saved_tokenizer_loads_beside_a_models_configuration(tmp_path, decoder_tokenizer, t5_tokenizer, model_type):
    tokenizer = decoder_tokenizer if model_type == "llama" else t5_tokenizer
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "What is the capital of France in 1950?"
    assert loaded.is_fast
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 2)
    assert loaded.padding_side == ("left" if model_type == "llama" else "right")
