"""Small policies built from a configuration, for the quickstart and for trying a recipe out without a download.

About 5 million parameters: large enough to learn a few thousand questions in minutes on one core, small enough that a
whole RL run fits beside it.
"""

from pathlib import Path
from typing import Any, Literal

Family = Literal["decoder", "encoder-decoder"]


def build_small_policy(tokenizer: Any, family: Family, directory: Path, *, seed: int, context: int = 128) -> int:
    """Writes a randomly initialised policy and its tokenizer as a Hugging Face directory; returns its parameter count.

    Decoder-only: Llama, 6 layers, d 256, 8 query heads over 4 key heads, tied embeddings. Encoder-decoder: T5 1.1 with
    gated feed-forward, 3 + 3 layers, d 256, 4 heads.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    special: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if family == "decoder":
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=256,
                intermediate_size=640,
                num_hidden_layers=6,
                num_attention_heads=8,
                num_key_value_heads=4,
                max_position_embeddings=context,
                bos_token_id=tokenizer.bos_token_id,
                tie_word_embeddings=True,
                **special,
            )
        )
    else:
        # Keys that every configuration takes, but that T5Config does not declare among its own.
        special |= {"decoder_start_token_id": tokenizer.pad_token_id, "tie_word_embeddings": True}
        model = T5ForConditionalGeneration(
            T5Config(
                d_model=256,
                d_kv=64,
                d_ff=512,
                num_layers=3,
                num_decoder_layers=3,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                **special,
            )
        )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters())
