"""Several kinds of reward in one run, each model an actor of its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.vocabulary import STEP

Attune = Callable[..., tuple[int, str]]
Recipe = Callable[..., Path]
SOURCES = ("attention", "preference", "absolute", "judge")


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_attention_models_and_a_judge_reward_one_run(
    attune: Attune, recipe: Recipe, tmp_path: Path, scoring_models: dict[str, Path]
) -> None:
    """The reward section of recipes/combined.yaml, with tiny models."""
    reward = yaml.safe_load(Path("recipes/combined.yaml").read_text(encoding="utf-8"))["reward"]
    assert tuple(reward["sources"]) == SOURCES
    reward["sources"]["preference"]["model"] = str(scoring_models["sequence"])
    reward["sources"]["absolute"]["model"] = str(scoring_models["other"])
    reward["sources"]["judge"] |= {"model": str(scoring_models["causal"]), "min_mass": 0.0}
    run = tmp_path / "run"
    path = recipe(run={"steps": 2}, reward=reward)
    code, output = attune("train", str(path), "--run-dir", str(run))
    assert code == 0, output
    metrics = rows(run / "metrics.jsonl")
    assert len(metrics) == 2
    samples = [sample for step in (0, 1) for sample in rows(run / "samples" / f"step_{step:06d}.jsonl")]
    scored = [sample for sample in samples if sample["reward"]["status"] == "ok"]
    assert scored
    weights = {name: reward["sources"][name].get("weight", 1.0) for name in SOURCES}
    crs = reward["crs"]
    weights |= {crs["preference"]: crs["weight"], crs["absolute"]: 1 - crs["weight"]}
    for sample in scored:
        values = {name: sample["scores"][name]["value"] for name in SOURCES}
        clip = reward["sources"]["judge"]["clip"]
        values["judge"] = min(max(values["judge"], clip[0]), clip[1])
        expected = sum(weights[name] * values[name] for name in SOURCES)
        assert sample["reward"]["value"] == pytest.approx(expected)
    for row in metrics:
        for name in SOURCES:
            assert f"reward/{name}/mean" in row, sorted(row)
            assert sum(row[f"reward/{name}/histogram"]) > 0
        assert not [key for key in row if STEP.find(key) is None]
    assert all(0 <= row[f"idle/{part}"] <= 1 for row in metrics for part in ("models", "reward_server"))
    assert min(row["idle/models"] for row in metrics) < 1  # they did run batches
