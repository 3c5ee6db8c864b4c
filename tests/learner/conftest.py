"""Tiny random models of each family, built from configurations."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 61


def _llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            attention_dropout=0.3,
        )
    )


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64))


def _gemma2() -> nn.Module:
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            final_logit_softcapping=0.5,
            pad_token_id=0,
        )
    )


def _t5(tied: bool) -> nn.Module:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        tie_word_embeddings=tied,
    )
    config.tie_word_embeddings = tied  # the configuration ties all of them; published T5 1.1 weights are not tied
    return T5ForConditionalGeneration(config)


def _bart() -> nn.Module:
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=64,
            decoder_start_token_id=2,
            dropout=0.3,
        )
    )
    model.final_logits_bias.copy_(torch.linspace(-1, 1, VOCABULARY)[None])
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "gpt2": _gpt2,
    "gemma2": _gemma2,
    "t5": lambda: _t5(True),
    "t5_untied": lambda: _t5(False),
    "bart": _bart,
}


@pytest.fixture(params=list(MODELS))
def lm(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


@pytest.fixture
def build_lm() -> Callable[[str], nn.Module]:
    return build


def build(name: str) -> nn.Module:
    """A model in float64 whose logits spread enough for its temperature and cap to show."""
    torch.manual_seed(3)
    model = MODELS[name]().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model.eval()
