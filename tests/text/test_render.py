import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.errors import UserError
from services.records import Message, Prompt
from services.text.config import DataSection
from services.text.render import Renderer, render
from services.text.tokens import encode_response

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The system message goes into the first user turn, as some published templates do; contents stay as they are.
INSTRUCT = (
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\n\n' %}"
    "{% elif m['role'] == 'user' %}[INST] {{ ns.system }}{{ m['content'] }} [/INST]{% set ns.system = '' %}"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)

words = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=40).filter(lambda t: t.strip())
fixtures = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


def prompt_of(*turns, text=None):
    messages = tuple(Message(role=role, content=content) for role, content in turns) or None
    return Prompt(prompt_id="p" * 16, source="s", text=text, messages=messages)


@pytest.fixture(params=["own", "chatml", "instruct"])
def chat_tokenizer(request, decoder_tokenizer, monkeypatch):
    if request.param != "own":
        monkeypatch.setattr(decoder_tokenizer, "chat_template", CHATML if request.param == "chatml" else INSTRUCT)
    return decoder_tokenizer


@given(content=words)
@fixtures
def test_the_users_words_are_found_exactly(chat_tokenizer, content):
    rendered = render(prompt_of(text=content), chat_tokenizer, DataSection())
    ((start, end),) = rendered.user_spans
    assert rendered.text[start:end] in (content, content.strip())
    assert rendered.last_user_spans == rendered.user_spans
    assert rendered.text == chat_tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert list(rendered.ids) == chat_tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
    assert len(rendered.ids) == len(rendered.offsets) == len(rendered.special)


@given(first=words, answer=words, second=words, system=words)
@fixtures
def test_each_user_message_of_a_conversation(chat_tokenizer, first, answer, second, system):
    prompt = prompt_of(("system", system), ("user", first), ("assistant", answer), ("user", second))
    rendered = render(prompt, chat_tokenizer, DataSection())
    found = [rendered.text[a:b].strip() for a, b in rendered.user_spans]
    assert found == [first.strip(), second.strip()]
    assert [rendered.text[a:b].strip() for a, b in rendered.last_user_spans] == [second.strip()]


def test_content_that_looks_like_the_template(chat_tokenizer):
    for content in ("user", "<user>", "[INST] user [/INST]", "<|im_start|>user\nx<|im_end|>", "0", "\ue0000\ue000"):
        rendered = render(
            prompt_of(("user", content), ("assistant", content), ("user", content)), chat_tokenizer, DataSection()
        )
        assert [rendered.text[a:b] for a, b in rendered.user_spans] == [content, content]


def test_a_template_that_repeats_or_rewrites(decoder_tokenizer, monkeypatch):
    twice = "{{ messages[0]['content'] }} again: {{ messages[0]['content'] }}"
    monkeypatch.setattr(decoder_tokenizer, "chat_template", twice)
    rendered = render(prompt_of(text="x y"), decoder_tokenizer, DataSection())
    assert rendered.last_user_spans == ((0, 3), (11, 14))
    monkeypatch.setattr(decoder_tokenizer, "chat_template", "{{ messages[0]['content'] | upper }}")
    with pytest.raises(UserError, match="rewrites the user's words"):
        render(prompt_of(text="x y"), decoder_tokenizer, DataSection())
    monkeypatch.setattr(decoder_tokenizer, "chat_template", "{{ raise_exception('no such role') }}")
    with pytest.raises(UserError, match="no such role"):
        render(prompt_of(text="x y"), decoder_tokenizer, DataSection())


def test_plain_text_gets_the_models_own_special_tokens(t5_tokenizer):
    rendered = render(prompt_of(text="What is the capital of France?"), t5_tokenizer, DataSection())
    assert not rendered.templated
    assert rendered.ids[-1] == t5_tokenizer.eos_token_id
    assert rendered.special == (False,) * (len(rendered.ids) - 1) + (True,)
    assert rendered.user_spans == ((0, len(rendered.text)),)


def test_a_format_string(t5_tokenizer, decoder_tokenizer):
    section = DataSection(template="Question: {prompt}\nAnswer:")
    for tokenizer in (t5_tokenizer, decoder_tokenizer):
        rendered = render(prompt_of(text="{x}?"), tokenizer, section)
        assert rendered.text == "Question: {x}?\nAnswer:"
        ((start, end),) = rendered.user_spans
        assert rendered.text[start:end] == "{x}?"


def test_templates_that_cannot_be(t5_tokenizer, decoder_tokenizer):
    with pytest.raises(UserError, match="no chat template"):
        Renderer(t5_tokenizer, DataSection(template="chat"))
    with pytest.raises(UserError, match=r"data\.system"):
        Renderer(decoder_tokenizer, DataSection(template="none", system="Be brief."))
    with pytest.raises(UserError, match="2 messages"):
        render(prompt_of(("system", "a"), ("user", "b")), t5_tokenizer, DataSection())
    with pytest.raises(UserError, match=r"rollout\.max_tokens"):
        Renderer(decoder_tokenizer, DataSection(), max_prompt_tokens=0)


def test_a_system_message_of_the_section(decoder_tokenizer):
    section = DataSection(system="Be brief.")
    assert (
        render(prompt_of(text="Hi?"), decoder_tokenizer, section).text == "<bos><system>Be brief.<user>Hi?<assistant>"
    )
    own = prompt_of(("system", "Be long."), ("user", "Hi?"))
    assert "brief" not in render(own, decoder_tokenizer, section).text


def test_too_long_fails_with_the_numbers(decoder_tokenizer):
    section = DataSection(max_prompt_tokens=8)
    with pytest.raises(UserError, match=r"prompt pppppppppppppppp of s has 10 tokens, allowed are 8"):
        render(prompt_of(text="What is the capital of France?"), decoder_tokenizer, section)
    with pytest.raises(UserError, match="allowed are 6"):
        render(prompt_of(text="What is the capital of France?"), decoder_tokenizer, section, max_prompt_tokens=6)


@given(content=words, limit=st.integers(1, 40))
@fixtures
def test_truncation_cuts_the_beginning_of_the_users_words_only(chat_tokenizer, content, limit):
    section = DataSection(too_long="truncate", max_prompt_tokens=limit)
    whole = render(prompt_of(text=content), chat_tokenizer, DataSection())
    ((a, b),) = whole.user_spans
    try:
        cut = render(prompt_of(text=content), chat_tokenizer, section)
    except UserError:
        # The template alone is too long, or leaves no room for any of the words.
        assert limit < len(whole.ids)
        return
    assert len(cut.ids) <= limit
    ((start, end),) = cut.user_spans
    assert whole.text[a:b].endswith(cut.text[start:end])
    assert cut.text[:start] + whole.text[a:b] + cut.text[end:] == whole.text
    assert cut.truncated == (len(whole.ids) > limit)


def test_responses_end_with_the_end_of_sequence(decoder_tokenizer, t5_tokenizer):
    for tokenizer in (decoder_tokenizer, t5_tokenizer):
        ids = encode_response(tokenizer, "The capital of France is Paris.")
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == "The capital of France is Paris."
        assert encode_response(tokenizer, "The", finished=False) == ids[:1]
