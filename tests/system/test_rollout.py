"""`attune rollout`: both engines, the sample's contract, and going on after a kill."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

Attune = Callable[..., tuple[int, str]]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def arguments(model: Path, prompts: Path, out: Path, *more: str) -> tuple[str, ...]:
    return (
        *("rollout", "--model", str(model), "--prompts", str(prompts), "--out", str(out)),
        *("--engine", "transformers", "--samples", "2", "--max-tokens", "6", *more),
    )


@pytest.mark.parametrize("family", ["decoder", "encoder-decoder"])
def test_samples_are_those_of_the_contract_and_are_gone_on_with(
    attune: Attune,
    questions_file: Path,
    tiny_decoder: Path,
    tiny_encoder_decoder: Path,
    tmp_path: Path,
    family: str,
) -> None:
    model = tiny_decoder if family == "decoder" else tiny_encoder_decoder
    out = tmp_path / "s.jsonl"
    command = arguments(model, questions_file, out, "--keep-maps", "--capture-layers", "2")
    code, output = attune(*command)
    assert code == 0, output
    samples = rows(out)
    prompts = {row["prompt_id"] for row in samples}
    assert len(samples) == 2 * len(prompts) == 2 * 36
    for sample in samples:
        attention = sample["attention"]
        dense = load_file(tmp_path / attention["map_ref"])["map"]
        assert dense.shape == (len(sample["response_ids"]), len(sample["prompt_ids"]))
        np.testing.assert_allclose(dense[:, attention["content"]].sum(1), attention["mass"], atol=1e-5)
        assert attention["layers"] == [0, 1]

    # Killed in mid-write: a group half there, a line cut short.
    lines = out.read_text(encoding="utf-8").splitlines(keepends=True)
    out.write_text("".join(lines[:21]) + lines[21][:40], encoding="utf-8")
    code, output = attune(*command)
    assert code == 0, output
    again = {row["sample_id"]: row["response_ids"] for row in rows(out)}
    assert again == {row["sample_id"]: row["response_ids"] for row in samples}

    code, output = attune(*arguments(model, questions_file, out, "--seed", "5"))
    assert code == 2
    assert "--capture-layers" in output


@pytest.mark.slow
def test_vllm_writes_the_same_kind_of_samples(
    start: Callable[..., subprocess.Popen[str]], questions_file: Path, tiny_decoder: Path, tmp_path: Path
) -> None:
    """In a process of its own: vLLM changes torch for the whole process that it runs in."""
    out = tmp_path / "s.jsonl"
    process = start(*arguments(tiny_decoder, questions_file, out, "--keep-maps"), "--engine", "vllm")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    samples = rows(out)
    assert len(samples) == 2 * 36
    for sample in samples:
        attention = sample["attention"]
        dense = load_file(tmp_path / attention["map_ref"])["map"]
        assert dense.shape == (len(sample["response_ids"]), len(sample["prompt_ids"]))
        np.testing.assert_allclose(dense[:, attention["content"]].sum(1), attention["mass"], atol=1e-5)


def test_a_model_or_file_that_is_not_there_is_named(attune: Attune, tiny_decoder: Path, tmp_path: Path) -> None:
    code, output = attune(*arguments(tiny_decoder, tmp_path / "absent.jsonl", tmp_path / "s.jsonl"))
    assert code == 2
    assert "absent.jsonl" in output
