"""vLLM's engine around a played vLLM: what is refused, and what answers that real ranks seldom give lead to."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rollout import vllm_engine
from rollout.config import RolloutSection, VllmSection
from rollout.engine import GenerationRequest, KeySets, Sampling
from rollout.refusals import RequestRefused
from rollout.vllm_engine import VllmEngine
from rollout.worker import build_renderer
from services.attention.config import CaptureSection
from services.errors import UserError
from services.models_config import PolicySection
from services.records import PolicyVersion, Prompt
from services.text.config import DataSection
from services.transfer.offer import Broken


@pytest.fixture
def policy(tiny_decoder: Path) -> PolicySection:
    return PolicySection(model=str(tiny_decoder))


def request(length: int, **sampling: Any) -> GenerationRequest:
    keys = KeySets((0, 1), (0,), (1.0,))
    return GenerationRequest(tuple(range(3, 3 + length)), keys, Sampling(**{"max_tokens": 24, **sampling}), seed=1)


class NoLLM:
    """A vLLM that has come up, of a model runner that does not say what it kept."""

    def __init__(self) -> None:
        self.ended = False

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...]) -> list[dict[str, Any]]:
        assert (method, len(args)) == ("attune_capture_start", 1)
        return [{"layers": [1], "kept_sets": False}]

    async def update_weight_version(self, label: str) -> None:
        assert label.startswith("0.")

    def shutdown(self) -> None:
        self.ended = True


def test_a_recipe_that_truncates_does_not_start_where_no_prompt_could_be_generated(
    policy: PolicySection, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = NoLLM()
    monkeypatch.setattr(vllm_engine, "_start_llm", lambda *_: llm)

    def started(**sampling: Any) -> VllmEngine:
        section = RolloutSection(engine="vllm", truncation="replay", **sampling)
        engine = VllmEngine(policy, CaptureSection(), section)
        asyncio.run(engine.start())
        return engine

    engine = started()
    with pytest.raises(RequestRefused, match="does not say which tokens it kept"):  # and one request is still refused
        asyncio.run(engine.generate([request(4, top_k=5)]))
    assert not llm.ended
    with pytest.raises(UserError, match=r"rollout\.top_p 0\.9 and rollout\.top_k 0 truncate"):
        started(top_p=0.9)
    assert llm.ended


@pytest.mark.parametrize("first", [True, False])
def test_a_rank_that_cannot_capture_keeps_the_engine_from_starting(
    policy: PolicySection, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    answers: list[dict[str, Any]] = [
        {"refused": "no memory for it", "here": True},
        {"refused": "another rank refuses", "here": False},
    ]

    class Refusing(NoLLM):
        async def collective_rpc(self, method: str, *, args: tuple[Any, ...]) -> list[dict[str, Any]]:
            del method, args
            return answers if first else answers[::-1]

    llm = Refusing()
    monkeypatch.setattr(vllm_engine, "_start_llm", lambda *_: llm)
    with pytest.raises(UserError, match="no memory for it"):
        asyncio.run(VllmEngine(policy, CaptureSection(), RolloutSection(engine="vllm")).start())
    assert llm.ended


class TwoRanks(NoLLM):
    """A vLLM of two ranks, each with an answer of its own to new weights."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        super().__init__()
        self.answers = list(answers)
        self.held = False

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...]) -> list[dict[str, Any]]:
        return self.answers if method == "attune_load_weights" else await super().collective_rpc(method, args=args)

    async def pause_generation(self, *, mode: str) -> None:
        self.held = mode == "keep"

    async def resume_generation(self) -> None:
        self.held = False

    async def reset_prefix_cache(self, *, reset_running_requests: bool) -> None:
        assert reset_running_requests


def test_weights_that_one_rank_alone_took_are_not_generated_with(
    policy: PolicySection, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken: dict[str, Any] = {"refused": "its connection broke", "kind": "Broken", "torn": False}
    loaded: dict[str, Any] = {"version": [0, 1]}
    section = RolloutSection(engine="vllm", vllm=VllmSection(weight_sync="keep"))

    async def after(*answers: dict[str, Any]) -> tuple[TwoRanks, VllmEngine]:
        llm = TwoRanks(*answers)
        monkeypatch.setattr(vllm_engine, "_start_llm", lambda *_: llm)
        engine = VllmEngine(policy, CaptureSection(), section)
        await engine.start()
        with pytest.raises(Broken, match="its connection broke"):
            await engine.load_weights(str(tmp_path))
        return llm, engine

    async def told() -> None:
        llm, engine = await after(broken, broken)
        assert not llm.held
        for answers in ((broken, loaded), (broken, {**broken, "torn": True})):
            llm, engine = await after(*answers)
            assert llm.held
            with pytest.raises(RuntimeError, match="the engine holds no policy"):
                await engine.generate([request(4)])
        llm.answers = [loaded, loaded]
        assert await engine.load_weights(str(tmp_path)) == PolicyVersion(0, 1)
        assert not llm.held

    asyncio.run(told())


@pytest.mark.parametrize(("own", "longest"), [(None, 96), (40, 40), (200, 96)])
def test_a_context_shorter_than_the_models_bounds_prompts_before_vllm_sees_them(
    tiny_decoder: Path, monkeypatch: pytest.MonkeyPatch, own: int | None, longest: int
) -> None:
    given: list[int | None] = []

    def start(policy: PolicySection, section: RolloutSection, max_context: int | None) -> NoLLM:
        del policy, section
        given.append(max_context)
        return NoLLM()

    monkeypatch.setattr(vllm_engine, "_start_llm", start)
    policy = PolicySection(model=str(tiny_decoder))
    section = RolloutSection(engine="vllm", max_tokens=8, vllm=VllmSection(max_context=own))
    engine = VllmEngine(policy, CaptureSection(), section)
    asyncio.run(engine.start())
    assert (engine.max_context, given) == (longest, [longest])
    with pytest.raises(RequestRefused, match=f"exceed the context of {longest}"):
        asyncio.run(engine.generate([request(longest - 7, max_tokens=8)]))
    renderer = build_renderer(policy, DataSection(), section)  # the driver's too, before anything is started
    assert renderer.limit == longest - 8
    with pytest.raises(UserError, match=f"allowed are {longest - 8}"):
        renderer.render(Prompt(prompt_id="p", source="tests", text="Which river runs through Oslo? " * 20))


def test_the_context_given_to_vllm_bounds_no_other_engine(tiny_decoder: Path) -> None:
    section = RolloutSection(engine="transformers", max_tokens=8, vllm=VllmSection(max_context=40))
    assert build_renderer(PolicySection(model=str(tiny_decoder)), DataSection(), section).limit == 88
