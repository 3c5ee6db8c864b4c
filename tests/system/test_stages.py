"""The other stages by their commands: fine-tuning, evaluation against a baseline, the scoring service alone."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from services.scoring_format import read_format

Attune = Callable[..., tuple[int, str]]
Recipe = Callable[..., Path]


def test_fine_tuning_then_evaluation_against_the_start(
    attune: Attune, recipe: Recipe, tmp_path: Path, tiny_decoder: Path
) -> None:
    tuned, figures = tmp_path / "tuned", tmp_path / "figures.json"
    path = recipe(
        sft={"epochs": 4, "batch_size": 8, "lr": 3e-3},
        evaluation={"prompts": 6, "samples": 2, "resamples": 100},
    )
    code, output = attune("sft", str(path), "--out", str(tuned))
    assert code == 0, output
    assert "epoch 4" in output
    code, output = attune("sft", str(path), "--out", str(tuned))
    assert code == 2, output  # never over a model that is there

    arguments = ("--model", str(tuned), "--baseline", str(tiny_decoder), "--split", "validation")
    code, output = attune("evaluate", str(path), *arguments, "--json", str(figures))
    assert code == 0, output
    found = json.loads(figures.read_text(encoding="utf-8"))
    changes = {(change["decoding"], change["metric"]): change for change in found["changes"]}
    perplexity = changes["greedy", "perplexity"]
    assert perplexity["after"] < perplexity["before"]
    assert ("nucleus", "reward") in changes
    rescored = {(change["decoding"], change["metric"]) for change in found["changes_under_starting_attention"]}
    assert ("nucleus", "reward") in rescored


def test_preferences_then_a_reward_model_from_the_policy(attune: Attune, recipe: Recipe, tmp_path: Path) -> None:
    """Off-topic negatives of the recipe's own prompts, and the directory that training on them writes."""
    pairs, scorer = tmp_path / "pairs.jsonl", tmp_path / "scorer"
    path = recipe(reward_model={"source": str(pairs), "batch_size": 8, "lr": 3e-3, "epochs": 4, "patience": 0})
    code, output = attune("preferences", str(path), "--out", str(pairs))
    assert code == 0, output
    code, output = attune("reward-model", str(path), "--out", str(scorer))
    assert code == 0, output
    assert "held-out loss" in output
    report = json.loads((scorer / "training" / "report.json").read_text(encoding="utf-8"))
    lines = (scorer / "training" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 16
    assert report["loss"] == min(json.loads(line)["held_out"]["loss"] for line in lines)
    form = read_format(scorer)
    assert form is not None
    assert (form.kind, form.output) == ("preference", "logit")
    assert form.revision
    code, output = attune("reward-model", str(path), "--out", str(scorer))
    assert code == 2, output  # never over a model that is there
    code, output = attune("reward-model", str(path), "--out", str(tmp_path / "x"), "reward_model.kind=absolute")
    assert code == 2, output
    assert "pairs.jsonl:1: needs one of rating" in output


@pytest.mark.slow
def test_a_reward_model_whose_training_was_killed_goes_on(
    attune: Attune, start: Callable[..., subprocess.Popen[str]], recipe: Recipe, tmp_path: Path
) -> None:
    """Killed after its first checkpoint, and started again: the same bytes as of a training that was left alone."""
    pairs, whole, killed = tmp_path / "pairs.jsonl", tmp_path / "whole", tmp_path / "killed"
    settings = {"source": str(pairs), "batch_size": 2, "lr": 3e-3, "epochs": 8, "patience": 0}
    path = recipe(reward_model=settings)
    assert attune("preferences", str(path), "--out", str(pairs))[0] == 0
    code, output = attune("reward-model", str(path), "--out", str(whole))
    assert code == 0, output
    process = start("reward-model", str(path), "--out", str(killed))
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("killed.training/checkpoints/step_*[0-9]/COMMITTED")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not killed.exists()
    code, output = attune("reward-model", str(path), "--out", str(killed), "reward_model.lr=1e-3")
    assert code == 2, output
    assert "another reward_model.lr (0.003, now 0.001)" in output
    code, output = attune("reward-model", str(path), "--out", str(killed))
    assert code == 0, output
    assert "going on after" in output
    for name in ("model.safetensors", "scorer.json", "training/metrics.jsonl", "training/report.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert not list(tmp_path.glob("*.training"))


def test_the_scoring_service_alone(start: Callable[..., subprocess.Popen[str]]) -> None:
    """Without Ray, on a free port, until a signal."""
    process = start("reward-server", "recipes/reward/attention.yaml", "--port", "0")
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        url = next(word for word in line.split() if word.startswith("http://"))
        item = {
            "id": "a",
            "response_ids": [5, 6],
            "attention": {"rows": [[0.5, 0.5], [0.9, 0.1]], "content": [0, 1], "salient": [0], "salient_weights": None},
        }
        deadline = time.monotonic() + 30
        while httpx.get(url + "/readyz").status_code != 200:
            assert time.monotonic() < deadline
        answer = httpx.post(url + "/v1/rewards", json={"items": [item]}).json()
        assert answer["results"][0]["status"] == "ok"
        assert answer["results"][0]["components"]["attention"]["detail"]["coverage"] == 0.7
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert process.returncode == 0
