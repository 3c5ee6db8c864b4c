"""The run that is disturbed: a tiny random policy, the attention reward and a tiny model that scores, some prompts."""

import json
from pathlib import Path
from typing import Any

import yaml

CITIES = ("Paris", "Rome", "Oslo", "Bern", "Cairo", "Lima", "Quito", "Delhi", "Tokyo", "Seoul", "Accra", "Dakar")
PHRASES = ("Where is {} on map {}?", "Tell me of the old town of {}, part {}.", "What river is in {} by {}?")
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")


def questions(count: int) -> list[dict[str, str]]:
    """Different prompts with references."""
    made = [
        {"prompt": phrase.format(city, number), "response": f"{city} is a city, and {city} is large."}
        for number in range(count)
        for phrase in PHRASES
        for city in CITIES
    ]
    return made[:count]


def write_models(directory: Path, texts: list[str]) -> tuple[Path, Path]:
    """A policy and a model that scores, both random, with one tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    from services.text.tokenizer import train_tokenizer

    tokenizer: Any = train_tokenizer(texts, 320, "decoder")
    config: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,  # the narrowest that vLLM's CPU kernel knows
        "max_position_embeddings": 128,
        **{name: getattr(tokenizer, name) for name in SPECIAL},
    }
    torch.manual_seed(7)
    models = {
        "policy": LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **config)),
        "scorer": LlamaForSequenceClassification(LlamaConfig(initializer_range=0.3, **{**config, "num_labels": 1})),
    }
    for name, model in models.items():
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return directory / "policy", directory / "scorer"


ENGINES = ("transformers", "vllm")


def write_recipe(directory: Path, prompts: int, seed: int, engine: str) -> Path:
    """The recipe of the run: an epoch of `prompts` groups, two a step, with a commit every second step.

    `engine`, one of ENGINES, is what its rollout actor generates with.
    """
    rows = questions(prompts)
    source = directory / "questions.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    policy, scorer = write_models(directory, [text for row in questions(36) for text in row.values()])
    tree: dict[str, dict[str, Any]] = {
        "run": {"seed": seed, "epochs": 1, "groups_per_step": 2, "trackers": []},
        "data": {"source": str(source), "validation_fraction": 0.0, "test_fraction": 0.0},
        "salience": {"content": "user"},
        "policy": {"model": str(policy)},
        "rollout": {"engine": engine, "samples": 2, "max_tokens": 8, "actors": 1, "poll_s": 0.02},
        "reward": {
            "sources": {
                "attention": {"kind": "attention", "preset": "comparable"},
                "preference": {"kind": "preference", "model": str(scorer), "restarts": 1000},
            }
        },
        "learner": {"lr": 1e-3, "value_lr": 1e-3, "ranks": 2},
        "checkpoint": {"every": 2, "keep": 2},
        "cluster": {"start_s": 240, "batch_s": 240, "step_s": 120, "restarts": 5, "restart_pause_s": 0.2},
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path
