"""Training a small tokenizer on a corpus, for policies that are built from nothing (quickstart, tests).

Byte-level BPE: no text is unknown. Digits are tokens of their own, so that numbers are spelled alike everywhere, and
a space is put before every text, so that a word copied from the prompt to the start of a response is the same token.
"""

from collections.abc import Iterable
from importlib import import_module
from typing import Any, Literal

from services.errors import UserError

PAD, BOS, EOS, SYSTEM, USER, ASSISTANT = "<pad>", "<bos>", "<eos>", "<system>", "<user>", "<assistant>"
SPECIAL_TOKENS = (PAD, BOS, EOS, SYSTEM, USER, ASSISTANT)
"""Ids 0 to 5, in this order, in every tokenizer trained here."""

PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
"""Words, single digits, runs of other signs, each with the space before it; other white space."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "<{{ message['role'] }}>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int = 4096, family: Literal["decoder", "encoder-decoder"] = "decoder"
) -> Any:
    """A `PreTrainedTokenizerFast` of at most `vocab_size` tokens, the same for the same texts in the same order.

    decoder: has a chat template with the special tokens <user>, <assistant>, <system>; a response ends with <eos>.
    encoder-decoder: no template; the end-of-sequence token is appended to what is encoded, as T5 does, and <pad> starts
    the decoder. Raises UserError where `vocab_size` has no room for the 256 bytes.
    """
    floor = 256 + len(SPECIAL_TOKENS)
    if vocab_size < floor:
        raise UserError(f"vocab_size: {vocab_size} is below {floor}, the bytes and the special tokens")
    library: Any = import_module("tokenizers")
    transformers: Any = import_module("transformers")
    tokenizer: Any = library.Tokenizer(library.models.BPE())
    tokenizer.normalizer = library.normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence(
        [
            library.pre_tokenizers.Split(library.Regex(PIECES), behavior="isolated"),
            library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = library.decoders.Sequence(
        [library.decoders.ByteLevel(), library.decoders.Strip(content=" ", left=1, right=0)]
    )
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if family == "encoder-decoder":
        tokenizer.post_processor = library.processors.TemplateProcessing(
            single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, SPECIAL_TOKENS.index(EOS))]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS if family == "decoder" else None,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE if family == "decoder" else None,
        padding_side="left" if family == "decoder" else "right",
        clean_up_tokenization_spaces=False,
    )
