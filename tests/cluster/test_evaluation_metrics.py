import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.evaluation_metrics import (
    bootstrap_mean,
    bootstrap_ratio,
    distinct,
    exact_match,
    paired_difference,
    perplexity,
    pooled_within_sd,
    repetition,
    rouge_l,
    token_f1,
)

VALUES = st.floats(-100, 100)
IDS = st.lists(st.integers(0, 5), max_size=20)


def test_exact_match_ignores_case_punctuation_and_articles():
    assert exact_match("The Paris.", "paris") == 1
    assert exact_match("Paris, France", "Paris") == 0
    assert exact_match("b a c", "c b") == 0


def test_token_f1_counts_words_as_often_as_both_have_them():
    assert token_f1("red red blue", "red green") == pytest.approx(2 * 1 / 5)
    assert token_f1("", "") == 1
    assert token_f1("", "red") == 0
    assert token_f1("the", "") == 1


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    # Longest common subsequence "capital of france is": 4 of 5 words on each side.
    assert rouge_l("capital of france is lyon", "capital of france is paris") == pytest.approx(0.8)
    assert rouge_l("", "paris") == 0


def test_repetition_is_the_share_of_ngrams_seen_before():
    assert repetition([1, 2, 3, 1, 2, 3], n=3) == pytest.approx(1 / 4)
    assert repetition([1, 1], n=3) == 0
    assert repetition([7] * 10, n=3) == pytest.approx(7 / 8)


def test_distinct_is_over_all_responses_together():
    assert distinct([[1, 2], [1, 3]], 1) == pytest.approx(3 / 4)
    assert distinct([[1, 2], [1, 2]], 2) == pytest.approx(1 / 2)
    assert distinct([[1]], 2) is None


def test_perplexity_weighs_tokens_alike():
    assert perplexity([2 * math.log(0.5), math.log(0.125)], [2, 1]) == pytest.approx(math.exp(5 * math.log(2) / 3))
    assert perplexity([], []) is None
    assert perplexity([-1e6], [1]) == math.inf


def test_pooled_within_sd_equals_the_textbook_formula():
    groups = [[1.0, 3.0], [10.0, 10.0, 13.0], [5.0]]
    expected = math.sqrt((np.var([1, 3]) * 2 + np.var([10, 10, 13]) * 3) / (1 + 2))
    assert pooled_within_sd(groups) == pytest.approx(expected)
    assert pooled_within_sd([[1.0], [2.0]]) is None


@given(
    st.lists(st.lists(VALUES, min_size=2, max_size=5), min_size=1, max_size=6), st.lists(VALUES, min_size=6, max_size=6)
)
def test_pooled_within_sd_does_not_see_differences_between_prompts(groups, shifts):
    moved = [[x + shift for x in group] for group, shift in zip(groups, shifts, strict=False)]
    assert pooled_within_sd(moved) == pytest.approx(pooled_within_sd(groups), abs=1e-9)


@given(st.lists(VALUES, min_size=1, max_size=30), st.integers(0, 10))
def test_bootstrap_is_a_function_of_its_seed_and_holds_the_mean_of_the_values(values, seed):
    first = bootstrap_mean(values, seed=seed, resamples=200)
    assert first == bootstrap_mean(values, seed=seed, resamples=200)
    assert first.value == pytest.approx(np.mean(values), abs=1e-9)
    assert min(values) - 1e-9 <= first.low <= first.high <= max(values) + 1e-9


def test_bootstrap_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        found = bootstrap_mean(rng.normal(1.0, 2.0, 50).tolist(), seed=trial, resamples=400, level=0.9)
        covered += found.low <= 1.0 <= found.high
    assert 0.83 < covered / 200 < 0.95


def test_bootstrap_ratio_divides_sums():
    found = bootstrap_ratio([2.0, 9.0], [1.0, 3.0], seed=0, resamples=200)
    assert found.value == pytest.approx(11 / 4)
    assert found.low >= 2
    assert found.high <= 3


@pytest.mark.parametrize(("top", "bottom"), [([], []), ([1.0], [0.0]), ([math.nan], [1.0]), ([1.0, 2.0], [1.0])])
def test_bootstrap_refuses_what_has_no_mean(top, bottom):
    with pytest.raises(ValueError, match="a bootstrap needs"):
        bootstrap_ratio(top, bottom, seed=0)


def test_paired_difference_is_narrower_than_the_prompts_spread():
    before = {str(i): float(i) for i in range(50)}
    after = {key: value + 1 + 0.01 * (index % 3) for index, (key, value) in enumerate(before.items())}
    found = paired_difference(before, {**after, "only here": 1e9}, seed=0)
    assert found is not None
    assert found.count == 50
    assert 1 < found.low < found.high < 1.03
    assert paired_difference({"a": 1.0}, {"b": 1.0}, seed=0) is None


@given(IDS)
def test_repetition_lies_between_0_and_1(ids):
    assert 0 <= repetition(ids) < 1
