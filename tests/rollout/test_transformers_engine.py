"""The engine beyond capture: truncation that is recorded, weights, refusals."""

import asyncio
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rollout.engine import GenerationRequest, KeySets, Sampling
from rollout.transformers_engine import TransformersEngine
from services.attention.config import CaptureSection
from services.errors import UserError
from services.models import load_policy_model
from services.models_config import PolicySection
from services.records import PolicyVersion
from services.weights import Corrupt, write_bucket, write_manifest

KEYS = KeySets((0, 1, 2), (1,), (1.0,))


def engine_of(path: Path, **settings: int) -> TransformersEngine:
    return TransformersEngine(PolicySection(model=str(path)), CaptureSection(), **settings)


def asked(prompt: tuple[int, ...] = (5, 9, 17), keys: KeySets = KEYS, **sampling: float) -> GenerationRequest:
    settings = Sampling(**({"max_tokens": 10} | sampling))  # type: ignore[arg-type]
    return GenerationRequest(prompt, keys, settings, seed=3)


def publish(directory: Path, tensors: dict[str, torch.Tensor], version: PolicyVersion) -> str:
    directory.mkdir()
    names = sorted(tensors)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    buckets = [write_bucket(directory, i, {name: tensors[name] for name in half}) for i, half in enumerate(halves)]
    return str(write_manifest(directory, version, buckets))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_kept_ids_reproduce_the_sampling_logprobs(policies: dict[str, Path], name: str) -> None:
    engine = engine_of(policies[name])
    request = asked(samples=5, temperature=1.5, top_p=0.6, top_k=20)
    (truncated, _), (full,) = asyncio.run(engine.generate([request, asked()])), asyncio.run(engine.generate([asked()]))
    assert full[0].kept_ids is None
    assert full[0].sampling_logprobs is None
    for completion in truncated:
        assert completion.kept_ids is not None
        assert completion.sampling_logprobs is not None
        assert len(completion.kept_ids) == len(completion.response_ids)
        for t, (token, kept) in enumerate(zip(completion.response_ids, completion.kept_ids, strict=True)):
            assert token in kept
            assert list(kept) == sorted(set(kept))
            assert len(kept) <= 20
            # Alone in its set a token was certain; otherwise truncation made it likelier.
            assert completion.sampling_logprobs[t] >= completion.logprobs[t] - 1e-6
            if len(kept) == 1:
                assert completion.sampling_logprobs[t] == pytest.approx(0.0, abs=1e-6)


def test_different_seeds_differ_and_samples_of_a_request_differ(policies: dict[str, Path]) -> None:
    engine = engine_of(policies["llama"])
    request = asked(samples=6)
    other = GenerationRequest(request.prompt_ids, request.keys, request.sampling, seed=2**80 + 1)
    first, second = asyncio.run(engine.generate([request, other]))
    assert len({completion.response_ids for completion in first}) > 1
    assert [c.response_ids for c in first] != [c.response_ids for c in second]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_takes_published_weights(policies: dict[str, Path], name: str, tmp_path: Path) -> None:
    engine = engine_of(policies[name])
    model = load_policy_model(PolicySection(model=str(policies[name])))
    before = asyncio.run(engine.recompute((5, 9, 17), (4, 8), KEYS, temperature=1.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    published = dict(model.named_parameters())  # tied weights once
    manifest = publish(tmp_path / "weights", published, PolicyVersion(1, 7))
    assert asyncio.run(engine.load_weights(manifest)) == PolicyVersion(1, 7)
    after = asyncio.run(engine.recompute((5, 9, 17), (4, 8), KEYS, temperature=1.0))
    model.save_pretrained(tmp_path / "changed")
    fresh = asyncio.run(engine_of(tmp_path / "changed").recompute((5, 9, 17), (4, 8), KEYS, temperature=1.0))
    assert not np.allclose(before.logprobs, after.logprobs, atol=1e-3)
    np.testing.assert_array_equal(after.logprobs, fresh.logprobs)
    np.testing.assert_array_equal(after.attention.mass, fresh.attention.mass)
    ((completion,),) = asyncio.run(engine.generate([asked()]))
    assert completion.versions == ((1, 7, len(completion.response_ids)),)


def test_refuses_weights_of_another_model_and_keeps_its_own(policies: dict[str, Path], tmp_path: Path) -> None:
    engine = engine_of(policies["llama"])
    before = asyncio.run(engine.recompute((5, 9, 17), (4, 8), KEYS, temperature=1.0))
    own = {name: p.detach().clone() for name, p in load_policy_model(_section(policies["llama"])).named_parameters()}
    missing = {name: tensor for name, tensor in own.items() if name != "lm_head.weight"}
    with pytest.raises(ValueError, match=r"lack 1 .*lm_head\.weight"):
        asyncio.run(engine.load_weights(publish(tmp_path / "missing", missing, PolicyVersion(0, 1))))
    with pytest.raises(ValueError, match="value_head"):
        asyncio.run(
            engine.load_weights(publish(tmp_path / "more", own | {"value_head": torch.ones(2)}, PolicyVersion(0, 1)))
        )
    broken = publish(tmp_path / "broken", own, PolicyVersion(0, 1))
    bucket = next((tmp_path / "broken").glob("*.safetensors"))
    bucket.write_bytes(bucket.read_bytes()[:-1] + b"\x01")
    with pytest.raises(Corrupt):
        asyncio.run(engine.load_weights(broken))
    assert engine.version == PolicyVersion(0, 0)
    again = asyncio.run(engine.recompute((5, 9, 17), (4, 8), KEYS, temperature=1.0))
    np.testing.assert_array_equal(before.logprobs, again.logprobs)


def test_a_half_loaded_policy_generates_nothing(policies: dict[str, Path], tmp_path: Path) -> None:
    engine = engine_of(policies["llama"])
    own = {name: p.detach().clone() for name, p in load_policy_model(_section(policies["llama"])).named_parameters()}
    wrong = own | {"model.norm.weight": torch.ones(3)}
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        asyncio.run(engine.load_weights(publish(tmp_path / "wrong", wrong, PolicyVersion(0, 1))))
    with pytest.raises(RuntimeError, match="halfway"):
        asyncio.run(engine.generate([asked()]))
    asyncio.run(engine.load_weights(publish(tmp_path / "right", own, PolicyVersion(0, 2))))
    assert asyncio.run(engine.generate([asked()]))[0][0].response_ids


def test_logits_that_are_not_finite_are_an_error_not_a_sample(policies: dict[str, Path], tmp_path: Path) -> None:
    engine = engine_of(policies["llama"])
    own = {name: p.detach().clone() for name, p in load_policy_model(_section(policies["llama"])).named_parameters()}
    own["model.norm.weight"].fill_(math.nan)
    asyncio.run(engine.load_weights(publish(tmp_path / "nan", own, PolicyVersion(0, 1))))
    with pytest.raises(ArithmeticError, match="not finite"):
        asyncio.run(engine.generate([asked()]))


@pytest.mark.parametrize(
    ("request_", "names"),
    [
        (asked(prompt=(), keys=KeySets((), (), ())), "at least one token"),
        (asked(prompt=(4,) * 120), "120 tokens .* 10 .* 128"),
        (asked(keys=KeySets((0, 3), (), ())), "content positions"),
        (asked(keys=KeySets((0,), (-1,), (1.0,))), "salient positions"),
        (asked(keys=KeySets((0,), (0,), ())), "weights"),
        (asked(temperature=-0.5), "temperature"),
    ],
)
def test_refuses_what_cannot_be(policies: dict[str, Path], request_: GenerationRequest, names: str) -> None:
    with pytest.raises(UserError, match=names):
        asyncio.run(engine_of(policies["llama"]).generate([request_]))


def test_full_context_fits_exactly(policies: dict[str, Path]) -> None:
    engine = engine_of(policies["gpt2"])
    assert engine.max_context == 128
    request = asked(prompt=(4,) * 118)
    asyncio.run(engine.generate([request]))
    assert engine_of(policies["t5"]).max_context is None


def test_concurrent_calls_take_turns(policies: dict[str, Path]) -> None:
    engine = engine_of(policies["llama"])

    async def both() -> list[list[list[int]]]:
        answers = await asyncio.gather(*(engine.generate([asked(samples=2)]) for _ in range(3)))
        return [[list(c.response_ids) for c in answer[0]] for answer in answers]

    first, *rest = asyncio.run(both())
    assert all(answer == first for answer in rest)


def _section(path: Path) -> PolicySection:
    return PolicySection(model=str(path))
