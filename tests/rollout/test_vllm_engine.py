"""Real vLLM in a Ray actor: its captured statistics against the transformers engine's recomputation of the same tokens,
whatever the scheduler did to them; weights that change before, between and in the middle of responses.
"""

import asyncio
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rollout.config import RolloutSection, VllmSection
from rollout.engine import AttentionRows, Completion, GenerationRequest, KeySets, Sampling
from rollout.refusals import RequestRefused
from rollout.transformers_engine import TransformersEngine
from rollout.worker import build_engine
from services.attention.config import CaptureSection
from services.models_config import PolicySection
from services.records import PolicyVersion
from services.weights import Corrupt, write_bucket, write_manifest

VOCABULARY = 512
ROOMY = 32
"""Rows of the engine that has room for all of them."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> PolicySection:
    """A Llama with grouped-query attention whose heads the CPU kernel knows (32 wide)."""
    directory = tmp_path_factory.mktemp("vllm-policy")
    torch.manual_seed(11)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1280,
            initializer_range=0.1,
            tie_word_embeddings=True,  # the harder of the two when weights change
        )
    ).save_pretrained(directory)
    return PolicySection(model=str(directory))


class EngineHost:
    """An engine in an actor, as a rollout actor holds it."""

    async def start(self, policy: PolicySection, capture: CaptureSection, rollout: RolloutSection) -> tuple[int, ...]:
        self.engine: Any = await build_engine(policy, capture, rollout)
        return self.engine.layers

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Completion]]:
        return await self.engine.generate(requests)

    async def report(self) -> dict[str, int]:
        return (await self.engine._rpc("attune_capture_report"))[0]

    async def load(self, manifest: str) -> PolicyVersion:
        return await self.engine.load_weights(manifest)

    async def load_while_it_is_removed(self, manifest: str) -> PolicyVersion:
        """A newer version is published, and this one removed, when its buckets are verified and not yet loaded."""
        from rollout.vllm_capture import extension

        verified = extension.read_published

        def removed(path: str) -> Any:
            tensors = verified(path)
            shutil.rmtree(Path(path).parent)
            return tensors

        extension.read_published = removed
        try:
            return await self.load(manifest)
        finally:
            extension.read_published = verified

    async def close(self) -> None:
        await self.engine.close()

    async def generate_while_loading(
        self, requests: Sequence[GenerationRequest], manifest: str, steps: int
    ) -> list[list[Completion]]:
        """The new weights are there after so many steps of the batch."""
        llm, loop, reached = self.engine._llm, asyncio.get_running_loop(), asyncio.Event()
        step, made = llm._step, 0

        def counted() -> Any:
            nonlocal made
            made += 1
            if made == steps:
                loop.call_soon_threadsafe(reached.set)
            return step()

        llm._step = counted
        try:
            generating = asyncio.create_task(self.engine.generate(requests))
            await reached.wait()
            await self.engine.load_weights(manifest)
            return await generating
        finally:
            llm._step = step


class Host:
    """The caller's side of an `EngineHost`."""

    def __init__(self, policy: PolicySection, capture: CaptureSection, rollout: RolloutSection) -> None:
        import ray

        self._ray: Any = ray
        environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
        host: Any = ray.remote(EngineHost)
        self._actor = host.options(num_cpus=1, runtime_env=environment).remote()
        self.layers = self.call("start", policy, capture, rollout)

    def call(self, method: str, *arguments: Any) -> Any:
        try:
            return self._ray.get(getattr(self._actor, method).remote(*arguments), timeout=300)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error

    def kill(self) -> None:
        self._ray.kill(self._actor)


@pytest.fixture(scope="module")
def roomy(ray_session: str, policy: PolicySection) -> Iterator[Host]:
    """Prefixes stay cached, prompts are prefilled whole; the last layer is captured."""
    del ray_session
    section = RolloutSection(engine="vllm", max_batch_rows=ROOMY, vllm=VllmSection(weight_sync="keep"))
    host = Host(policy, CaptureSection(last_layers=1), section)
    yield host
    host.kill()


@pytest.fixture(scope="module")
def cramped(ray_session: str, policy: PolicySection) -> Iterator[Host]:
    """A cache too small for the batch, so that requests are preempted, and prefill in chunks of 64; three layers."""
    del ray_session
    section = RolloutSection(
        engine="vllm",
        max_batch_rows=32,
        vllm=VllmSection(kv_cache_mib=2, max_batched_tokens=64, weight_sync="keep"),
    )
    host = Host(policy, CaptureSection(last_layers=3), section)
    yield host
    host.kill()


def prompt(length: int, seed: int, **sampling: Any) -> GenerationRequest:
    source = random.Random(seed)
    content = tuple(sorted(source.sample(range(length), max(1, 2 * length // 3))))
    salient = tuple(sorted(source.sample(content, max(1, len(content) // 4))))
    weights = np.array([source.random() + 0.1 for _ in salient])
    keys = KeySets(content, salient, tuple((weights / weights.mean()).tolist()))
    ids = tuple(source.randrange(3, VOCABULARY) for _ in range(length))
    return GenerationRequest(ids, keys, Sampling(**{"max_tokens": 24, **sampling}), seed=seed, keep_maps=1)


REQUESTS = [
    *(prompt(length, length, samples=2, temperature=0.7) for length in (1, 2, 31, 33, 257, 1000)),
    prompt(64, 7, samples=8),
    prompt(100, 8, samples=1, temperature=0.0),
]


def entropy(rows: AttentionRows) -> Any:
    return np.maximum(0, np.log(rows.mass) - rows.neg_entropy_sum / rows.mass)


def assert_same(captured: AttentionRows, expected: AttentionRows, span: slice = slice(None)) -> None:
    """Within the specification's bounds for float32."""
    for name in ("mass", "salient_mass", "peak"):
        np.testing.assert_allclose(getattr(captured, name)[span], getattr(expected, name)[span], atol=1e-5, rtol=0)
    np.testing.assert_allclose(entropy(captured)[span], entropy(expected)[span], atol=1e-4, rtol=0)


def assert_is_recomputed(
    policy: PolicySection, layers: int, requests: Sequence[GenerationRequest], groups: Sequence[Sequence[Completion]]
) -> None:
    oracle = TransformersEngine(policy, CaptureSection(last_layers=layers))
    for asked, group in zip(requests, groups, strict=True):
        assert len(group) == asked.sampling.samples
        for k, completion in enumerate(group):
            expected = asyncio.run(
                oracle.recompute(
                    asked.prompt_ids,
                    completion.response_ids,
                    asked.keys,
                    temperature=asked.sampling.temperature,
                    dense=True,
                )
            )
            assert_same(completion.attention, expected.attention)
            np.testing.assert_allclose(completion.logprobs, expected.logprobs, atol=5e-5, rtol=0)
            assert (completion.attention.dense is not None) == (k < asked.keep_maps)
            if completion.attention.dense is not None:
                np.testing.assert_allclose(completion.attention.dense, expected.attention.dense, atol=1e-5, rtol=0)
            assert (completion.finish_reason == "stop") == (completion.response_ids[-1] == 2)
            assert sum(span[2] for span in completion.versions) == len(completion.response_ids)


def test_statistics_are_those_of_the_tokens(roomy: Host, policy: PolicySection) -> None:
    assert roomy.layers == (2,)
    first = roomy.call("generate", REQUESTS)
    assert_is_recomputed(policy, 1, REQUESTS, first)
    # Again, with every prompt's blocks in the prefix cache; a seed gives the same tokens.
    again = roomy.call("generate", REQUESTS)
    assert_is_recomputed(policy, 1, REQUESTS, again)
    ids = [[[c.response_ids for c in group] for group in groups] for groups in (first, again)]
    assert ids[0] == ids[1]


def test_a_group_of_many_full_batches_has_all_its_statistics(roomy: Host, policy: PolicySection) -> None:
    """The capture holds those of so many finished samples as four batches have, and fetches a group's together."""
    many = [prompt(5, 3, samples=5 * ROOMY, max_tokens=2), prompt(3, 4, samples=2, max_tokens=2)]
    groups = roomy.call("generate", many)
    assert_is_recomputed(policy, 1, many, groups)


def test_preemption_and_chunked_prefill_change_nothing(cramped: Host, policy: PolicySection) -> None:
    assert cramped.layers == (0, 1, 2)
    growing = [prompt(40 + i, i, samples=2, max_tokens=120) for i in range(10)]  # room for a few of them at their end
    for requests in (growing, REQUESTS):
        assert_is_recomputed(policy, 3, requests, cramped.call("generate", requests))
    assert cramped.call("report")["preempted"] > 0


def test_requests_out_of_bounds_are_refused_by_name(roomy: Host) -> None:
    with pytest.raises(RequestRefused, match="context of 1280"):
        roomy.call("generate", [prompt(1270, 1)])
    with pytest.raises(RequestRefused, match=r"top_p .* got 1\.5"):
        roomy.call("generate", [prompt(5, 1, top_p=1.5)])


@pytest.mark.parametrize("host", ["roomy", "cramped"])
def test_truncated_sampling_says_what_it_kept(host: str, policy: PolicySection, request: pytest.FixtureRequest) -> None:
    """Beside requests that do not truncate, in chunks of prefill and through preemption."""
    asked = [
        prompt(40, 1, samples=4, top_p=0.8, temperature=0.7, max_tokens=120),
        prompt(200, 2, samples=4, top_k=5, max_tokens=120),
        prompt(90, 3, samples=2, top_k=40, top_p=0.9, max_tokens=120),
        prompt(30, 4, samples=2),
    ]
    loader: Any = LlamaForCausalLM
    model = loader.from_pretrained(policy.model)
    for wanted, group in zip(asked, request.getfixturevalue(host).call("generate", asked), strict=True):
        for completion in group:
            truncating = wanted.sampling.top_p < 1 or wanted.sampling.top_k > 0
            assert (completion.kept_ids is not None) == (completion.sampling_logprobs is not None) == truncating
            with torch.inference_mode():
                ids = torch.tensor([[*wanted.prompt_ids, *completion.response_ids]])
                logits = model(ids).logits[0, len(wanted.prompt_ids) - 1 : -1]
            whole = torch.log_softmax(logits / wanted.sampling.temperature, dim=-1)
            tokens = torch.tensor(completion.response_ids).unsqueeze(-1)
            np.testing.assert_allclose(completion.logprobs, whole.gather(-1, tokens).squeeze(-1), atol=5e-5, rtol=0)
            if completion.kept_ids is None:
                continue
            for t, kept in enumerate(completion.kept_ids):
                assert completion.response_ids[t] in kept
                share = torch.logsumexp(whole[t, list(kept)], dim=0)
                expected = float(whole[t, completion.response_ids[t]] - share)
                assert completion.sampling_logprobs[t] == pytest.approx(expected, abs=5e-5)
                assert len(kept) <= (wanted.sampling.top_k or VOCABULARY)
                if not wanted.sampling.top_k:
                    least = float(whole[t, list(kept)].min().exp())
                    assert float(share.exp()) > wanted.sampling.top_p - 1e-5 > float(share.exp()) - least - 2e-5
                outside = [i for i in range(VOCABULARY) if i not in set(kept)]
                assert float(whole[t, outside].max()) <= float(whole[t, list(kept)].min()) + 1e-5


def published(policy: PolicySection, directory: Path, step: int, change: Callable[[torch.Tensor], torch.Tensor]) -> str:
    """The policy's weights, changed, as the learner publishes them."""
    loader: Any = LlamaForCausalLM
    state = {name: change(tensor) for name, tensor in loader.from_pretrained(policy.model).state_dict().items()}
    directory.mkdir(parents=True, exist_ok=True)
    return str(write_manifest(directory, PolicyVersion(1, step), [write_bucket(directory, 0, state)]))


def test_damaged_weights_are_refused_and_the_old_ones_stay(roomy: Host, policy: PolicySection, tmp_path: Path) -> None:
    manifest = published(policy, tmp_path, 1, lambda tensor: tensor * 1.01)
    bucket = tmp_path / "bucket_00000.safetensors"
    content = bytearray(bucket.read_bytes())
    content[-1] ^= 1
    bucket.write_bytes(content)
    with pytest.raises(Corrupt, match="bucket_00000"):
        roomy.call("load", manifest)
    assert_is_recomputed(policy, 1, REQUESTS[:2], roomy.call("generate", REQUESTS[:2]))


def test_weights_that_are_removed_while_they_are_loaded_leave_no_policy_until_the_next(
    roomy: Host, policy: PolicySection, tmp_path: Path
) -> None:
    gone, newer = (published(policy, tmp_path / str(step), step, torch.clone) for step in (2, 3))
    with pytest.raises(FileNotFoundError, match=r"bucket_00000\.safetensors"):
        roomy.call("load_while_it_is_removed", gone)
    with pytest.raises(RuntimeError, match="the engine holds no policy"):
        roomy.call("generate", REQUESTS[:1])
    assert roomy.call("load", newer) == PolicyVersion(1, 3)
    assert_is_recomputed(policy, 1, REQUESTS[:2], roomy.call("generate", REQUESTS[:2]))


def test_new_weights_in_mid_generation_of_samples_that_share_their_prompts_blocks(
    roomy: Host, policy: PolicySection, tmp_path: Path
) -> None:
    """All come back in the step in which they went: the first computes the prompt's blocks, the others find them."""
    manifest = published(policy, tmp_path, 8, lambda tensor: tensor * 1.05)
    requests = [prompt(100, 5, samples=4, max_tokens=400)]
    groups = roomy.call("generate_while_loading", requests, manifest, 40)
    assert_is_of_both(policy, changed_policy(policy, manifest, tmp_path), 1, 8, requests, groups)


def test_new_weights_between_responses(roomy: Host, policy: PolicySection, tmp_path: Path) -> None:
    manifest = published(policy, tmp_path, 4, lambda tensor: tensor * 1.02)
    assert roomy.call("load", manifest) == PolicyVersion(1, 4)
    groups = roomy.call("generate", REQUESTS)
    assert {span[:2] for group in groups for c in group for span in c.versions} == {(1, 4)}
    new = changed_policy(policy, manifest, tmp_path)
    assert_is_recomputed(new, 1, REQUESTS, groups)


def test_new_weights_in_mid_generation(cramped: Host, policy: PolicySection, tmp_path: Path) -> None:
    """`keep`: rows and log-probabilities before the boundary are the old weights', those after it the new ones'."""
    manifest = published(policy, tmp_path, 9, lambda tensor: tensor * 1.05)
    requests = [prompt(length, length, samples=2, max_tokens=300) for length in (3, 40, 90)]
    groups = cramped.call("generate_while_loading", requests, manifest, 40)
    assert_is_of_both(policy, changed_policy(policy, manifest, tmp_path), 3, 9, requests, groups)


def assert_is_of_both(
    policy: PolicySection,
    changed: PolicySection,
    layers: int,
    step: int,
    requests: Sequence[GenerationRequest],
    groups: Sequence[Sequence[Completion]],
) -> None:
    """Of the policy up to the version of a step, of the changed one from there on; some responses cross it."""
    old, new = (TransformersEngine(each, CaptureSection(last_layers=layers)) for each in (policy, changed))
    crossed = 0
    for asked, group in zip(requests, groups, strict=True):
        for completion in group:
            boundary = sum(span[2] for span in completion.versions if span[:2] != (1, step))
            crossed += 0 < boundary < len(completion.response_ids)
            for engine, span in ((old, slice(0, boundary)), (new, slice(boundary, None))):
                expected = asyncio.run(
                    engine.recompute(asked.prompt_ids, completion.response_ids, asked.keys, temperature=1.0)
                )
                assert_same(completion.attention, expected.attention, span)
                np.testing.assert_allclose(completion.logprobs[span], expected.logprobs[span], atol=5e-5, rtol=0)
    assert crossed > 0


def changed_policy(policy: PolicySection, manifest: str, directory: Path) -> PolicySection:
    """A model directory of published weights."""
    from services.weights import read_published

    loader: Any = LlamaForCausalLM
    model = loader.from_pretrained(policy.model)
    model.load_state_dict(dict(read_published(manifest)))
    out = directory / "changed"
    model.save_pretrained(out)
    return PolicySection(model=str(out))


@pytest.mark.slow
def test_two_ranks_share_the_heads(ray_session: str, policy: PolicySection, tmp_path: Path) -> None:
    """Tensor parallelism, and with it vLLM in processes of its own: rows are summed over the ranks' heads."""
    del ray_session
    section = RolloutSection(engine="vllm", max_batch_rows=32, vllm=VllmSection(tensor_parallel=2))
    host = Host(policy, CaptureSection(last_layers=3), section)
    try:
        assert_is_recomputed(policy, 3, REQUESTS, host.call("generate", REQUESTS))
        manifest = published(policy, tmp_path, 4, lambda tensor: tensor * 1.02)
        assert host.call("load", manifest) == PolicyVersion(1, 4)
        assert_is_recomputed(changed_policy(policy, manifest, tmp_path), 3, REQUESTS, host.call("generate", REQUESTS))
    finally:
        host.call("close")
        host.kill()


@pytest.mark.slow
def test_the_processes_of_an_engine_end_with_the_one_that_started_them(policy: PolicySection) -> None:
    """Killed as the kernel kills: what is left would keep a GPU's memory from the engine that comes in its place."""
    program = f"""
import asyncio, sys, time
from rollout.config import RolloutSection, VllmSection
from rollout.vllm_engine import VllmEngine
from services.attention.config import CaptureSection
from services.models_config import PolicySection
if __name__ == "__main__":
    section = RolloutSection(engine="vllm", max_batch_rows=8, vllm=VllmSection(tensor_parallel=2))
    engine = VllmEngine(PolicySection(model={policy.model!r}), CaptureSection(), section)
    asyncio.run(engine.start())
    print("up", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as owner:
        try:
            assert owner.stdout is not None
            assert any(line == "up\n" for line in owner.stdout)
            started = psutil.Process(owner.pid).children(recursive=True)
        finally:
            owner.kill()
    assert len(started) >= 3  # the engine's and two workers
    _, left = psutil.wait_procs(started, timeout=30)
    assert left == []


class OwnVllm:
    """A vLLM of the user's own, by the code that docs/attention-capture.md shows."""

    def run(self, code: str, model: str, prompts: list[list[int]]) -> tuple[list[Any], list[Any], list[Any]]:
        import os

        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import SamplingParams

        scope: dict[str, Any] = {"model": model, "prompt_ids": prompts}
        exec(code, scope)  # noqa: S102 - the documentation's example, run as a reader would
        llm = scope["llm"]
        sampling = SamplingParams(temperature=1.0, max_tokens=16, seed=5, logprobs=0, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        llm.collective_rpc("attune_capture_stop")
        llm.reset_prefix_cache()
        without = llm.generate(inputs, sampling, use_tqdm=False)
        llm.collective_rpc("attune_capture_start")
        llm.reset_prefix_cache()
        with_capture = llm.generate(inputs, sampling, use_tqdm=False)
        llm.collective_rpc("attune_capture_stop")
        llm.collective_rpc("attune_capture_start")  # and finds keys in the cache that it has not seen
        llm.generate(inputs, [scope["ask"](i, ids) for i, ids in enumerate(prompts)], use_tqdm=False)
        keys = [f"request-{i}" for i in range(len(prompts))]
        warm = llm.collective_rpc("attune_capture_pop", args=(keys, [16] * len(keys)))[0]
        pairs = [
            [
                (list(o.outputs[0].token_ids), [next(iter(s.values())).logprob for s in o.outputs[0].logprobs])
                for o in run
            ]
            for run in (without, with_capture)
        ]
        return scope["statistics"], pairs, [np.frombuffer(each["statistics"], np.float32) for each in warm]


class SpeculativeVllm:
    """A vLLM that drafts three tokens by looking the last ones up in the text so far."""

    def run(self, model: str, prompts: list[list[int]]) -> tuple[list[Any], dict[str, int]]:
        import os

        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM, SamplingParams

        from rollout.vllm_capture.request import extra_args

        llm = LLM(
            model,
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            block_size=32,
            kv_cache_memory_bytes=64 * 2**20,
            disable_log_stats=False,
            speculative_config={
                "method": "ngram",
                "num_speculative_tokens": 3,
                "prompt_lookup_min": 1,
                "prompt_lookup_max": 2,
            },
            worker_extension_cls="rollout.vllm_capture.extension.CaptureExtension",
        )
        llm.collective_rpc("attune_capture_start", args=({"last_layers": 3},))
        keys = [str(i) for i in range(len(prompts))]
        asked = [
            SamplingParams(
                temperature=0.0,
                max_tokens=60,
                ignore_eos=True,
                detokenize=False,
                extra_args=extra_args(key, range(len(ids)), [0], [1.0]),
            )
            for key, ids in zip(keys, prompts, strict=True)
        ]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        fetched = llm.collective_rpc("attune_capture_pop", args=(keys, [len(ids) for ids in tokens]))[0]
        counters = {metric.name: int(metric.value) for metric in llm.get_metrics() if hasattr(metric, "value")}
        return [
            (ids, np.frombuffer(each["statistics"], np.float32).reshape(-1, 4))
            for ids, each in zip(tokens, fetched, strict=True)
        ], counters


@pytest.mark.slow
def test_rejected_drafts_leave_no_trace(ray_session: str, policy: PolicySection) -> None:
    import ray

    del ray_session
    prompts = [list(prompt(length, length).prompt_ids) for length in (7, 40, 120)]
    host: Any = ray.remote(SpeculativeVllm)
    actor = host.options(num_cpus=1, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}}).remote()
    library: Any = ray
    statistics, counters = library.get(actor.run.remote(policy.model, prompts), timeout=300)
    drafted = counters["vllm:spec_decode_num_draft_tokens"]
    assert 0 < counters["vllm:spec_decode_num_accepted_tokens"] < drafted
    oracle = TransformersEngine(policy, CaptureSection(last_layers=3))
    for ids, (tokens, rows) in zip(prompts, statistics, strict=True):
        keys = KeySets(tuple(range(len(ids))), (0,), (1.0,))
        expected = asyncio.run(oracle.recompute(ids, tokens, keys, temperature=1.0)).attention
        assert_same(AttentionRows(*rows.T), expected)
    library.kill(actor)


@pytest.mark.slow
def test_the_documented_example_and_capture_changes_nothing(ray_session: str, policy: PolicySection) -> None:
    import ray

    del ray_session
    page = Path("docs/attention-capture.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(code.splitlines()) <= 30
    prompts = [list(prompt(length, length).prompt_ids) for length in (5, 70, 200)]
    host: Any = ray.remote(OwnVllm)
    actor = host.options(num_cpus=1, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}}).remote()
    library: Any = ray
    statistics, pairs, warm = library.get(actor.run.remote(code, policy.model, prompts), timeout=120)
    without, with_capture = pairs
    assert without == with_capture
    assert [bool(np.isfinite(rows).all()) for rows in warm] == [True, True, False]  # a whole block is 128 tokens
    for ids, (tokens, rows) in zip(prompts, statistics, strict=True):
        oracle = TransformersEngine(policy, CaptureSection())
        keys = KeySets(tuple(range(len(ids))), (0,), (1.0,))
        expected = asyncio.run(oracle.recompute(ids, tokens, keys, temperature=1.0)).attention
        np.testing.assert_allclose(rows[:, 0], expected.mass, atol=1e-5)
        np.testing.assert_allclose(rows[:, 3], expected.peak, atol=1e-5)
    library.kill(actor)
