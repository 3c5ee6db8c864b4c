"""Held-out figures and sampling of uneven labels: against definitions, and properties that hold for any labels."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.reward_metrics import (
    binary_accuracy,
    calibration,
    error_by_range,
    pair_accuracy,
    probe_order,
    sigmoid,
    spearman,
)
from learner.reward_sampling import (
    aggregate,
    even_weights,
    over_sample,
    paraphrase_rating,
    stratum,
    under_sample,
)

unit = st.floats(0, 1)
strata_lists = st.lists(st.integers(0, 4), min_size=1, max_size=60)


def test_accuracy_of_pairs() -> None:
    assert pair_accuracy([[1.0, 0.0], [0.0, 1.0]], [[0, 1], [0, 1]]) == 0.5
    assert pair_accuracy([[0.0, 0.0]], [[0, 1]]) == 0.5
    # Two of three pairs in order; a tie in rank is no pair.
    assert pair_accuracy([[3.0, 1.0, 2.0]], [[0, 1, 2]]) == pytest.approx(2 / 3)
    assert pair_accuracy([[3.0, 9.0, 2.0]], [[0, 0, 1]]) == 1.0
    with pytest.raises(ValueError, match="different rank"):
        pair_accuracy([[1.0, 2.0]], [[1, 1]])


def test_accuracy_of_ratings() -> None:
    assert binary_accuracy([0.9, 0.4, 0.6, 0.1], [1.0, 0.0, 0.2, 0.5]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="one side"):
        binary_accuracy([0.2], [0.5])


def test_spearman_by_hand() -> None:
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    # Tied ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman([1, 1], [1, 2]) is None


@given(st.lists(st.floats(-50, 50), min_size=3, max_size=20, unique=True), st.floats(0.1, 3))
def test_spearman_sees_only_the_order(values: list[float], scale: float) -> None:
    other = [value * scale + 1 for value in values]
    if len(set(other)) == len(values):
        assert spearman(values, other) == pytest.approx(1)


@given(st.lists(unit, min_size=1, max_size=30))
def test_a_prediction_that_is_the_label_is_calibrated(labels: list[float]) -> None:
    error, bins = calibration(labels, labels)
    assert error == pytest.approx(0, abs=1e-12)
    assert sum(each.count for each in bins) == len(labels)
    assert all(each.error == 0 for each in error_by_range(labels, labels))


def test_calibration_is_the_gap_between_confidence_and_frequency() -> None:
    error, bins = calibration([0.95] * 4, [1, 1, 0, 0])
    assert error == pytest.approx(0.45)
    assert [(each.low, each.count, each.observed) for each in bins] == [(0.9, 4, 0.5)]


def test_errors_stand_where_the_labels_lie() -> None:
    bins = error_by_range([0.5, 0.5, 0.9], [0.0, 0.1, 1.0])
    assert [(each.low, each.count) for each in bins] == [(0.0, 2), (0.8, 1)]
    assert bins[0].error == pytest.approx(0.45)
    assert bins[1].error == pytest.approx(0.1)


def test_probes() -> None:
    shares = probe_order([[4, 3, 2, 1], [4, 3, 1, 2]])
    assert shares == {"best>bad": 1.0, "bad>irrelevant": 1.0, "irrelevant>meaningless": 0.5, "in_order": 0.5}
    with pytest.raises(ValueError, match="meaningless"):
        probe_order([[1, 2]])


@given(strata_lists, st.integers(0, 3))
def test_over_sampling_evens_out_and_loses_none(strata: list[int], seed: int) -> None:
    places = over_sample(strata, seed)
    assert set(places) == set(range(len(strata)))
    counts = Counter(strata[place] for place in places)
    assert len(set(counts.values())) == 1
    assert max(counts.values()) == max(Counter(strata).values())
    # No place is drawn much oftener than its neighbours.
    copies = Counter(places)
    for each in set(strata):
        own = [copies[place] for place, stratum in enumerate(strata) if stratum == each]
        assert max(own) - min(own) <= 1
    assert places == over_sample(strata, seed)


@given(strata_lists, st.floats(1, 4), st.integers(0, 3))
def test_under_sampling_is_bounded_and_invents_none(strata: list[int], ratio: float, seed: int) -> None:
    places = under_sample(strata, ratio, seed)
    assert len(set(places)) == len(places)
    before, after = Counter(strata), Counter(strata[place] for place in places)
    smallest = min(before.values())
    assert all(after[each] == min(before[each], math.floor(ratio * smallest)) for each in before)


@given(strata_lists)
def test_even_weights_weigh_every_stratum_alike(strata: list[int]) -> None:
    weights = even_weights(strata)
    assert sum(weights) == pytest.approx(len(strata))
    sums = Counter[int]()
    for each, weight in zip(strata, weights, strict=True):
        sums[each] += weight  # type: ignore[assignment]
    assert max(sums.values()) == pytest.approx(min(sums.values()))


def test_strata_cover_the_unit_interval() -> None:
    assert [stratum(label, 5) for label in (0.0, 0.19, 0.2, 0.99, 1.0)] == [0, 0, 1, 4, 4]
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        stratum(1.5, 5)


def test_labels_are_aggregated_by_weight() -> None:
    assert aggregate({"quality": 1.0, "toxicity": 1.0}, {"quality": 1.0, "toxicity": -1.0}) == 0.5
    assert aggregate({"quality": 0.8, "humour": 0.0}, {"quality": 2.0}) == pytest.approx(0.8)
    with pytest.raises(ValueError, match="humour"):
        aggregate({"humour": 1.0}, {"quality": 1.0})


@given(unit, st.floats(-1, 1), st.booleans(), unit)
def test_a_paraphrase_is_never_rated_above_its_original(
    rating: float, similarity: float, same: bool, factor: float
) -> None:
    found = paraphrase_rating(rating, similarity, same, factor)
    assert 0 <= found <= rating
    assert paraphrase_rating(rating, 1.0, True, factor) == rating


@given(st.floats(-800, 800))
def test_sigmoid_is_symmetric(x: float) -> None:
    assert sigmoid(x) + sigmoid(-x) == pytest.approx(1)
