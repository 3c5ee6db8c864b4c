"""The engine benchmark's figures, from lines of metrics that are known."""

from typing import Any

import pytest

from benchmarks.engines import figures


def run(walls: list[float]) -> list[dict[str, Any]]:
    now = 50.0
    rows: list[dict[str, Any]] = []
    for wall in walls:
        now += wall
        rows.append(
            {
                "time_s": now,
                "time/wait_batch_s": wall / 4,
                "time/train_s": wall / 2,
                "time/publish_s": wall / 8,
                "length/mean": 10.0,
            }
        )
    return rows


def test_the_first_two_steps_are_not_counted() -> None:
    found = figures({"vllm": [run([90, 30, 2, 4]), run([90, 30, 3, 3])], "transformers": [run([90, 30, 6, 6])]})
    assert found["steps_per_minute_vllm"] == pytest.approx(20)
    assert found["steps_per_minute_transformers"] == pytest.approx(10)
    assert found["vllm_speedup"] == pytest.approx(2)
    assert found["wait_s_transformers"] == pytest.approx(1.5)
