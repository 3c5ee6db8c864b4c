"""Losses of models that score against plain loops in float64, and gradients by central differences."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.reward_losses import (
    all_pairs,
    binary_cross_entropy,
    bradley_terry,
    plackett_luce,
    squared_error,
    squared_sum,
    weighted_mean,
)

Comparison = list[tuple[float, int]]
"""(score, rank) of each response."""

comparisons = st.lists(
    st.lists(st.tuples(st.floats(-6, 6), st.integers(0, 3)), min_size=2, max_size=5), min_size=1, max_size=4
)
probabilities = st.floats(0, 1)


def padded(rows: Sequence[Comparison]) -> tuple[Tensor, Tensor, Tensor]:
    """scores, ranks, present; what is not there is NaN and of rank 0, which nothing may read."""
    width = max(map(len, rows))
    scores = torch.full((len(rows), width), math.nan, dtype=torch.float64)
    ranks = torch.zeros(len(rows), width, dtype=torch.int64)
    present = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, items in enumerate(rows):
        for place, (score, rank) in enumerate(items):
            scores[row, place], ranks[row, place], present[row, place] = score, rank, True
    return scores, ranks, present


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def pair(better: float, worse: float, probability: float) -> float:
    return -probability * math.log(sigmoid(better - worse)) - (1 - probability) * math.log(sigmoid(worse - better))


def pairs(items: Comparison, probability: float) -> float:
    each = [pair(a, b, probability) for a, rank_a in items for b, rank_b in items if rank_a < rank_b]
    return sum(each) / len(each) if each else 0.0


def luce(items: Comparison) -> float:
    chances = [
        math.exp(score) / sum(math.exp(other) for other, other_rank in items if other_rank >= rank)
        for score, rank in items
    ]
    return -sum(map(math.log, chances))


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    loss(at).sum().backward()
    assert at.grad is not None
    return at.grad


def differences(loss: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    found = torch.zeros_like(at)
    for place in torch.nonzero(at.isfinite()):
        up, down = at.clone(), at.clone()
        up[tuple(place)] += step
        down[tuple(place)] -= step
        found[tuple(place)] = (loss(up) - loss(down)).sum() / (2 * step)
    return found


@given(comparisons, probabilities)
@settings(deadline=None, max_examples=40)
def test_all_pairs_is_the_mean_over_ordered_pairs(rows: list[Comparison], probability: float) -> None:
    scores, ranks, present = padded(rows)
    soft = torch.full((len(rows),), probability, dtype=torch.float64)
    expected = torch.tensor([pairs(row, probability) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(all_pairs(scores, ranks, present, soft), expected)
    found = gradient(lambda s: all_pairs(s, ranks, present, soft), scores)
    torch.testing.assert_close(
        found, differences(lambda s: all_pairs(s, ranks, present, soft), scores), atol=1e-7, rtol=1e-5
    )


@given(comparisons)
@settings(deadline=None, max_examples=40)
def test_plackett_luce_is_the_chance_of_the_order(rows: list[Comparison]) -> None:
    scores, ranks, present = padded(rows)
    expected = torch.tensor([luce(row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(plackett_luce(scores, ranks, present), expected)
    found = gradient(lambda s: plackett_luce(s, ranks, present), scores)
    torch.testing.assert_close(
        found, differences(lambda s: plackett_luce(s, ranks, present), scores), atol=1e-7, rtol=1e-5
    )


@given(st.floats(-8, 8), st.floats(-8, 8), st.floats(-5, 5))
def test_two_responses_are_one_bradley_terry_by_every_loss_and_a_shift_changes_none(
    better: float, worse: float, shift: float
) -> None:
    scores, ranks, present = padded([[(worse, 1), (better, 0)]])
    one = torch.ones(1, dtype=torch.float64)
    direct = bradley_terry(scores[:, 1], scores[:, 0], one)
    torch.testing.assert_close(direct, torch.tensor([pair(better, worse, 1.0)], dtype=torch.float64))
    for moved in (scores, scores + shift):
        torch.testing.assert_close(all_pairs(moved, ranks, present, one), direct)
        torch.testing.assert_close(plackett_luce(moved, ranks, present), direct)


@given(probabilities)
def test_a_soft_label_asks_for_its_own_logit(probability: float) -> None:
    at = min(max(probability, 1e-3), 1 - 1e-3)
    logit = torch.tensor([math.log(at / (1 - at))], dtype=torch.float64)
    soft = torch.tensor([at], dtype=torch.float64)
    for loss in (lambda s: bradley_terry(s, torch.zeros_like(s), soft), lambda s: binary_cross_entropy(s, soft)):
        assert abs(float(gradient(loss, logit)[0])) < 1e-12
    assert float(squared_error(logit, soft)[0]) < 1e-20


@given(st.floats(-9, 9), probabilities)
def test_ratings_against_their_definition(logit: float, target: float) -> None:
    logits, targets = torch.tensor([logit], dtype=torch.float64), torch.tensor([target], dtype=torch.float64)
    chance = sigmoid(logit)
    assert float(binary_cross_entropy(logits, targets)[0]) == pytest.approx(
        -target * math.log(chance) - (1 - target) * math.log(1 - chance), abs=1e-9
    )
    assert float(squared_error(logits, targets)[0]) == pytest.approx((chance - target) ** 2, abs=1e-12)


def test_the_centring_regulariser_adds_and_draws_the_sum_to_zero() -> None:
    scores, ranks, present = padded([[(2.0, 0), (1.0, 1)], [(3.0, 0), (-1.0, 1), (0.5, 2)]])
    one = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(squared_sum(scores, present), torch.tensor([9.0, 6.25], dtype=torch.float64))

    def loss(s: Tensor) -> Tensor:
        return all_pairs(s, ranks, present, one) + 0.1 * squared_sum(s, present)

    assert torch.all(loss(scores) > all_pairs(scores, ranks, present, one))
    moved = scores.nan_to_num()
    for _ in range(400):
        moved = moved - 0.2 * gradient(loss, moved)
    assert torch.all(torch.where(present, moved, 0.0).sum(1).abs() < 1e-3)
    assert moved[0, 0] > moved[0, 1]


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 3)), min_size=1, max_size=12), st.integers(1, 11))
def test_shards_add_up_to_the_weighted_mean(items: list[tuple[float, float]], cut: int) -> None:
    losses, weights = (torch.tensor(column, dtype=torch.float64) for column in zip(*items, strict=True))
    total = float(weights.sum())
    whole = weighted_mean(losses, weights, total)
    parts = sum(weighted_mean(losses[part], weights[part], total) for part in (slice(0, cut), slice(cut, None)))
    torch.testing.assert_close(whole, torch.as_tensor(parts, dtype=torch.float64))
    if total:
        expected = sum(loss * weight for loss, weight in items) / total
        assert float(whole) == pytest.approx(expected, abs=1e-9)


def test_what_has_no_weight_is_silent() -> None:
    losses = torch.tensor([1.0, math.nan], requires_grad=True)
    weighted_mean(losses, torch.tensor([2.0, 0.0]), 2.0).backward()
    assert losses.grad is not None
    assert losses.grad.tolist() == [1.0, 0.0]
