"""What the engine captures is what transformers' own eager attention says, for every family, padding and L'."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rollout.engine import AttentionRows, Completion, GenerationRequest, KeySets, Sampling
from rollout.transformers_engine import TransformersEngine
from services.attention.config import CapturedLayers, CaptureSection, resolve_capture
from services.attention.statistics import RowStatistics, row_entropy, row_statistics
from services.models import load_policy_model
from services.models_config import PolicySection

ARCHITECTURES = ("llama", "gpt2", "t5", "bart")


def request(length: int, seed: int, sampling: Sampling, keep_maps: int = 0) -> GenerationRequest:
    """A prompt of random ids, of which all but the first are content and every third is salient."""
    generator = np.random.default_rng(seed)
    content = tuple(range(1, length))
    salient = content[::3]
    weights = generator.uniform(0.5, 1.5, len(salient))
    keys = KeySets(content, salient, tuple((weights / weights.mean()).tolist()))
    return GenerationRequest(tuple(generator.integers(3, 61, length).tolist()), keys, sampling, seed, keep_maps)


class Reference:
    """transformers in eager mode, one response at a time, without padding or cache."""

    def __init__(self, path: Path, captured: CapturedLayers) -> None:
        self.model: Any = load_policy_model(PolicySection(model=str(path)), attention="eager")
        self.captured = captured

    @torch.no_grad()
    def __call__(self, prompt: Sequence[int], response: Sequence[int]) -> tuple[NDArray[np.float64], torch.Tensor]:
        """Rows A [T, P] and logits [T, V]."""
        if self.model.config.is_encoder_decoder:
            inputs = [self.model.config.decoder_start_token_id, *response[:-1]]
            out = self.model(
                input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([inputs]), output_attentions=True
            )
            attentions, logits, start = out.cross_attentions, out.logits[0], 0
        else:
            out = self.model(input_ids=torch.tensor([[*prompt, *response[:-1]]]), output_attentions=True)
            start = len(prompt) - 1
            attentions, logits = out.attentions, out.logits[0, start:]
        total = torch.zeros(())
        for layer, weights in zip(self.captured.layers, self.captured.weights, strict=True):
            heads = attentions[layer][0, :, start:, : len(prompt)].double()
            total = total + torch.einsum("h,htj->tj", torch.tensor(weights, dtype=torch.float64), heads)
        return (total / self.captured.total).numpy(), logits


def check_statistics(rows: AttentionRows, expected: RowStatistics) -> None:
    np.testing.assert_allclose(rows.mass, expected.mass, rtol=0, atol=1e-5)
    np.testing.assert_allclose(rows.salient_mass, expected.salient_mass, rtol=0, atol=1e-5)
    np.testing.assert_allclose(rows.peak, expected.peak, rtol=0, atol=1e-5)
    entropy = row_entropy(rows.mass.astype(np.float64), rows.neg_entropy_sum.astype(np.float64))
    np.testing.assert_allclose(entropy, row_entropy(expected.mass, expected.neg_entropy_sum), rtol=0, atol=1e-4)


def check(completion: Completion, request: GenerationRequest, reference: Reference) -> None:
    rows, logits = reference(request.prompt_ids, completion.response_ids)
    keys = request.keys
    check_statistics(completion.attention, row_statistics(rows, keys.content, keys.salient, keys.salient_weights))
    logprobs = torch.log_softmax(logits / (request.sampling.temperature or 1.0), -1)
    chosen = logprobs.gather(1, torch.tensor(completion.response_ids)[:, None])[:, 0].numpy()
    np.testing.assert_allclose(completion.logprobs, chosen, rtol=0, atol=1e-5)
    if completion.attention.dense is not None:
        np.testing.assert_allclose(completion.attention.dense, rows, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_eager_attention_in_ragged_batches(
    policies: dict[str, Path], name: str, temperature: float, layers: int, side: Any
) -> None:
    section = CaptureSection(last_layers=layers)
    engine = TransformersEngine(PolicySection(model=str(policies[name])), section, padding_side=side)
    assert engine.layers == tuple(range(4 - layers, 4))
    reference = Reference(policies[name], resolve_capture(section, 4, 4))
    requests = [
        request(9, 1, Sampling(samples=3, max_tokens=12, temperature=temperature), keep_maps=2),
        request(4, 2, Sampling(samples=2, max_tokens=7, temperature=temperature)),
        request(15, 3, Sampling(samples=2, max_tokens=20, temperature=temperature), keep_maps=1),
        request(1 + 1, 4, Sampling(samples=1, max_tokens=1, temperature=temperature)),
    ]
    answers = asyncio.run(engine.generate(requests))
    for asked, completions in zip(requests, answers, strict=True):
        assert len(completions) == asked.sampling.samples
        for index, completion in enumerate(completions):
            assert (completion.attention.dense is not None) == (index < asked.keep_maps)
            assert 1 <= len(completion.response_ids) <= asked.sampling.max_tokens
            assert (completion.finish_reason == "stop") == (completion.response_ids[-1] in engine.eos_ids)
            check(completion, asked, reference)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_recompute_equals_capture_whatever_the_chunk(policies: dict[str, Path], name: str) -> None:
    section = CaptureSection(layers=(0, -1), weights=((1, 0, 2, 0.5), (0, 1, 1, 1)))
    asked = request(11, 5, Sampling(samples=1, max_tokens=17, temperature=0.7), keep_maps=1)
    for chunk in (1, 5, 256):
        engine = TransformersEngine(PolicySection(model=str(policies[name])), section, recompute_chunk=chunk)
        ((completion,),) = asyncio.run(engine.generate([asked]))
        again = asyncio.run(
            engine.recompute(asked.prompt_ids, completion.response_ids, asked.keys, temperature=0.7, dense=True)
        )
        for field in ("mass", "salient_mass", "neg_entropy_sum", "peak", "dense"):
            np.testing.assert_allclose(
                getattr(again.attention, field), getattr(completion.attention, field), rtol=0, atol=1e-5
            )
        np.testing.assert_allclose(again.logprobs, completion.logprobs, rtol=0, atol=1e-5)
        check(completion, asked, Reference(policies[name], resolve_capture(section, 4, 4)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_company_changes_nothing(policies: dict[str, Path], name: str) -> None:
    """The same tokens and statistics alone, in company, and in small batches; alone, bit for bit."""
    policy, section = PolicySection(model=str(policies[name])), CaptureSection(last_layers=2)
    mine = request(6, 11, Sampling(samples=4, max_tokens=15))
    others = [request(14, 12, Sampling(samples=5, max_tokens=9, top_p=0.8)), request(3, 13, Sampling(temperature=0))]
    engine = TransformersEngine(policy, section)
    alone = asyncio.run(engine.generate([mine]))[0]
    again = asyncio.run(engine.generate([mine]))[0]
    company = asyncio.run(engine.generate([others[0], mine, others[1]]))[1]
    chunked = asyncio.run(TransformersEngine(policy, section, max_batch_rows=3).generate([others[0], mine]))[1]
    for first, second in zip(alone, again, strict=True):
        assert first.response_ids == second.response_ids
        np.testing.assert_array_equal(first.logprobs, second.logprobs)
        np.testing.assert_array_equal(first.attention.neg_entropy_sum, second.attention.neg_entropy_sum)
    for batch in (company, chunked):
        for first, second in zip(alone, batch, strict=True):
            assert first.response_ids == second.response_ids
            np.testing.assert_allclose(first.logprobs, second.logprobs, rtol=0, atol=1e-5)
            np.testing.assert_allclose(first.attention.mass, second.attention.mass, rtol=0, atol=1e-5)
            np.testing.assert_allclose(first.attention.peak, second.attention.peak, rtol=0, atol=1e-5)
