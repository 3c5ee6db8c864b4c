"""Every loss of models that score, trained on two ranks: what the report says of the held-out examples is computed
again from what was written, by transformers' own forward and the definition of the loss.

The truth is that of conftest: w5 is good and w6 is bad.
"""

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from learner.reward_examples import Example, prepared
from learner.reward_model_config import RewardModelSection
from tests.learner_engine.conftest import SCORING, job_of, run_ranks, scoring_data

RATINGS = {2: 1.0, 1: 0.4, 0: 0.0}
"""Of a response with so many good words."""
JOBS: dict[str, dict[str, Any]] = {
    "plackett_luce": {"comparison_loss": "plackett_luce"},
    "soft": {"centring": 0.02},
    "bce": {"kind": "absolute", "rating_loss": "bce"},
    "mse": {"kind": "absolute", "rating_loss": "mse", "balance": True},
    "over": {"kind": "absolute", "sampling": "over"},
    "steps": {"kind": "process", "step_rule": {"by": "lines"}, "balance": True},
}


def data(name: str, count: int, seed: int) -> list[dict[str, Any]]:
    if name == "steps":
        return scoring_data("steps", count, seed)
    made = scoring_data("comparisons", count, seed)
    if name == "plackett_luce":
        return made
    if name == "soft":
        return [{**each, "inputs": each["inputs"][:2], "targets": [0, 1], "probability": 0.8} for each in made]
    # Uneven: of the bad ones every third only.
    rated = [(ids, ids[-2:].count(5)) for each in made for ids in each["inputs"]]
    kept = [(ids, good) for place, (ids, good) in enumerate(rated) if good or place % 3 == 0]
    return [{"inputs": [ids], "targets": [RATINGS[good]], "weights": [1.0]} for ids, good in kept]


@pytest.fixture(scope="module")
def runs(model_dirs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    jobs = {
        name: {
            **job_of(model_dirs["tied"], 0),
            "scenario": "reward_model",
            "reward_model": {**SCORING, **settings},
            "data": {"train": data(name, 160, 1), "pretrain": [], "held_out": data(name, 30, 3), "probes": []},
        }
        for name, settings in JOBS.items()
    }
    return run_ranks(jobs, 2, tmp_path_factory.mktemp("losses"))


@torch.no_grad()
def logits(directory: str, ids: list[int], *, steps: bool = False) -> Any:
    loader: Any = AutoModelForTokenClassification if steps else AutoModelForSequenceClassification
    return loader.from_pretrained(directory).eval()(input_ids=torch.tensor([ids])).logits[0]


def loss_of(name: str, directory: str, example: dict[str, Any]) -> list[float]:
    """By its definition, in plain numbers; of steps one each."""
    if name == "steps":
        rows = logits(directory, example["inputs"][0], steps=True).double().softmax(-1)
        return [
            -math.log(rows[end, int(target)])
            for end, target in zip(example["step_ends"], example["targets"], strict=True)
        ]
    scores = [float(logits(directory, ids)[0]) for ids in example["inputs"]]
    if name == "plackett_luce":
        left = [math.exp(score) for score in scores]
        return [-sum(math.log(left[i] / sum(left[i:])) for i in range(len(left)))]
    if name == "soft":
        p = 1 / (1 + math.exp(scores[1] - scores[0]))
        return [-(0.8 * math.log(p) + 0.2 * math.log(1 - p)) + 0.02 * sum(scores) ** 2]
    p, target = 1 / (1 + math.exp(-scores[0])), example["targets"][0]
    if name == "mse":
        return [(p - target) ** 2]
    return [-(target * math.log(p) + (1 - target) * math.log(1 - p))]


@pytest.mark.parametrize("name", list(JOBS))
def test_each_loss_is_learnt_on_ranks_and_reported_by_its_definition(runs: Any, name: str) -> None:
    result = runs[name]
    losses = [loss for example in data(name, 30, 3) for loss in loss_of(name, result["directory"], example)]
    assert sum(losses) / len(losses) == pytest.approx(result["report"]["loss"], abs=1e-5)
    lines = result["lines"]
    assert min(line["held_out"]["loss"] for line in lines) == result["report"]["loss"]
    if name in ("plackett_luce", "soft"):
        assert result["report"]["accuracy"] > 0.8
    else:
        assert result["report"]["rank_correlation"] > 0.6


@pytest.mark.parametrize("name", ["mse", "steps", "over"])
def test_uneven_labels_count_alike_in_what_was_trained_on(runs: Any, name: str) -> None:
    section = RewardModelSection.model_validate({**SCORING, **JOBS[name]})
    examples = [Example(**each) for each in data(name, 160, 1)]
    weighed: dict[float, float] = {}
    for example in prepared(examples, section, 0):
        for target, weight in zip(example.targets, example.weights, strict=True):
            weighed[target] = weighed.get(target, 0.0) + weight
    assert len(weighed) == (2 if name == "steps" else 3)
    assert all(a == pytest.approx(b) for a, b in combinations(weighed.values(), 2))
    assert runs[name]["report"]["updates"] > 0
