"""Idle shares and rates from counters that parts keep: over time, over restarts, of parts that say nothing."""

import threading
import time

import pytest

from cluster.distributions import failure_metrics, histograms
from cluster.flow import Flow
from reward_server.busy import BusyTime
from services.records import Failure, Group, PolicyVersion, Prompt, Sample, Score

OK = Score(status="ok", value=0.25)
BAD = Score(status="failed", error=Failure(kind="data", code="empty_response", message="nothing was said"))


def test_counters_become_shares_and_rates_since_the_last_line() -> None:
    flow = Flow({"judge": 2})
    time.sleep(0.2)
    flow.begin()
    began = time.monotonic()
    time.sleep(0.1)
    metrics = flow.metrics(
        {
            "rollout": {
                "rollout-0": {"busy_s": 0.0, "tokens": 50.0, "prompt_tokens": 5.0, "load_s": 0.02, "capture_s": 0.01},
                "rollout-1": {"busy_s": 9.0, "tokens": 0.0, "prompt_tokens": 0.0, "load_s": 0.04, "capture_s": 0.0},
            },
            "scoring_worker": {"scoring-0": {"busy_s": 0.05, "groups_scored": 3.0}},
            "reward_server": {"reward-server": {"server": 0.0, "model/judge": 0.1, "model/other": 7.0}},
        }
    )
    window = time.monotonic() - began
    assert 0 <= metrics["idle/rollouts"] == 0.0  # more than all the time busy is no less than none idle
    assert metrics["throughput/generated_tokens_per_s"] == pytest.approx(50 / window, rel=0.2)
    assert metrics["throughput/read_tokens_per_s"] == pytest.approx(5 / window, rel=0.2)
    assert metrics["time/weight_load_s"] == pytest.approx(0.03)
    assert metrics["time/capture_s"] == pytest.approx(0.005)
    assert metrics["idle/scoring"] == pytest.approx(1 - 0.05 / window, abs=0.1)
    assert metrics["idle/reward_server"] == 1.0
    assert metrics["idle/models"] == pytest.approx(1 - 0.1 / (2 * window), abs=0.1)
    assert (metrics["actors/rollouts"], metrics["actors/scoring"]) == (2.0, 1.0)


def test_a_part_that_was_started_again_counts_from_nothing() -> None:
    flow = Flow({})
    flow.metrics({"rollout": {"rollout-0": {"load_s": 5.0}}})
    assert flow.metrics({"rollout": {"rollout-0": {"load_s": 5.5}}})["time/weight_load_s"] == pytest.approx(0.5)
    assert flow.metrics({"rollout": {"rollout-0": {"load_s": 0.25}}})["time/weight_load_s"] == 0.25
    assert flow.metrics({"rollout": {"rollout-1": {"load_s": 0.75}}})["time/weight_load_s"] == 0.75


def test_of_parts_that_do_not_answer_nothing_is_said() -> None:
    flow = Flow({"judge": 1})
    assert flow.metrics({}) == {}
    assert set(flow.metrics({"scoring_worker": {"scoring-0": {}}})) == {"idle/scoring", "actors/scoring"}


def test_busy_time_counts_once_and_work_as_often_as_there_is() -> None:
    busy = BusyTime()
    time.sleep(0.05)
    inside, leave = threading.Barrier(3), threading.Event()

    def work() -> None:
        with busy:
            inside.wait(10)
            leave.wait(10)

    threads = [threading.Thread(target=work) for _ in range(2)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    inside.wait(10)
    time.sleep(0.2)
    under_way = busy.busy_s()  # those under way count too
    leave.set()
    for thread in threads:
        thread.join()
    elapsed = time.monotonic() - began
    assert 0.2 <= under_way <= busy.busy_s() <= elapsed
    assert 1.5 * busy.busy_s() < busy.work_s() <= 2 * elapsed
    still = busy.busy_s()
    time.sleep(0.02)
    assert busy.busy_s() == still


def sample(k: int, reward: Score, versions: tuple[tuple[int, int, int], ...], **scores: Score) -> Sample:
    tokens = sum(count for _, _, count in versions)
    return Sample(
        sample_id=f"0:p:{k}", group_id="0:p", prompt_id="p", attempt=1, policy_versions=versions, prompt="p",
        prompt_ids=(1,), response="r", response_ids=(2,) * tokens, finish_reason="stop", logprobs=(-1.0,) * tokens,
        scores=scores, reward=reward, created_at=0.0,
    )  # fmt: skip


def group(*samples: Sample) -> Group:
    prompt = Prompt(prompt_id="p", source="test", text="x")
    return Group(
        group_id="0:p", attempt=1, epoch=0, order=0, version=PolicyVersion(1, 0), prompt=prompt, eos_ids=(2,),
        samples=samples,
    )  # fmt: skip


def test_a_step_is_counted_by_bucket_without_what_failed() -> None:
    high = Score(status="ok", value=7.0)
    groups = [
        group(
            sample(0, OK, ((1, 3, 2), (1, 4, 1)), attention=OK, length=BAD),
            sample(1, high, ((1, 4, 5),), attention=high, length=OK),
            sample(2, BAD, ((1, 1, 9),), attention=BAD),
        )
    ]
    found = histograms(groups, 4)
    assert set(found) == {
        "reward/histogram", "reward/attention/histogram", "reward/length/histogram", "length/histogram",
        "staleness/histogram",
    }  # fmt: skip
    rewards = found["reward/histogram"]
    assert (rewards.count, rewards.low, rewards.high) == (2, 0.25, 7.0)
    assert [rewards.bounds[i] for i, count in enumerate(rewards.counts) if count] == [0.3, 10.0]
    assert found["reward/length/histogram"].count == 1
    lengths = found["length/histogram"]
    assert [lengths.bounds[i] for i, count in enumerate(lengths.counts) if count] == [4.0, 8.0]
    staleness = found["staleness/histogram"]
    assert dict(zip(staleness.bounds, staleness.counts, strict=False))[0.0] == 6
    assert dict(zip(staleness.bounds, staleness.counts, strict=False))[1.0] == 2

    lost = {"0:q": Failure(kind="infra", code="owner_died", message="gone")}
    assert failure_metrics(groups, lost) == {
        "failures/groups/owner_died": 1.0,
        "failures/samples/empty_response": 1.0,
        "failures/scores/attention/empty_response": 1.0,
        "failures/scores/length/empty_response": 1.0,
    }


def test_a_step_without_a_sample_has_no_histograms() -> None:
    assert histograms([group(sample(0, BAD, ((1, 0, 1),)))], 0) == {}
