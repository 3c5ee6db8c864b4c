"""Losses and their gradients against plain loops over tokens in float64, gradients by central differences."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.losses import (
    Aggregation,
    Normaliser,
    cross_entropy_loss,
    entropy_loss,
    explained_variance,
    normaliser_of,
    policy_gradient_loss,
    ppo_loss,
    token_weights,
    value_loss,
)

LENGTHS = [5, 1, 3, 4]
AGGREGATIONS: list[Aggregation] = ["token_mean", "sequence_mean", "sequence_sum"]


def mask_of(lengths: list[int]) -> Tensor:
    return torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]


def rand(seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(len(LENGTHS), max(LENGTHS), generator=generator, dtype=torch.float64)


def reduce(per_token: Callable[[int, int], float], lengths: list[int], aggregation: Aggregation) -> float:
    """The definition, written out."""
    sums = [[per_token(i, t) for t in range(length)] for i, length in enumerate(lengths)]
    if aggregation == "token_mean":
        return sum(x for row in sums for x in row) / sum(lengths)
    if aggregation == "sequence_mean":
        return sum(sum(row) / len(row) for row in sums) / len(lengths)
    return sum(sum(row) for row in sums) / len(lengths)


def differences(function: Callable[[Tensor], float], at: Tensor, step: float = 1e-6) -> Tensor:
    gradient = torch.zeros_like(at)
    for i in range(at.shape[0]):
        for t in range(at.shape[1]):
            up, down = at.clone(), at.clone()
            up[i, t] += step
            down[i, t] -= step
            gradient[i, t] = (function(up) - function(down)) / (2 * step)
    return gradient


def check(loss: Callable[[Tensor], Tensor], reference: Callable[[Tensor], float], at: Tensor) -> None:
    at = at.clone().requires_grad_()
    value = loss(at)
    assert value.item() == pytest.approx(reference(at.detach()), rel=1e-12, abs=1e-12)
    (gradient,) = torch.autograd.grad(value, at)
    torch.testing.assert_close(gradient, differences(reference, at.detach()), rtol=1e-6, atol=1e-8)


def weights_of(aggregation: Aggregation) -> Tensor:
    mask = mask_of(LENGTHS)
    return token_weights(mask.double(), aggregation, normaliser_of(mask))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_ppo_loss_and_gradient(aggregation: Aggregation) -> None:
    old, advantages = rand(1) - 2, rand(2)
    new = old + rand(3, 0.5)

    def reference(logprobs: Tensor) -> float:
        def token(i: int, t: int) -> float:
            ratio = math.exp(logprobs[i, t].item() - old[i, t].item())
            a = advantages[i, t].item()
            return -min(ratio * a, min(max(ratio, 0.8), 1.2) * a)

        return reduce(token, LENGTHS, aggregation)

    check(lambda x: ppo_loss(x, old, advantages, weights_of(aggregation), clip=0.2).loss, reference, new)


def test_ppo_with_a_negative_advantage_keeps_pushing_a_ratio_that_grew() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    up = torch.full((1, 1), math.log(3.0), dtype=torch.float64, requires_grad=True)
    worse = ppo_loss(up, 0 * one, -one, one, clip=0.2)
    assert worse.loss.item() == pytest.approx(3.0)
    assert torch.autograd.grad(worse.loss, up)[0].item() == pytest.approx(3.0)
    assert worse.clipped.item() == 0
    better = ppo_loss(up, 0 * one, one, one, clip=0.2)
    assert better.loss.item() == pytest.approx(-1.2)
    assert torch.autograd.grad(better.loss, up)[0].item() == 0
    assert better.clipped.item() == 1


def test_ppo_sums_for_the_metrics() -> None:
    old = rand(1)
    new = old + rand(3, 0.5)
    out = ppo_loss(new, old, rand(2), weights_of("token_mean"), clip=0.2)
    ratios = [math.exp(new[i, t] - old[i, t]) for i, length in enumerate(LENGTHS) for t in range(length)]
    assert out.tokens.item() == len(ratios)
    assert out.ratio.item() == pytest.approx(sum(ratios))
    assert out.ratio_max.item() == pytest.approx(max(ratios))
    assert out.approx_kl.item() == pytest.approx(sum(r - 1 - math.log(r) for r in ratios))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_policy_gradient_and_entropy_and_cross_entropy(aggregation: Aggregation) -> None:
    at, advantages = rand(5), rand(6)
    weights = weights_of(aggregation)

    def product(x: Tensor) -> float:
        return reduce(lambda i, t: -x[i, t].item() * advantages[i, t].item(), LENGTHS, aggregation)

    def negative(x: Tensor) -> float:
        return reduce(lambda i, t: -x[i, t].item(), LENGTHS, aggregation)

    check(lambda x: policy_gradient_loss(x, advantages, weights), product, at)
    check(lambda x: entropy_loss(x, weights), negative, at)
    check(lambda x: cross_entropy_loss(x, weights), negative, at)


@pytest.mark.parametrize("clip", [None, 0.3])
def test_value_loss_and_gradient(clip: float | None) -> None:
    values, old, returns = rand(7), rand(8), rand(9)

    def reference(x: Tensor) -> float:
        def token(i: int, t: int) -> float:
            v, o, g = x[i, t].item(), old[i, t].item(), returns[i, t].item()
            free = (v - g) ** 2
            if clip is None:
                return free / 2
            return max(free, (o + min(max(v - o, -clip), clip) - g) ** 2) / 2

        return reduce(token, LENGTHS, "token_mean")

    check(
        lambda x: value_loss(x, returns, weights_of("token_mean"), old_values=old, clip=clip),
        reference,
        values,
    )
    with pytest.raises(ValueError, match="old_values"):
        value_loss(values, returns, weights_of("token_mean"), clip=0.1)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_stands_under_padding_reaches_no_loss_and_no_gradient(poison: float) -> None:
    weights, padded = weights_of("token_mean"), ~mask_of(LENGTHS)
    clean = [rand(seed) for seed in range(4)]
    dirty = [x.masked_fill(padded, poison) for x in clean]
    losses = [
        lambda x, o, a: ppo_loss(x, o, a, weights, clip=0.2).loss,
        lambda x, _o, a: policy_gradient_loss(x, a, weights),
        lambda x, o, a: value_loss(x, a, weights, old_values=o, clip=0.2),
        lambda x, _o, _a: entropy_loss(x, weights),
    ]
    for loss in losses:
        results = []
        for x, o, a in (clean[:3], dirty[:3]):
            x = x.clone().requires_grad_()
            value = loss(x, o, a)
            results.append((value.detach(), torch.autograd.grad(value, x)[0]))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
        torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=7),
    cut=st.integers(0, 7),
    aggregation=st.sampled_from(AGGREGATIONS),
)
def test_losses_of_shards_add_up(lengths: list[int], cut: int, aggregation: Aggregation) -> None:
    mask = mask_of(lengths)
    whole = normaliser_of(mask)
    generator = torch.Generator().manual_seed(len(lengths))
    x, a = (torch.randn(mask.shape, generator=generator, dtype=torch.float64) for _ in range(2))

    def loss(rows: slice) -> float:
        weights = token_weights(mask[rows].double(), aggregation, whole)
        return ppo_loss(x[rows], 0 * x[rows], a[rows], weights, clip=0.2).loss.item()

    assert loss(slice(0, cut)) + loss(slice(cut, None)) == pytest.approx(loss(slice(None)), abs=1e-12)


def test_a_minibatch_without_loss_is_zero() -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert normaliser_of(mask) == Normaliser(0, 0)
    for aggregation in AGGREGATIONS:
        assert token_weights(mask, aggregation, normaliser_of(mask)).sum() == 0


def test_explained_variance() -> None:
    returns, mask = rand(1), mask_of(LENGTHS)
    assert explained_variance(returns, returns, mask) == pytest.approx(1.0)
    assert explained_variance(torch.zeros_like(returns), returns, mask) == pytest.approx(0.0)
    assert explained_variance(returns, torch.ones_like(returns), mask) == 0.0
