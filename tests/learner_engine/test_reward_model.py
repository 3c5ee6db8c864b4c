"""Models that score, on real ranks: what they learn, two ranks against one, and that what is written scores alike.

The truth is simple (conftest): w5 is good and w6 is bad, at the end of a sequence or of a step.
"""

import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import log_softmax, logsigmoid
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from learner.commit import latest_committed
from services.scoring_format import STEP_LABELS
from tests.learner_engine.conftest import run_ranks, scoring_job, start_rank


def loaded(result: Any, loader: Any) -> Any:
    model, info = loader.from_pretrained(result["directory"], output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


@torch.no_grad()
def scores(model: Any, inputs: list[list[int]]) -> list[float]:
    """Each input alone, by transformers' own forward: what serving computes."""
    return [float(model(input_ids=torch.tensor([ids])).logits[0, 0]) for ids in inputs]


def mean_loss(model: Any, held_out: list[dict[str, Any]], centring: float) -> float:
    losses = []
    for example in held_out:
        row = scores(model, example["inputs"])
        pairs = [(a, b) for i, a in enumerate(row) for b in row[i + 1 :]]
        loss = -sum(float(logsigmoid(torch.tensor(a - b))) for a, b in pairs) / len(pairs)
        losses.append(loss + centring * sum(row) ** 2)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", ["comparisons", "lora"])
def test_what_is_written_scores_as_training_did(name: str, scoring_runs: Any, scoring_held_out: Any) -> None:
    result = scoring_runs[1][name]
    model = loaded(result, AutoModelForSequenceClassification)
    assert model.config.num_labels == 1
    found = mean_loss(model, scoring_held_out["comparisons"], 0.01)
    assert found == pytest.approx(result["report"]["loss"], abs=1e-5)
    assert result["report"]["accuracy"] > 0.8


def test_two_ranks_train_the_same_model_as_one(scoring_runs: Any) -> None:
    one, two = (ran["comparisons"]["lines"] for ran in scoring_runs)
    assert [line["updates"] for line in one] == [line["updates"] for line in two]
    # Sums in another order, which Adam's steps let grow.
    for ours, theirs, within in zip(two, one, (1e-6, 1e-5, 1e-3, 1e-3, 1e-3, 1e-3), strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=within)
        assert ours["held_out"]["loss"] == pytest.approx(theirs["held_out"]["loss"], abs=10 * within)


def test_every_rank_hears_what_the_others_say(scoring_runs: Any) -> None:
    one, two = (ran["comparisons"]["heard"] for ran in scoring_runs)
    assert one == ["0"]
    assert two == ["0", "1" + "é" * 100]


def test_cheap_preferences_come_first_and_evaluations_are_written(scoring_runs: Any) -> None:
    lines = scoring_runs[1]["comparisons"]["lines"]
    assert [line["stage"] for line in lines] == ["pretrain"] * 2 + ["train"] * 4
    assert [line["updates"] for line in lines] == [1, 2, 7, 12, 17, 22]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert (
        min(line["held_out"]["loss"] for line in lines if line["best"])
        == scoring_runs[1]["comparisons"]["report"]["loss"]
    )


def test_adapters_train_few_weights_and_leave_none_behind(model_dirs: dict[str, str], scoring_runs: Any) -> None:
    loader: Any = AutoModelForCausalLM
    before = dict(loader.from_pretrained(model_dirs["untied"]).named_parameters())
    after = load_file(f"{scoring_runs[1]['lora']['directory']}/model.safetensors")
    moved = {name for name, tensor in after.items() if name in before and not torch.equal(tensor, before[name])}
    assert moved
    assert all(name.endswith("proj.weight") for name in moved)
    change = (after["model.layers.0.mlp.up_proj.weight"] - before["model.layers.0.mlp.up_proj.weight"]).double()
    assert int(torch.linalg.matrix_rank(change, rtol=1e-4)) <= 4


@torch.no_grad()
def test_a_process_model_labels_steps(scoring_runs: Any, scoring_held_out: Any) -> None:
    result = scoring_runs[1]["steps"]
    assert result["report"]["accuracy"] > 0.95
    model = loaded(result, AutoModelForTokenClassification)
    assert [model.config.id2label[place] for place in range(3)] == list(STEP_LABELS)
    losses = []
    for example in scoring_held_out["steps"]:
        logits = log_softmax(model(input_ids=torch.tensor(example["inputs"])).logits[0], -1)
        losses += [-float(logits[i, int(y)]) for i, y in zip(example["step_ends"], example["targets"], strict=True)]
    assert sum(losses) / len(losses) == pytest.approx(result["report"]["loss"], abs=1e-5)


def test_training_stops_when_the_held_out_loss_no_longer_falls(scoring_runs: Any) -> None:
    """Held-out labels that contradict the training ones: what is learnt makes them worse from early on."""
    result = scoring_runs[1]["contradicted"]
    assert result["report"]["stopped_early"]
    lines = [line for line in result["lines"] if line["stage"] == "train"]
    assert lines[-1]["updates"] < 22
    assert not any(line["best"] for line in lines[-2:])
    assert math.isclose(result["report"]["loss"], min(line["held_out"]["loss"] for line in lines))


@pytest.mark.parametrize("name", ["comparisons", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_training_that_was_killed_goes_on_bit_for_bit(model_dirs: dict[str, str], name: str, tmp_path: Path) -> None:
    """Killed once a checkpoint is committed, and begun again from it: weights, figures and lines as if never killed."""
    job = scoring_job(model_dirs["tied"], lora={"rank": 4 if name == "lora" else 0}, evaluations=4, patience=6)
    (tmp_path / "killed").mkdir()
    (tmp_path / "resumed").mkdir()
    process = start_rank({name: job}, tmp_path / "killed")
    work = tmp_path / "killed" / name / "work"
    deadline = time.monotonic() + 200
    while not list(work.glob("checkpoints/step_*[0-9]/COMMITTED")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    commit = latest_committed(work).commit
    assert commit is not None
    assert 0 < commit.step < 22
    shutil.copytree(work, tmp_path / "resumed" / "resumed" / "work")
    again = tmp_path / "resumed" / "resumed" / "work" / "checkpoints" / commit.path.name
    results = run_ranks({"whole": job, "resumed": {**job, "resume": str(again)}}, 1, tmp_path / "resumed")
    whole, resumed = results["whole"], results["resumed"]
    assert resumed["report"] == whole["report"]
    assert resumed["lines"] == whole["lines"]
    assert len(whole["lines"]) == 10
    ours, theirs = (Path(each["directory"], "model.safetensors").read_bytes() for each in (resumed, whole))
    assert ours == theirs


def test_what_a_rank_wrote_elsewhere_is_not_committed(model_dirs: dict[str, str], tmp_path: Path) -> None:
    job = {**scoring_job(model_dirs["tied"]), "scenario": "apart"}
    said = run_ranks({"apart": job}, 2, tmp_path)["apart"]["said"]
    assert "rank 1 on" in said
    assert "it is not there" in said
    assert "storage that all nodes of the cluster share" in said
    assert not list(tmp_path.rglob("COMMITTED"))
