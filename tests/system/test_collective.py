"""Runs whose weights go by collective: the same account as by files, and deaths in the middle of a transfer."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from learner.commit import latest_committed
from services.stream.config import StreamSection
from services.stream.embedded import address_in
from services.stream.ledger import open_ledger
from services.vocabulary import NONDETERMINISTIC

Attune = Callable[..., tuple[int, str]]
Recipe = Callable[..., Path]
COLLECTIVE = {"weights": "collective", "transfer_s": 20}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def reproducible(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in NONDETERMINISTIC} for row in rows(run / "metrics.jsonl")]


def test_vllm_gets_its_weights_by_collective(attune: Attune, recipe: Recipe, tmp_path: Path) -> None:
    """And the evaluator, for which the learner serves a round of its own."""
    run = tmp_path / "run"
    path = recipe(
        run={"steps": 3},
        rollout={"engine": "vllm", "samples": 4, "temperature": 0.8},
        learner={"advantage": "grpo", "kl": {"place": "loss", "coef": 0.05}},
        evaluation={"every": 3, "prompts": 2, "samples": 2, "resamples": 100},
        cluster={**COLLECTIVE, "start_s": 120, "bucket_mib": 0.05},
    )
    code, output = attune("train", str(path), "--run-dir", str(run))
    assert code == 0, output
    metrics = rows(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2]
    # Each step's samples are of the version that it trains, under one distribution: the weights arrived.
    assert max(row["policy/first_log_ratio_max"] for row in metrics) < 1e-4
    assert max(row["drift/attention_max"] for row in metrics) < 1e-5
    assert max(row["staleness/max"] for row in metrics) == 0
    assert "evaluation/greedy/reward" in metrics[2]
    commit = latest_committed(run).commit
    assert commit is not None
    groups = [group for step in commit.manifest["steps"].values() for group in step]
    assert len(groups) == len(set(groups)) == 12
    assert "transfer_broken" not in (run / "events.jsonl").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_run_by_collective_is_the_run_by_files_bit_for_bit(attune: Attune, recipe: Recipe, tmp_path: Path) -> None:
    """By either way in which the bytes come: `auto` is a look at the learner's memory here."""
    ways = {
        "files": {"weights": "files"},
        "auto": {"weights": "collective"},
        "gloo": {"weights": "collective", "transfer_backend": "gloo"},
    }
    for name, way in ways.items():
        path = recipe(run={"steps": 3}, rollout={"actors": 2}, learner={"ranks": 2}, cluster={**way, "start_s": 120})
        code, output = attune("train", str(path), "--run-dir", str(tmp_path / name))
        assert code == 0, output
    runs = [tmp_path / name for name in ways]
    said = [[row["backend"] for row in rows(run / "events.jsonl") if row["event"] == "weights_backend"] for run in runs]
    assert said == [[], ["ipc"], ["gloo"]]
    metrics = [reproducible(run) for run in runs]
    assert metrics[0] == metrics[1] == metrics[2]
    weights = {hashlib.sha256((run / "policy" / "model.safetensors").read_bytes()).hexdigest() for run in runs}
    assert len(weights) == 1


@pytest.fixture
def larger(tmp_path: Path, tiny_decoder: Path) -> Path:
    """A policy of 40 MiB: it takes a moment to be sent."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_decoder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=768,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=96,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(tmp_path / "larger")
    tokenizer.save_pretrained(tmp_path / "larger")
    return tmp_path / "larger"


def kill_in_mid_transfer(process: Any, run: Path, actor: str) -> tuple[int, str]:
    """Kills an actor by its class's name as soon as the gate offers the weights after step 1; (exit code, output)."""
    end = time.monotonic() + 150
    while time.monotonic() < end and not (run / "metrics.jsonl").exists():
        time.sleep(0.05)
    url = address_in(run / "redis")
    assert url is not None
    run_id = str(rows(run / "events.jsonl")[0]["run_id"])
    ledger = open_ledger(url, run_id, StreamSection())
    found = [child for child in psutil.Process().children(recursive=True) if actor in " ".join(child.cmdline())]
    while time.monotonic() < end:
        gate = ledger.gate()
        if gate is not None and gate.version.step == 2:
            break
        time.sleep(0.002)
    os.kill(found[-1].pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    return process.returncode, output


def left_of(run: Path) -> list[str]:
    """Actors of the run that live, and files of its weights."""
    lines = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    actors = [line for line in lines if "LearnerWorker" in line or "RolloutWorker" in line]
    run_id = str(rows(run / "events.jsonl")[0]["run_id"])
    return actors + [str(path) for path in Path("/dev/shm").glob(f"attune-{run_id}*")]


@pytest.mark.slow
@pytest.mark.parametrize(("actors", "backend"), [(1, "auto"), (2, "auto"), (2, "gloo")])
def test_a_rollout_actor_that_dies_in_mid_transfer_is_replaced_and_gets_the_version(
    start: Callable[..., Any], recipe: Recipe, tmp_path: Path, larger: Path, actors: int, backend: str
) -> None:
    run = tmp_path / "run"
    path = recipe(
        run={"steps": 5},
        policy={"model": str(larger)},
        rollout={"actors": actors},
        cluster={**COLLECTIVE, "start_s": 120, "bucket_mib": 1.0, "transfer_backend": backend},
    )
    process = start("train", str(path), "--run-dir", str(run))
    code, output = kill_in_mid_transfer(process, run, "RolloutWorker")
    assert code == 0, output
    events = [row["event"] for row in rows(run / "events.jsonl")]
    assert events.count("rollout_died") == 1
    assert "transfer_broken" in events
    commit = latest_committed(run).commit
    assert commit is not None
    groups = [group for step in commit.manifest["steps"].values() for group in step]
    assert len(groups) == len(set(groups)) == 20
    assert not left_of(run)


@pytest.mark.slow
def test_a_learner_rank_that_dies_in_mid_transfer_is_started_again_from_the_last_commit(
    start: Callable[..., Any], recipe: Recipe, tmp_path: Path, larger: Path
) -> None:
    run = tmp_path / "run"
    path = recipe(
        run={"steps": 5},
        policy={"model": str(larger)},
        learner={"ranks": 2},
        checkpoint={"every": 1},
        cluster={**COLLECTIVE, "start_s": 120, "bucket_mib": 1.0, "transfer_backend": "gloo"},
    )
    process = start("train", str(path), "--run-dir", str(run))
    code, output = kill_in_mid_transfer(process, run, "LearnerWorker")
    assert code == 0, output
    assert [row["event"] for row in rows(run / "events.jsonl")].count("learner_died") == 1
    commit = latest_committed(run).commit
    assert commit is not None
    groups = [group for step in commit.manifest["steps"].values() for group in step]
    assert len(groups) == len(set(groups)) == 20
    assert not left_of(run)


@pytest.mark.slow
def test_a_learner_rank_that_dies_in_mid_transfer_ends_the_run_with_its_name(
    start: Callable[..., Any], recipe: Recipe, tmp_path: Path, larger: Path
) -> None:
    run = tmp_path / "run"
    path = recipe(
        run={"steps": 5},
        policy={"model": str(larger)},
        learner={"ranks": 2},
        checkpoint={"every": 1},
        cluster={**COLLECTIVE, "start_s": 120, "bucket_mib": 1.0, "restarts": 0},
    )
    process = start("train", str(path), "--run-dir", str(run))
    code, output = kill_in_mid_transfer(process, run, "LearnerWorker")
    assert code == 1, output
    assert "learner-" in output
    assert "Traceback" not in output
    assert not left_of(run)
    # No prompt is lost: the run goes on from its last commit to its end.
    process = start("train", str(path), "--run-dir", str(run), "--resume", "auto")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    commit = latest_committed(run).commit
    assert commit is not None
    groups = [group for step in commit.manifest["steps"].values() for group in step]
    assert len(groups) == len(set(groups)) == 20
