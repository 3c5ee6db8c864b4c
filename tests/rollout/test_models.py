"""Loading a policy says what is wrong with it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

from services.errors import UserError
from services.models import family_of, load_config, load_policy_model, load_tokenizer
from services.models_config import PolicySection


def test_families(policies: dict[str, Path]) -> None:
    for name, family in (
        ("llama", "decoder"),
        ("gpt2", "decoder"),
        ("t5", "encoder-decoder"),
        ("bart", "encoder-decoder"),
    ):
        assert family_of(load_config(PolicySection(model=str(policies[name])))) == family
    with pytest.raises(UserError, match=r"policy\.family: decoder, but .* encoder-decoder"):
        load_config(PolicySection(model=str(policies["t5"]), family="decoder"))


def test_loads_in_the_type_that_is_asked_for(policies: dict[str, Path]) -> None:
    section = PolicySection(model=str(policies["llama"]), dtype="bfloat16")
    assert load_policy_model(section).dtype == torch.bfloat16
    assert load_policy_model(section, dtype=torch.float32).dtype == torch.float32


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no directory"):
        load_config(PolicySection(model=str(tmp_path / "absent")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no model"):
        load_config(PolicySection(model=str(tmp_path / "empty")))
    (tmp_path / "spoilt").mkdir()
    (tmp_path / "spoilt" / "config.json").write_text("{")
    with pytest.raises(UserError, match="has no model"):
        load_config(PolicySection(model=str(tmp_path / "spoilt")))


def test_not_a_language_model(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    models = {
        "classifier": LlamaForSequenceClassification(LlamaConfig(vocab_size=16, **small)),
        "masked": BertForMaskedLM(BertConfig(vocab_size=16, **small)),
        "vision": ViTForImageClassification(ViTConfig(image_size=32, **small)),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match="language model") as said:
            load_policy_model(PolicySection(model=str(tmp_path / name)))
        assert ("A model that scores is a source of the reward" in str(said.value)) == (name == "classifier")


def test_weights_absent_or_incomplete(policies: dict[str, Path], tmp_path: Path) -> None:
    config = load_config(PolicySection(model=str(policies["llama"])))
    config.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="has no weights"):
        load_policy_model(PolicySection(model=str(tmp_path / "bare")))
    config.save_pretrained(tmp_path / "partial")
    tensors = load_file(policies["llama"] / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "partial" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 .*lm_head\.weight"):
        load_policy_model(PolicySection(model=str(tmp_path / "partial")))


def test_tokenizer(policies: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"policy\.tokenizer"):
        load_tokenizer(PolicySection(model=str(policies["llama"])))
    words = Tokenizer(WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path / "words")
    section = PolicySection(model=str(policies["llama"]), tokenizer=str(tmp_path / "words"))
    assert len(load_tokenizer(section)) == 2
