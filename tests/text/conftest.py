import pytest

from services.text.corpora.instructions import generate_instructions
from services.text.corpora.qa import generate_qa
from services.text.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def qa_pairs():
    return generate_qa(0)


@pytest.fixture(scope="session")
def instruction_pairs():
    return generate_instructions(0)


@pytest.fixture(scope="session")
def decoder_tokenizer(qa_pairs):
    return train_tokenizer(text for pair in qa_pairs for text in (pair.prompt, pair.response))


@pytest.fixture(scope="session")
def t5_tokenizer(qa_pairs):
    return train_tokenizer(
        (text for pair in qa_pairs for text in (pair.prompt, pair.response)), family="encoder-decoder"
    )


@pytest.fixture(scope="session")
def subword_tokenizer(qa_pairs):
    """Small enough that most words are several tokens."""
    return train_tokenizer((pair.prompt for pair in qa_pairs), vocab_size=320)
