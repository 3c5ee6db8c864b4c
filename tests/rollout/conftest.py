"""Tiny random policies, built from configurations, saved as ordinary model directories."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 61
ids: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
small: dict[str, Any] = {"vocab_size": VOCABULARY, **ids}

BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            **small,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.12,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**small, n_embd=32, n_layer=4, n_head=4, n_positions=128, initializer_range=0.12)
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            **small,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=4,
            num_heads=4,
            decoder_start_token_id=0,
            initializer_factor=1.0,
        )
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            **small,
            d_model=32,
            encoder_layers=2,
            decoder_layers=4,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=128,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
            init_std=0.12,
        )
    ),
}


@pytest.fixture(scope="session")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model directory for each architecture."""
    root = tmp_path_factory.mktemp("policies")
    for name, build in BUILDERS.items():
        torch.manual_seed(7)
        build().save_pretrained(root / name)
    return {name: root / name for name in BUILDERS}
