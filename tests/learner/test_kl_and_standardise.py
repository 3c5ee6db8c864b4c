import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.kl import KLController, k1, k3, kl_loss, kl_penalty, kl_per_sequence
from learner.standardise import RunningStandardiser

P = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
Q = torch.tensor([0.25, 0.25, 0.3, 0.2], dtype=torch.float64)


def test_both_estimators_have_the_divergence_as_their_mean() -> None:
    divergence = sum(p * math.log(p / q) for p, q in zip(P.tolist(), Q.tolist(), strict=True))
    assert (P * k1(P.log(), Q.log())).sum().item() == pytest.approx(divergence, abs=1e-14)
    assert (P * k3(P.log(), Q.log())).sum().item() == pytest.approx(divergence, abs=1e-14)
    assert (k3(P.log(), Q.log()) >= 0).all()


def test_kl_loss_and_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, ref, weights = (torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    weights = weights.abs()
    weights[1, 2] = 0
    ref[1, 2] = -math.inf
    logprobs.requires_grad_()
    loss = kl_loss(logprobs, ref, weights)
    expected, slope = 0.0, torch.zeros(2, 3, dtype=torch.float64)
    for i in range(2):
        for t in range(3):
            if weights[i, t] == 0:
                continue
            d = (logprobs[i, t] - ref[i, t]).item()
            expected += weights[i, t].item() * (math.exp(-d) - 1 + d)
            slope[i, t] = weights[i, t].item() * (1 - math.exp(-d))
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0], slope, rtol=1e-12, atol=1e-12)


def test_penalty_and_sum_a_response_ignore_padding_and_have_no_gradient() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, math.nan]], requires_grad=True)
    ref = torch.tensor([[-1.5, -1.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    penalty = kl_penalty(logprobs, ref, mask, 0.1)
    assert not penalty.requires_grad
    torch.testing.assert_close(penalty, torch.tensor([[0.05, -0.1, 0.0]]))
    assert kl_per_sequence(logprobs, ref, mask).item() == pytest.approx(-0.5)


def test_a_controller_goes_on_unless_the_recipe_says_otherwise() -> None:
    moved = KLController(0.1, "adaptive", 6.0, 100, start=0.1).update(60.0, 50)
    assert moved.coef == pytest.approx(0.11)
    assert moved.under(0.1, "adaptive", 6.0, 100) == moved
    assert moved.under(0.1, "adaptive", 3.0, 200) == KLController(moved.coef, "adaptive", 3.0, 200, start=0.1)
    assert moved.under(0.3, "adaptive", 6.0, 100) == KLController(0.3, "adaptive", 6.0, 100, start=0.3)
    assert moved.under(0.1, "fixed", 6.0, 100) == KLController(0.1, "fixed", 6.0, 100, start=0.1)
    fixed = KLController(0.05, start=0.05)
    assert fixed.under(0.3, "fixed", 6.0, 10_000).coef == 0.3
    assert fixed.under(0.05, "adaptive", 6.0, 100) == KLController(0.05, "adaptive", 6.0, 100, start=0.05)


def test_adaptive_controller() -> None:
    start = KLController(coef=0.2, kind="adaptive", target=6.0, horizon=1000)
    assert start.update(6.0, 64).coef == pytest.approx(0.2)
    assert start.update(60.0, 100).coef == pytest.approx(0.2 * (1 + 0.2 * 100 / 1000))
    assert start.update(-1.0, 100).coef == pytest.approx(0.2 * (1 - 0.2 * 100 / 1000))
    assert start.update(6.6, 100).coef == pytest.approx(0.2 * (1 + 0.1 * 100 / 1000))
    assert KLController(coef=0.2).update(60.0, 100).coef == 0.2
    moved = start.update(7.123, 64)
    assert KLController.from_json(moved.to_json()) == moved


batches = st.lists(st.lists(st.floats(-1e3, 1e3), max_size=8), min_size=1, max_size=6)


@given(batches)
def test_running_standardiser_equals_all_at_once(parts: list[list[float]]) -> None:
    state = RunningStandardiser()
    for part in parts:
        state = RunningStandardiser.from_json(state.update(part).to_json())
    everything = [x for part in parts for x in part]
    assert state.count == len(everything)
    if everything:
        assert state.mean == pytest.approx(statistics.fmean(everything), abs=1e-9)
        assert state.deviation == pytest.approx(statistics.pstdev(everything), abs=1e-6)


def test_standardised_values() -> None:
    state = RunningStandardiser().update([1.0, 3.0])
    assert state.apply([3.0, 1.0]) == pytest.approx([1.0, -1.0])
    assert RunningStandardiser().update([2.0, 2.0]).apply([2.0]) == [0.0]
    with pytest.raises(ValueError, match="finite"):
        state.update([math.nan])
    with pytest.raises(ValueError, match="nothing"):
        RunningStandardiser().apply([1.0])
