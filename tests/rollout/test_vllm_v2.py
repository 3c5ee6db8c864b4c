"""vLLM's model runner V2, real but in Triton's interpreter: its captured statistics against the transformers engine's
recomputation of the same tokens, whatever the scheduler did to them.
"""

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rollout.engine import AttentionRows, KeySets
from rollout.transformers_engine import TransformersEngine
from rollout.vllm_capture.request import extra_args
from services.attention.config import CaptureSection
from services.models_config import PolicySection

VOCABULARY = 128


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> PolicySection:
    """A Llama of two layers with grouped-query attention, of whose cache a mebibyte holds 16 blocks of 32."""
    directory = tmp_path_factory.mktemp("v2-policy")
    torch.manual_seed(12)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            hidden_size=64,
            head_dim=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.2,
        )
    ).save_pretrained(directory)
    return PolicySection(model=str(directory))


def request(length: int, seed: int, *, dense: bool = False, **sampling: Any) -> tuple[list[int], dict[str, Any]]:
    """A prompt of random ids and what is asked for it; the same seed gives the same prompt."""
    source = random.Random(length)
    content = sorted(source.sample(range(length), max(1, 2 * length // 3)))
    salient = sorted(source.sample(content, max(1, len(content) // 4)))
    weights = np.array([source.random() + 0.1 for _ in salient])
    ids = [source.randrange(3, VOCABULARY) for _ in range(length)]
    wish = extra_args(
        f"{length}-{seed}-{random.random()}", content, salient, (weights / weights.mean()).tolist(), dense=dense
    )
    return ids, {"temperature": 0.7, "seed": seed, "ignore_eos": True, "extra_args": wish, **sampling}


def answers_of(tmp_path: Path, runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    asked, answered = tmp_path / "asked", tmp_path / "answered"
    asked.write_text(json.dumps(list(runs)))
    program = Path(__file__).with_name("v2_program.py")
    done = subprocess.run(
        [sys.executable, str(program), str(asked), str(answered)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(answered.read_text())
    for each in found:
        assert each["runner"] == "vllm.v1.worker.gpu.model_runner"
    return found


def entropy(mass: Any, neg_entropy: Any) -> Any:
    return np.maximum(0, np.log(mass) - neg_entropy / mass)


def assert_is_recomputed(policy: PolicySection, layers: int, call: Any, answers: Any) -> None:
    """Within the specification's bounds for float32."""
    oracle = TransformersEngine(policy, CaptureSection(last_layers=layers))
    for (ids, given), (tokens, logprobs, fetched, dense) in zip(call, answers, strict=True):
        statistics = np.array(fetched, dtype=np.float32)
        wish = given["extra_args"]["attune"]
        keys = KeySets(tuple(wish["content"]), tuple(wish["salient"]), tuple(wish["salient_weights"]))
        expected = asyncio.run(
            oracle.recompute(tuple(ids), tuple(tokens), keys, temperature=given["temperature"], dense=True)
        )
        rows: AttentionRows = expected.attention
        assert len(statistics) == len(tokens) > 0
        for column, name in ((0, "mass"), (1, "salient_mass"), (3, "peak")):
            np.testing.assert_allclose(statistics[:, column], getattr(rows, name), atol=1e-5, rtol=0)
        np.testing.assert_allclose(
            entropy(statistics[:, 0], statistics[:, 2]), entropy(rows.mass, rows.neg_entropy_sum), atol=1e-4, rtol=0
        )
        np.testing.assert_allclose(logprobs, expected.logprobs, atol=5e-5, rtol=0)
        assert (dense is not None) == wish["dense"]
        if dense is not None:
            assert rows.dense is not None
            np.testing.assert_allclose(dense, rows.dense, atol=1e-5, rtol=0)


def test_statistics_are_those_of_the_tokens(policy: PolicySection, tmp_path: Path) -> None:
    """A prompt in two chunks beside a short one; the last layer."""
    llm = {
        "model": policy.model,
        "max_model_len": 64,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 48,
        "kv_cache_memory_bytes": 2**19,
    }
    calls = [[request(3, 0, max_tokens=3), request(50, 0, dense=True, max_tokens=3)]]
    (found,) = answers_of(tmp_path, [{"llm": llm, "section": {}, "calls": calls}])
    assert found["started"] == {"layers": [1], "kept_sets": False}
    assert_is_recomputed(policy, 1, calls[0], found["answers"][0])


@pytest.mark.slow
def test_chunks_prefixes_and_preemption_change_nothing(policy: PolicySection, tmp_path: Path) -> None:
    """Prefill in chunks of 48, two samples of one prompt, a cache of 7 blocks in which the requests grow to 8; then the
    prefix cache. Two layers; once more when the capture is stopped, and with steps that are scheduled ahead."""
    calls = [
        [request(58, 0, dense=True, max_tokens=10), request(58, 1, max_tokens=10), request(57, 0, max_tokens=10)],
        [request(58, 2, max_tokens=3), request(1, 0, dense=True, max_tokens=4)],
    ]
    llm = {
        "model": policy.model,
        "max_model_len": 96,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 48,
        "kv_cache_memory_bytes": 2**19,
    }
    run = {"llm": llm, "section": {"last_layers": 2}, "calls": calls, "again": True}
    found, ahead = answers_of(tmp_path, [run, {**run, "ahead": True, "again": False}])
    assert (found["scheduler"], ahead["scheduler"]) == ("Scheduler", "AsyncScheduler")
    assert found["started"] == {"layers": [0, 1], "kept_sets": False}
    for each in (found, ahead):
        for call, answers in zip(calls, each["answers"], strict=True):
            assert_is_recomputed(policy, 2, call, answers)
        assert each["report"]["preempted"] > 0
    tokens_and_logprobs = [
        [[answer[:2] for answer in answers] for answers in each] for each in (found["answers"], found["without"])
    ]
    assert tokens_and_logprobs[0] == tokens_and_logprobs[1]


@pytest.mark.slow
def test_keys_of_a_gpu_backend_and_rejected_drafts(policy: PolicySection, tmp_path: Path) -> None:
    """Triton's attention, whose paged keys are read where they lie; then with drafts, of which most are rejected."""
    llm = {"model": policy.model, "max_model_len": 64, "max_num_seqs": 2, "kv_cache_memory_bytes": 2**20}
    drafts = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}}
    calls = [[request(3, 0, max_tokens=12), request(40, 0, dense=True, max_tokens=12, temperature=0.0)]]
    runs = [{"llm": {**llm, **more}, "section": {"last_layers": 1}, "calls": calls} for more in ({}, drafts)]
    for found in answers_of(tmp_path, [{**run, "triton": True} for run in runs]):
        assert_is_recomputed(policy, 1, calls[0], found["answers"][0])
