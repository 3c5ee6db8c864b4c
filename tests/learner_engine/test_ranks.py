"""The learner on real ranks: two against one, resumed against uninterrupted, and what leaves it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from learner.checkpoint import export_policy
from services.models import load_policy_model
from services.models_config import PolicySection
from services.weights import read_manifest, read_published
from tests.learner_engine.conftest import batch


def weights(result: Any) -> dict[str, Tensor]:
    return torch.load(result["weights"])


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("name", ["tied", "untied", "t5"])
def test_two_ranks_equal_one(name: str, one_rank: Any, two_ranks: Any) -> None:
    one, two = weights(one_rank[name]), weights(two_ranks[name])
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-5, msg=key)
    for ours, theirs in zip(two_ranks[name]["steps"], one_rank[name]["steps"], strict=True):
        assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-3, abs=1e-4)


def test_training_moves_every_part_of_the_model(model_dirs: dict[str, str], two_ranks: Any) -> None:
    before = dict(load_policy_model(PolicySection(model=model_dirs["tied"])).named_parameters())
    after = weights(two_ranks["tied"])
    still = [name for name, tensor in before.items() if torch.equal(tensor, after[f"lm.{name}"])]
    assert still == []


def test_a_run_repeats_bit_for_bit(two_ranks: Any) -> None:
    assert_equal(weights(two_ranks["again"]), weights(two_ranks["tied"]))
    assert two_ranks["again"]["steps"] == two_ranks["tied"]["steps"]


@pytest.mark.parametrize(
    ("resumed", "whole", "first"),
    [("resumed", "tied", 2), ("stateful_resumed", "stateful", 1), ("valued_resumed", "valued", 1)],
)
def test_a_resumed_run_goes_on_bit_for_bit(resumed: str, whole: str, first: int, two_ranks: Any) -> None:
    assert_equal(weights(two_ranks[resumed]), weights(two_ranks[whole]))
    assert two_ranks[resumed]["steps"] == two_ranks[whole]["steps"][first:]
    assert two_ranks[resumed]["info"]["updates_done"] > 0


def test_gathering_between_uses_or_not_is_the_same(two_ranks: Any) -> None:
    ours, theirs = weights(two_ranks["partitioned"]), weights(two_ranks["tied"])
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=0, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["tied", "untied", "t5"])
def test_unchanged_weights_have_ratio_one(name: str, two_ranks: Any) -> None:
    metrics = two_ranks[name]["steps"][0]["metrics"]
    assert metrics["policy/first_log_ratio_max"] < 1e-5
    assert metrics["kl/reference"] == pytest.approx(0, abs=1e-5)
    assert metrics["reward/failed"] == 1
    assert metrics["reward/ok"] == 11


@torch.no_grad()
def test_entropies_are_those_of_the_policy_where_the_first_epoch_met_it(
    model_dirs: dict[str, str], two_ranks: Any
) -> None:
    """Those of the first minibatch of the weights before the step, the others of weights that moved a little since."""
    model: Any = load_policy_model(PolicySection(model=model_dirs["tied"])).double().eval()
    said = two_ranks["tied"]["steps"][0]["samples"]
    apart: list[float] = []
    for sample in (s for group in batch(model_dirs["tied"], 0) for s in group.samples if s.sample_id in said):
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        logits = model(ids).logits[0, len(sample.prompt_ids) - 1 : -1]
        expected = torch.distributions.Categorical(logits=logits / 0.7).entropy()
        found = torch.tensor(said[sample.sample_id]["entropy_tokens"], dtype=torch.float64)
        assert found.shape == expected.shape
        apart.append(float((found - expected).abs().max()))
    assert len(apart) == 11
    assert sorted(apart)[2] < 1e-4
    assert max(apart) < 0.1
    assert two_ranks["tied"]["steps"][0]["metrics"]["policy/entropy"] == pytest.approx(math.log(64), abs=0.5)


def test_the_adaptive_coefficient_moves_and_is_resumed(two_ranks: Any) -> None:
    coefficients = [step["metrics"]["kl/coef"] for step in two_ranks["stateful"]["steps"]]
    assert len(set(coefficients)) == 3


@torch.no_grad()
def test_a_value_function_starts_from_a_reward_model_and_is_trained(model_dirs: dict[str, str], two_ranks: Any) -> None:
    loader: Any = AutoModelForSequenceClassification
    scorer = loader.from_pretrained(model_dirs["scorer"]).eval()
    known = two_ranks["valued"]["steps"][0]["samples"]
    prompts = {s.sample_id: s.prompt_ids for group in batch(model_dirs["tied"], 0) for s in group.samples}
    assert len(known) > 8
    for sample_id, figures in known.items():
        expected = float(scorer(input_ids=torch.tensor([prompts[sample_id]])).logits[0, 0])
        assert figures["value"] == pytest.approx(expected, abs=1e-5)
    after = weights(two_ranks["valued"])
    parts = dict(scorer.named_parameters())
    assert parts.pop("score.weight").shape == (1, 48)
    assert not torch.equal(after["value_head.score.weight"], scorer.score.weight)
    assert not [name for name, tensor in parts.items() if torch.equal(after[f"value_trunk.{name}"], tensor)]


@pytest.mark.parametrize("name", ["partitioned", "t5"])
def test_published_exported_and_checkpointed_weights_are_those_of_the_policy(
    name: str, two_ranks: Any, tmp_path: Path
) -> None:
    trained = weights(two_ranks[name])
    directory = Path(two_ranks[name]["weights"]).parent
    published = dict(read_published(directory / "published"))
    assert read_manifest(directory / "published").version == (1, 5)
    assert not any("value" in key for key in published)
    for key, tensor in published.items():
        assert torch.equal(tensor, trained[f"lm.{key}"])
    assert {f"lm.{key}" for key in published} == {key for key in trained if key.startswith("lm.")}
    if name == "partitioned":
        assert len(read_manifest(directory / "published").buckets) > 3
        assert (directory / "exported" / "model.safetensors.index.json").is_file()
    export_policy(directory / "saved", tmp_path / "from_checkpoint", bucket_bytes=8192)
    for exported in (directory / "exported", tmp_path / "from_checkpoint"):
        loaded = load_policy_model(PolicySection(model=str(exported)))
        for key, parameter in loaded.named_parameters():
            assert torch.equal(parameter, trained[f"lm.{key}"]), key


def test_a_gradient_that_is_not_finite_stops_and_names_the_step(two_ranks: Any) -> None:
    result = two_ranks["poisoned"]
    assert result["message"].startswith("step 7, epoch 0, minibatch 0:")
    assert_equal(torch.load(result["after"]), torch.load(result["before"]))


def test_a_bad_batch_that_is_skipped_leaves_no_trace(two_ranks: Any) -> None:
    """Neither in the weights nor in the optimiser: what follows is as if it had not been there, bit for bit."""
    result = two_ranks["skipped"]
    poisoned, flat, unknown, cut = result["bad"]
    assert poisoned["bad"].startswith("step 7, epoch 0, minibatch 0:")
    assert flat["bad"].startswith("step 8: the rewards of 100% of the prompts do not vary")
    assert flat["metrics"]["reward/flat_share"] == 1.0
    assert unknown["bad"].startswith("step 9: sample ")
    assert unknown["bad"].endswith("a recorded log-probability is not finite")
    assert cut["bad"].startswith("step 10: every response was cut at the token limit")
    assert cut["metrics"]["length/truncated_share"] == 1.0
    for step in result["bad"]:
        assert step["metrics"]["policy/skipped"] == 1.0
        assert all(math.isfinite(value) for value in step["metrics"].values())
    assert result["unmoved"]
    assert result["steps"] == two_ranks["tied"]["steps"]
    assert_equal(weights(result), weights(two_ranks["tied"]))


def test_a_figure_that_is_not_finite_is_left_out_of_a_step_that_was_trained(two_ranks: Any) -> None:
    result = two_ranks["figures"]
    assert (result["bad"], result["updates"], result["metrics"]["policy/skipped"]) == (None, 1, 0.0)
    assert all(math.isfinite(value) for value in result["metrics"].values())
    assert "policy/loss" in result["metrics"]
    assert not {"policy/ratio_mean", "policy/ratio_max"} & result["metrics"].keys()


def test_a_step_that_is_given_up_after_an_update_says_so_and_keeps_what_it_took(two_ranks: Any) -> None:
    result = two_ranks["partly"]
    assert result["bad"].startswith(f"step {result['step']}, epoch 0, minibatch 1: the gradient")
    assert result["bad"].endswith("; updates that it had made before and that stay: 1")
    assert (result["updates"], result["taken"]) == (1, 11)  # rewards of the batch, in the running standardisation


def test_a_resumed_run_trains_with_the_optimisers_settings_of_its_recipe(two_ranks: Any) -> None:
    """One step of four updates at 1e-3: weights that are decayed by a half a unit of it are a 500th smaller each."""
    decayed, plain = (two_ranks[name]["steps"][-1]["metrics"] for name in ("decayed", "resumed"))
    assert decayed["policy/updates"] < plain["policy/updates"]
    whole = torch.load(two_ranks["resumed"]["weights"])
    name = "lm.model.layers.0.mlp.up_proj.weight"
    assert weights(two_ranks["decayed"])[name].norm() < whole[name].norm() * 0.999


def test_fine_tuning_equals_a_plain_loop(two_ranks: Any, model_dirs: dict[str, str], sft_case: Any) -> None:
    """Clipping, schedule, accumulation and the sum over ranks, against torch alone with transformers' own logits."""
    from learner.microbatch import plan_epoch
    from learner.ppo import seed_of
    from learner.sft import epoch_order, updates_of
    from learner.sft_config import SftSection

    pairs, settings = sft_case
    model: Any = load_policy_model(PolicySection(model=model_dirs["untied"]))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    lengths = [(len(prompt), len(response)) for prompt, response in pairs]
    batches = math.ceil(len(pairs) / settings["batch_size"])
    updates = batches * settings["epochs"]
    warmup = round(settings["warmup_share"] * updates)
    losses: list[float] = []
    for update in range(updates):
        order = epoch_order(lengths, batches, seed_of(3, update // batches))
        plan = plan_epoch(
            lengths, world_size=1, minibatches=batches, token_budget=64, logit_chunk=512, seed=None
        )  # fmt: skip
        rows = [order[place] for place in plan[update % batches].rows]
        terms = []
        for row in rows:
            prompt, response = pairs[row]
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            terms.append(torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum"))
        loss = torch.stack(terms).sum() / sum(lengths[row][1] for row in rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["grad_clip"])
        rate = (update + 1) / (warmup + 1) if update < warmup else 1 - (update - warmup) / (updates - warmup)
        for group in optimizer.param_groups:
            group["lr"] = settings["lr"] * rate
        optimizer.step()
        losses.append(loss.item())
    tuned = dict(load_policy_model(PolicySection(model=two_ranks["sft"]["directory"])).named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(tuned[name], parameter, rtol=0, atol=2e-5, msg=name)
    assert two_ranks["sft"]["progress"] == updates_of(len(pairs), SftSection.model_validate(settings))
    reports = two_ranks["sft"]["reports"]
    assert [report["updates"] for report in reports] == [batches, updates]
    assert reports[1]["validation_loss"] < reports[0]["validation_loss"] < losses[0]
