"""Statistics -> reward: the specification's worked cases, its edge cases in their order, and properties."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.attention.failures import AttentionFailure
from services.attention.options import PRESETS, AttentionOptions
from services.attention.reward import repetition, score_rows, score_statistics
from services.attention.statistics import row_statistics

CASES = json.loads((Path(__file__).parent / "data" / "attention_reward_cases.json").read_text())["cases"]
TERMS = ("reward", "coverage", "focus", "spike", "repeat", "mass_mean", "peak_share", "entropy_q05")


def _score_both_ways(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The outcome by rows and by statistics, each a dictionary like the case's `expected`."""
    options = AttentionOptions(**case["options"])
    response, eos, content, salient = (case[k] for k in ("response_ids", "eos_ids", "content", "salient"))

    def by_statistics() -> Any:
        if case["attention"] and content:
            s = row_statistics(np.array(case["attention"], float), content, salient, case["salient_weights"])
            columns = [s.mass.tolist(), s.salient_mass.tolist(), s.neg_entropy_sum.tolist(), s.peak.tolist()]
        else:
            columns = [[0.0] * len(response)] * 4
        return score_statistics(*columns, len(salient), len(content), response, eos, options)

    def by_rows() -> Any:
        return score_rows(case["attention"], content, salient, case["salient_weights"], response, eos, options)

    outcomes: list[dict[str, Any]] = []
    for score in (by_rows, by_statistics):
        try:
            outcomes.append({"status": "ok", **asdict(score())})
        except AttentionFailure as failure:
            outcomes.append({"status": "failed", "error": failure.code})
    return outcomes


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_worked_case(case: dict[str, Any]) -> None:
    expected = case["expected"]
    for outcome in _score_both_ways(case):
        assert outcome["status"] == expected["status"]
        if expected["status"] == "failed":
            assert outcome["error"] == expected["error"]
            continue
        for term in TERMS:
            assert outcome[term] == pytest.approx(expected[term], rel=1e-12, abs=1e-12), term
        assert outcome["rows_without_mass"] == expected["rows_without_mass"]
        assert list(outcome["flags"]) == expected["flags"]


def _statistics(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "mass": [0.5, 0.4],
        "salient_mass": [0.2, 0.1],
        "neg_entropy_sum": [-0.6, -0.5],
        "peak": [0.3, 0.3],
        "salient_count": 1,
        "content_count": 3,
        "response_ids": [4, 5],
        "eos_ids": [2],
        "options": AttentionOptions(),
    }
    return base | changes


NAN = {"mass": [math.nan, 0.0]}
ZERO = {"mass": [0.0, 0.0]}
SHORT = {"peak": [0.1]}
NO_CONTENT = {"content_count": 0, "salient_count": 0}
EMPTY = {"response_ids": [2]}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        (EMPTY | NO_CONTENT | SHORT | NAN, "empty_response"),
        ({"response_ids": []} | NAN, "empty_response"),
        (NO_CONTENT | SHORT | NAN, "no_content_tokens"),
        (SHORT | NAN, "length_mismatch"),
        ({"salient_count": 4} | NAN, "salient_outside_content"),
        (NAN, "non_finite_attention"),
        ({"mass": [0.0, 0.0], "peak": [math.inf, 0.0]}, "non_finite_attention"),
        ({"salient_mass": [None, 0.1]}, "non_finite_attention"),
        ({"neg_entropy_sum": ["NaN", -0.5]}, "non_finite_attention"),
        ({"neg_entropy_sum": ["Infinity", -0.5]}, "non_finite_attention"),
        ({"mass": ["half", 0.5]}, "non_finite_attention"),
        ({"mass": [10**400, 0.5]}, "non_finite_attention"),
        ({"mass": [[0.1, 0.2], 0.5]}, "non_finite_attention"),
        ({"salient_mass": [1e308, 1e308], "options": AttentionOptions(coverage_weight=1e10)}, "non_finite_attention"),
        ({"mass": [-0.1, 0.5]}, "negative_attention"),
        (ZERO, "no_attention_mass"),
    ],
)
def test_failures_by_name_and_in_order(changes: dict[str, Any], code: str) -> None:
    with pytest.raises(AttentionFailure) as caught:
        score_statistics(**_statistics(**changes))
    assert caught.value.code == code


ROWS = [[0.2, 0.3, 0.5], [0.1, 0.1, 0.2]]


@pytest.mark.parametrize(
    ("rows", "content", "salient", "weights", "code"),
    [
        ([], [0], [], None, "length_mismatch"),
        ([[], []], [0], [], None, "no_content_tokens"),
        ([[0.2, 0.3], [0.1]], [0], [0], None, "ragged_rows"),
        (ROWS, [0, 3], [0], None, "index_out_of_range"),
        (ROWS, [0, -1], [0], None, "index_out_of_range"),
        (ROWS, [0, 0], [0], None, "duplicate_position"),
        (ROWS, [0, 1], [2], None, "salient_outside_content"),
        (ROWS, [0, 1], [1], [1.0, 2.0], "length_mismatch"),
        (ROWS, [0, 1], [1], [0.0], "invalid_weights"),
        (ROWS, [0, 1], [1], [-1.0], "invalid_weights"),
        (ROWS, [0, 1], [1], [math.nan], "invalid_weights"),
        ([[None, 0.1, 0.2], ROWS[1]], [0, 1], [1], None, "non_finite_attention"),
        ([["x", 0.1, 0.2], ROWS[1]], [0, 1], [1], None, "non_finite_attention"),
        ([[0, 0, 1], [0, 0, 1]], [0, 1], [1], None, "no_attention_mass"),
    ],
)
def test_rows_that_cannot_be_scored(rows: Any, content: Any, salient: Any, weights: Any, code: str) -> None:
    with pytest.raises(AttentionFailure) as caught:
        score_rows(rows, content, salient, weights, [4, 5], [2], AttentionOptions())
    assert caught.value.code == code


def test_a_value_outside_the_content_counts_for_nothing() -> None:
    clean = score_rows([[0.2, 0.3, 0.1]], [0, 1], [1], None, [4], [2], AttentionOptions())
    spoilt = score_rows([[0.2, 0.3, None]], [0, 1], [1], None, [4], [2], AttentionOptions())
    assert clean == spoilt


def test_weights_count_by_their_proportions_only() -> None:
    small = score_rows(ROWS, [0, 1, 2], [1, 2], [1.0, 3.0], [4, 5], [2], AttentionOptions())
    large = score_rows(ROWS, [0, 1, 2], [1, 2], [1e308, 1.7e308], [4, 5], [2], AttentionOptions())
    same = score_rows(ROWS, [0, 1, 2], [1, 2], [0.1, 0.3], [4, 5], [2], AttentionOptions())
    assert small.reward == pytest.approx(same.reward, rel=1e-12)
    assert math.isfinite(large.reward)


def test_only_one_trailing_end_token_is_left_out_of_repetition() -> None:
    options = AttentionOptions(ngrams=(1,), repeat_count="excess")
    assert repetition([4, 2, 2], [2], options) == 0
    assert repetition([4, 2, 2, 2], [2], options) == 1
    assert repetition([2, 4], [2], options) == 0


def test_presets_and_closed_options() -> None:
    assert PRESETS["paper"] == AttentionOptions()
    assert PRESETS["comparable"].repeat_count == "excess"
    for wrong in ({"ngrams": []}, {"ngrams": [2, 2]}, {"ngrams": [0]}, {"entropy_floor": -1}, {"gamma": 1}):
        with pytest.raises(ValueError, match=r"."):
            AttentionOptions.model_validate(wrong)
    with pytest.raises(ValueError, match="finite"):
        AttentionOptions(focus_weight=math.nan)


row_strategy = st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4)


@given(st.lists(row_strategy, min_size=1, max_size=6), st.permutations(range(4)))
def test_terms_are_bounded_and_blind_to_the_order_of_positions(rows: list[list[float]], order: list[int]) -> None:
    options = AttentionOptions(mass="renormalised", normalised=True, per_token=False)
    ids = list(range(10, 10 + len(rows)))
    if not any(sum(row[:3]) > 0 for row in rows):
        with pytest.raises(AttentionFailure, match="no row has attention"):
            score_rows(rows, [0, 1, 2], [1], None, ids, [2], options)
        return
    reward = score_rows(rows, [0, 1, 2], [1], None, ids, [2], options)
    assert -1e-9 <= reward.coverage <= 1 + 1e-9
    assert -1 - 1e-9 <= reward.focus <= 0
    assert 1 / 3 - 1e-9 <= reward.peak_share <= 1 + 1e-9
    moved = [[row[order[j]] for j in range(4)] for row in rows]
    where = {old: new for new, old in enumerate(order)}
    again = score_rows(moved, [where[0], where[1], where[2]], [where[1]], None, ids, [2], options)
    assert again.reward == pytest.approx(reward.reward, abs=1e-9)
