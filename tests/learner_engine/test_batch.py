"""Groups to a batch: what is left out, which log-probabilities stand in the ratio, what is refused."""

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from learner.advantages import Advantages
from learner.bad_batch import check_batch
from learner.batch import batch_of
from learner.config import BadBatchSection
from learner.errors import BadBatch
from learner.metrics import length_metrics, reward_metrics, sample_figures, version_metrics
from services.records import Failure, Group, PolicyVersion, Prompt, Sample, Score

OK = Score(status="ok", value=1.0)
FAILED = Score(status="failed", error=Failure(kind="data", code="empty_response", message="none"))


def sample(k: int, **changes: Any) -> Sample:
    given: dict[str, Any] = {
        "sample_id": f"0:p:{k}",
        "group_id": "0:p",
        "prompt_id": "p",
        "attempt": 1,
        "policy_versions": ((1, 4, 2), (1, 5, 1)),
        "prompt": "",
        "prompt_ids": (1, 2),
        "response": "",
        "response_ids": (5, 6, 7),
        "finish_reason": "stop",
        "logprobs": (-1.0, -2.0, -3.0),
        "reward": OK,
        "created_at": 0.0,
    }
    return Sample(**{**given, **changes})


def group(*samples: Sample, name: str = "0:p") -> Group:
    return Group(
        group_id=name,
        attempt=1,
        epoch=0,
        order=0,
        version=PolicyVersion(1, 4),
        prompt=Prompt(prompt_id="p", source="test", text="x"),
        eos_ids=(2,),
        samples=samples,
    )


def test_failed_samples_are_left_out_and_counted() -> None:
    batch = batch_of(
        [group(sample(0), sample(1, reward=FAILED), sample(2, reward=None)), group(sample(0), name="0:q")], replay=False
    )
    assert len(batch.samples) == len(batch.rewards) == 2
    assert batch.groups.tolist() == [0, 1]
    assert batch.failed == 2
    assert reward_metrics(batch)["reward/failed"] == 2
    half = {"judge": FAILED, "length": OK}
    found = reward_metrics(
        batch_of([group(sample(0, scores=half), sample(1, scores={**half, "judge": OK}))], replay=False)
    )
    assert (found["reward/judge/failed"], found["reward/length/failed"]) == (1, 0)
    with pytest.raises(BadBatch, match="nothing to train on"):
        batch_of([group(sample(0, reward=FAILED))], replay=False)


def test_a_samples_figures_are_of_its_own_tokens_and_add_up() -> None:
    batch = batch_of([group(sample(0), sample(1, response_ids=(5,), logprobs=(-0.5,)))], replay=False)
    shape = batch.mask.shape
    reference = torch.full(shape, -1.5)
    whole = Advantages(torch.ones(shape) * batch.mask, torch.zeros(shape), batch.mask, batch.mask)
    entropy = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
    found = sample_figures(batch, whole, reference, None, entropy)
    assert [found[f"0:p:{k}"]["entropy_tokens"] for k in (0, 1)] == [[1.0, 2.0, 3.0], [4.0]]
    assert found["0:p:0"]["kl_tokens"] == [0.5, -0.5, -1.5]
    assert found["0:p:1"]["kl_tokens"] == [1.0], "no figure of what only pads"
    for figures in found.values():
        assert figures["kl_reference"] == pytest.approx(sum(figures["kl_tokens"]))
        assert figures["advantage"] == 1.0


def test_replay_takes_the_truncated_distribution_on_both_sides() -> None:
    kept = ((5, 8), (6,), (7, 1, 2))
    one = sample(0, sampling_logprobs=(-0.5, 0.0, -0.25), kept_ids=kept)
    replayed = batch_of([group(one)], replay=True)
    assert replayed.behaviour[0].tolist() == [-0.5, 0.0, -0.25]
    assert replayed.tokens[0].kept_ids == kept
    whole = batch_of([group(one)], replay=False)
    assert whole.behaviour[0].tolist() == [-1.0, -2.0, -3.0]
    assert whole.tokens[0].kept_ids is None


@pytest.mark.parametrize(("logprobs", "said"), [((-1.0, -2.0), "2 log-prob"), ((-1.0, math.nan, -1.0), "not finite")])
def test_log_probabilities_that_cannot_be_used_name_the_sample(logprobs: tuple[float, ...], said: str) -> None:
    with pytest.raises(BadBatch, match=said) as caught:
        batch_of([group(sample(0), sample(1, logprobs=logprobs))], replay=False)
    assert "0:p:1" in str(caught.value)


@pytest.mark.parametrize(("finish", "bad"), [(("length", "length"), True), (("length", "stop"), False)])
def test_a_batch_of_which_nothing_carries_a_loss_is_bad(finish: tuple[str, str], bad: bool) -> None:
    batch = batch_of([group(*(sample(k, finish_reason=why) for k, why in enumerate(finish)))], replay=False)
    section = BadBatchSection()
    check_batch(batch, 0.0, section, "bootstrap")
    with pytest.raises(BadBatch, match="cut at the token limit") if bad else nullcontext():
        check_batch(batch, 0.0, section, "mask")


def test_metrics_of_rewards_lengths_and_staleness() -> None:
    def scored(k: int, value: float, response: int) -> Sample:
        attention = Score(status="ok", value=value, detail={"coverage": value / 2, "focus": 0.0, "repeat": 1})
        return sample(
            k,
            response_ids=(5,) * response,
            logprobs=(-1.0,) * response,
            scores={"attention": attention, "length": FAILED},
            reward=Score(status="ok", value=value),
            finish_reason="length" if response == 5 else "stop",
        )

    batch = batch_of([group(scored(0, 1.0, 1), scored(1, 3.0, 5))], replay=False)
    rewards = reward_metrics(batch)
    assert rewards["reward/mean"] == rewards["reward/attention/mean"] == 2.0
    assert rewards["reward/within_prompt_std"] == rewards["reward/std"] == 1.0
    assert (rewards["reward/coverage"], rewards["reward/repeat"]) == (1.0, 1.0)
    assert "reward/length/mean" not in rewards
    lengths = length_metrics(batch)
    assert (lengths["length/mean"], lengths["length/response_tokens"], lengths["length/truncated_share"]) == (3, 6, 0.5)
    # Two of three tokens were drawn one step before this one.
    staleness = version_metrics(batch, 5)
    assert staleness["staleness/mean"] == pytest.approx(2 / 3)
    assert staleness["staleness/max"] == 1
