"""Evaluation over the real engine, for a decoder-only and an encoder-decoder policy."""

import asyncio
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from cluster.evaluate import EvaluationPrompt, evaluate, rescore
from cluster.evaluation_config import EvaluationSection
from rollout.engine import KeySets
from rollout.transformers_engine import TransformersEngine
from services.attention.config import CaptureSection
from services.attention.options import PRESETS
from services.models_config import PolicySection

SETTINGS = EvaluationSection(prompts=6, samples=3, resamples=200, batch_prompts=4, temperature=0.8)
REFERENCE = (5, 9, 11, 2)


def save_policy(family: str, seed: int, directory: Path) -> str:
    torch.manual_seed(seed)
    ids = {"vocab_size": 41, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family == "decoder":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**ids, **sizes, max_position_embeddings=64, initializer_range=0.2))
    else:
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        model = T5ForConditionalGeneration(T5Config(**ids, **sizes, decoder_start_token_id=0))
    model.save_pretrained(directory)
    return str(directory)


def engine_of(path: str) -> TransformersEngine:
    return TransformersEngine(PolicySection(model=path), CaptureSection(last_layers=2))


@pytest.fixture(scope="module")
def held_out() -> list[EvaluationPrompt]:
    found = []
    for index in range(6):
        ids = tuple(3 + (7 * index + 5 * j) % 38 for j in range(4 + index))
        keys = KeySets(tuple(range(1, len(ids))), (1, 2), (1.0, 1.0))
        found.append(EvaluationPrompt(f"p{index}", "text", ids, keys, reference="5 9 11", reference_ids=REFERENCE))
    return found


def in_words(ids) -> str:
    return " ".join(str(token) for token in ids if token > 2)


@pytest.mark.parametrize("family", ["decoder", "encoder-decoder"])
def test_a_policys_own_attention_is_found_again_and_anothers_differs(family, held_out, tmp_path):
    trained, start = (save_policy(family, seed, tmp_path / str(seed)) for seed in (1, 2))
    engine = engine_of(trained)

    async def measure():
        result = await evaluate(
            engine, held_out, SETTINGS, PRESETS["comparable"], max_tokens=8, decode=in_words, label="trained"
        )
        return result, await rescore(engine, result), await rescore(engine_of(start), result)

    result, same, other = asyncio.run(measure())
    assert set(result.figures) == {"greedy", "nucleus"}
    assert len(result.responses) == 6 + 18
    for mine, again in zip(result.responses, same.responses, strict=True):
        assert again.values.get("reward") == pytest.approx(mine.values.get("reward"), abs=1e-4)
        assert again.values["log_ratio_response"] == pytest.approx(0, abs=1e-4)
    assert other.figures["nucleus"]["log_ratio_token"].value > 0.05
    assert other.figures["nucleus"]["focus"].value != pytest.approx(result.figures["nucleus"]["focus"].value, abs=1e-4)
    assert other.figures["nucleus"]["length"] == result.figures["nucleus"]["length"]


def test_perplexity_is_that_of_transformers_own_loss(held_out, tmp_path):
    path = save_policy("decoder", 3, tmp_path / "policy")
    result = asyncio.run(evaluate(engine_of(path), held_out, SETTINGS, PRESETS["paper"], max_tokens=4, decode=in_words))
    model = AutoModelForCausalLM.from_pretrained(path)
    losses = []
    for prompt in held_out:
        ids = torch.tensor([[*prompt.prompt_ids, *REFERENCE]])
        labels = ids.clone()
        labels[:, : len(prompt.prompt_ids)] = -100
        losses.append(model(ids, labels=labels).loss.item())
    assert result.figures["greedy"]["perplexity"].value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
