"""The pipeline benchmark's figures, from lines of metrics that are known."""

from typing import Any

import pytest

from benchmarks.pipeline import FULL, QUICK, figures, recipe


def run(waits: list[float], train_s: float, between_s: float = 0.0, idle_rollouts: float = 0.5) -> list[dict[str, Any]]:
    """A run whose steps wait for `waits`, then train and publish (0.5 s); `between_s` passes between two steps."""
    rows: list[dict[str, Any]] = []
    now = 100.0
    for step, wait in enumerate(waits):
        wall = wait + train_s + 0.5
        now += between_s + wall
        rows.append(
            {
                "step": step,
                "time_s": now,
                "time/step_s": wall,
                "time/wait_batch_s": wait,
                "time/train_s": train_s,
                "time/publish_s": 0.5,
                "idle/learner": wait / wall,
                "idle/rollouts": idle_rollouts,
            }
        )
    return rows


def test_the_ratio_is_of_the_steady_steps() -> None:
    synchronous = [run([50.0, 9.0, 3.0, 3.0, 3.0, 70.0], 1.5)]
    ahead = [run([50.0, 9.0, 1.0, 1.0, 1.0, 0.0], 1.5, idle_rollouts=0.25)]
    found = figures({0: synchronous, 1: ahead})
    assert found["seconds_a_step_synchronous"] == pytest.approx(5.0)
    assert found["seconds_a_step_one_step_ahead"] == pytest.approx(3.0)
    assert found["one_step_ahead_speedup"] == pytest.approx(5 / 3)
    assert (found["generate_s"], found["train_s"]) == (3.0, 2.0)
    assert found["limit"] == pytest.approx(5 / 3)
    assert found["idle_share_learner_synchronous"] == pytest.approx(3 / 5)
    assert found["idle_share_learner"] == pytest.approx(1 / 3)
    assert found["idle_share_rollouts_synchronous"] == 0.5
    assert found["idle_share_rollouts"] == 0.25
    assert found["steps_counted"] == 3


def test_time_between_two_steps_counts_and_runs_of_a_mode_are_pooled() -> None:
    synchronous = [run([0.0] * 4 + [0.0], 1.0, between_s=0.5), run([0.0] * 6, 3.0, between_s=0.5)]
    found = figures({0: synchronous, 1: [run([0.0] * 5, 1.0)]})
    assert found["seconds_a_step_synchronous"] == pytest.approx(4.0)  # of 2, 2, 4, 4, 4
    assert found["steps_counted"] == 2


def test_a_run_too_short_to_count_is_no_measurement() -> None:
    with pytest.raises(ValueError, match="a run of 3 steps has none to count"):
        figures({0: [run([1.0] * 3, 1.0)], 1: [run([1.0] * 6, 1.0)]})


@pytest.mark.parametrize("size", [FULL, QUICK])
def test_both_modes_run_the_recipe_without_running_out_of_prompts(size: Any, tmp_path: Any) -> None:
    config = recipe(size, tmp_path, 1)
    assert size.steps * size.groups_per_step <= 0.8 * size.prompts * config.run.epochs
    assert set(size.runs) == {0, 1}
    assert config.checkpoint.every > size.steps
