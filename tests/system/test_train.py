"""A run from a recipe to a policy: the run directory's contract, exactly-once, both families, both modes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from learner.commit import latest_committed
from services.vocabulary import STEP

Attune = Callable[..., tuple[int, str]]
Recipe = Callable[..., Path]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def committed(run: Path) -> dict[str, Any]:
    latest = latest_committed(run)
    assert latest.commit is not None
    assert latest.problems == ()
    return latest.commit.manifest


def test_a_run_leaves_what_the_contract_says(attune: Attune, recipe: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    path = recipe(rollout={"keep_maps": 1}, evaluation={"every": 3, "prompts": 4, "samples": 2, "resamples": 100})
    code, output = attune("train", str(path), "learner.lr=2e-3", "--run-dir", str(run))
    assert code == 0, output

    # The resolved recipe: the override is in it, and so are the defaults.
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert config["learner"]["lr"] == 2e-3
    assert config["rollout"]["temperature"] == 1.0

    # One line a step, and every training prompt in exactly one committed step.
    metrics = rows(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(len(metrics)))
    manifest = committed(run)
    groups = [group for step in manifest["steps"].values() for group in step]
    assert len(groups) == len(set(groups)) == config_prompts(run, manifest)
    assert manifest["step"] == len(metrics)
    assert [len(step) for step in manifest["steps"].values()][:-1] == [4] * (len(metrics) - 1)

    # Every key has its entry in the vocabulary, and what it says of when a key is there holds.
    conditions = {"always", "always, not a number", "trained", "value function", "attention source", "drift watched",
                  "own reward server", "a source scored"}  # fmt: skip
    for row in metrics:
        assert not [key for key in row if STEP.find(key) is None]
        for metric in STEP.metrics:
            if metric.when in conditions:
                key = (metric.name or "").replace("{source}", "attention")
                assert key in row, (row["step"], key)
                assert isinstance(row[key], list) == (metric.kind == "histogram" or "not a number" in metric.when)
    assert {"time/commit_s", "time/evaluation_s"} <= {key for row in metrics for key in row}
    assert [sum(row["reward/histogram"]) for row in metrics] == [row["reward/ok"] for row in metrics]
    assert [sum(row["staleness/histogram"]) for row in metrics] == [row["length/response_tokens"] for row in metrics]
    assert all(0 <= row[f"idle/{part}"] <= 1 for row in metrics for part in ("learner", "rollouts", "scoring"))
    assert sum(row["time/capture_s"] for row in metrics) > 0
    assert sum(row["time/weight_load_s"] for row in metrics) > 0
    assert sum(row["throughput/generated_tokens_per_s"] for row in metrics) > 0

    # Nothing is stale in the synchronous mode, and the first update starts from the policy that drew the batch.
    assert {row["staleness/max"] for row in metrics} == {0.0}
    assert max(row["policy/first_log_ratio_max"] for row in metrics) < 1e-5

    # Every step says by which revision of the recipe it was scored: one, where nobody intervened.
    revisions = {tuple(row["reward/revisions"]) for row in metrics}
    assert len(revisions) == 1
    assert all(revisions.pop())

    # What the rollouts recorded is what the learner computes.
    assert max(row["drift/logprob_max"] for row in metrics) < 1e-5
    assert max(row["drift/attention_max"] for row in metrics) < 1e-5

    samples = [row for shard in sorted((run / "samples").glob("step_*.jsonl")) for row in rows(shard)]
    assert len(samples) == 2 * len(groups)
    assert {sample["group_id"] for sample in samples} == set(groups)
    for sample in samples:
        score = sample["scores"]["attention"]
        if score["status"] == "failed":  # an untrained policy may end a response at once: no number stands for that
            assert score["error"]["code"] == "empty_response"
            assert (sample["reward"]["status"], sample["reward"]["value"]) == ("failed", None)
        else:
            assert sample["reward"]["value"] == pytest.approx(score["value"])
        assert len(sample["attention"]["mass"]) == len(sample["response_ids"]) == len(sample["logprobs"])
        assert sum(span[2] for span in sample["policy_versions"]) == len(sample["response_ids"])
    mapped = [sample for sample in samples if sample["attention"]["map_ref"]]
    assert len(mapped) == len(groups)
    assert all((run / sample["attention"]["map_ref"]).exists() for sample in mapped)

    evaluated = [row for row in metrics if "evaluation/greedy/reward" in row]
    assert [row["step"] for row in evaluated] == [row["step"] for row in metrics if (row["step"] + 1) % 3 == 0]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name in ("policy", "policy-best"):
        loader: Any = AutoModelForCausalLM
        loader.from_pretrained(run / name)
        AutoTokenizer.from_pretrained(run / name)

    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["ended"] == "finished"
    assert summary["steps"] == summary["committed_steps"] == len(metrics)
    assert summary["ledger"]["committed"] == len(groups)
    assert json.loads((run / "salience.json").read_text(encoding="utf-8"))["n"] == len(groups)

    # The export of the last commit is the policy that the run left.
    exported = tmp_path / "exported"
    code, output = attune("export", str(run / "checkpoints" / f"step_{len(metrics)}"), str(exported))
    assert code == 0, output
    assert (exported / "model.safetensors").read_bytes() == (run / "policy" / "model.safetensors").read_bytes()


def config_prompts(run: Path, manifest: dict[str, Any]) -> int:
    """Training prompts of the run: what IDF was fitted to, less those that failed."""
    return int(json.loads((run / "salience.json").read_text(encoding="utf-8"))["n"]) - len(manifest["failed"])


def test_an_encoder_decoder_is_trained_on_two_sources(
    attune: Attune, recipe: Recipe, tmp_path: Path, tiny_encoder_decoder: Path
) -> None:
    run = tmp_path / "run"
    path = recipe(
        policy={"model": str(tiny_encoder_decoder)},
        salience={"content": "all"},
        run={"steps": 2},
        learner={"advantage": "gae", "kl": {"place": "reward", "coef": 0.1}},
        reward={
            "sources": {"attention": {"kind": "attention"}, "length": {"kind": "length", "target": 4, "weight": 0.5}}
        },
    )
    code, output = attune("train", str(path), "--run-dir", str(run))
    assert code == 0, output
    metrics = rows(run / "metrics.jsonl")
    assert len(metrics) == 2
    assert max(row["policy/first_log_ratio_max"] for row in metrics) < 1e-5
    assert max(row["drift/attention_max"] for row in metrics) < 1e-5
    scored = [row for row in rows(run / "samples" / "step_000000.jsonl") if row["reward"]["status"] == "ok"]
    assert scored
    for sample in scored:
        attention, length = (sample["scores"][name]["value"] for name in ("attention", "length"))
        assert sample["reward"]["value"] == pytest.approx(attention + 0.5 * length)


@pytest.mark.parametrize(("engine", "bound"), [("transformers", 1e-5), ("vllm", 1e-4)])
@pytest.mark.slow
def test_truncated_sampling_is_replayed(
    attune: Attune, recipe: Recipe, tmp_path: Path, engine: str, bound: float
) -> None:
    """Invariant 7: with top-p 0.9, top-k 20 and temperature 0.7 every ratio is 1 before the first update."""
    run = tmp_path / "run"
    path = recipe(
        run={"steps": 2},
        rollout={
            "engine": engine,
            "top_p": 0.9,
            "top_k": 20,
            "temperature": 0.7,
            "truncation": "replay",
            "samples": 3,
        },
        learner={"advantage": "grpo", "kl": {"place": "loss", "coef": 0.05}},
    )
    code, output = attune("train", str(path), "--run-dir", str(run))
    assert code == 0, output
    assert max(row["policy/first_log_ratio_max"] for row in rows(run / "metrics.jsonl")) < bound
    sample = rows(run / "samples" / "step_000000.jsonl")[0]
    assert len(sample["sampling_logprobs"]) == len(sample["logprobs"])
    assert all(len(kept) <= 20 for kept in sample["kept_ids"])


@pytest.mark.parametrize("staleness", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_vllm_generates(attune: Attune, recipe: Recipe, tmp_path: Path, staleness: int) -> None:
    """The same service with the other engine: every group once, fresh enough, captured, one distribution. Without
    staleness and with weights by collective: test_collective.py."""
    run = tmp_path / "run"
    path = recipe(
        run={"steps": 4, "max_staleness": staleness},
        rollout={"engine": "vllm", "samples": 4, "temperature": 0.8},
        learner={"advantage": "grpo", "kl": {"place": "loss", "coef": 0.05}},
    )
    code, output = attune("train", str(path), "--run-dir", str(run))
    assert code == 0, output
    metrics = rows(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    assert max(row["staleness/max"] for row in metrics) <= staleness
    if staleness == 0:
        assert max(row["policy/first_log_ratio_max"] for row in metrics) < 1e-4
        assert max(row["drift/attention_max"] for row in metrics) < 1e-5
    groups = [group for step in committed(run)["steps"].values() for group in step]
    assert len(groups) == len(set(groups)) == 16
    samples = [row for shard in sorted((run / "samples").glob("step_*.jsonl")) for row in rows(shard)]
    assert len(samples) == 4 * 16
    for sample in samples:
        assert len(sample["attention"]["mass"]) == len(sample["response_ids"]) == len(sample["logprobs"])
        assert sum(span[2] for span in sample["policy_versions"]) == len(sample["response_ids"])
    assert len({tuple(span[:2]) for sample in samples for span in sample["policy_versions"]}) >= 3


@pytest.mark.slow
def test_drift_past_its_limit_stops_the_run_and_explains(attune: Attune, recipe: Recipe, tmp_path: Path) -> None:
    path = recipe(run={"steps": 1}, learner={"drift": {"share": 1.0, "attention_limit": 1e-12}})
    code, output = attune("train", str(path), "--run-dir", str(tmp_path / "run"))
    assert code == 1, output
    assert "drift/attention_max" in output
    assert "learner.drift.attention_limit 1e-12" in output
    assert "Traceback" not in output
