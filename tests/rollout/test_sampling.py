"""Tokens come from the distribution that is recorded, and the kept sets are the smallest that the settings allow."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.engine import Sampling
from rollout.sampling import check_sampling, draw, keep, sampling_rows, truncates
from services.errors import UserError

CPU = torch.device("cpu")


def test_greedy_takes_the_likeliest_and_records_temperature_one() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    rows = sampling_rows([Sampling(temperature=0), Sampling(temperature=0, top_p=0.1, top_k=1)], CPU)
    drawn = draw(logits, torch.tensor([0.99, 0.99], dtype=torch.float64), rows)
    assert drawn.tokens.tolist() == [1, 0]
    assert drawn.kept is None
    expected = torch.log_softmax(logits, -1)[[0, 1], [1, 0]]
    torch.testing.assert_close(drawn.logprobs, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0.7), Sampling(temperature=1.3, top_p=0.7), Sampling(top_k=3)]
)
def test_frequencies_are_the_recorded_probabilities(sampling: Sampling) -> None:
    torch.manual_seed(0)
    count = 40_000
    logits = torch.randn(1, 8).expand(count, 8)
    uniforms = torch.rand(count, dtype=torch.float64)
    drawn = draw(logits, uniforms, sampling_rows([sampling] * count, CPU))
    full = torch.softmax(logits[0] / sampling.temperature, -1)
    for token in range(8):
        mine = drawn.tokens == token
        frequency = float(mine.float().mean())
        probability = math.exp(float(drawn.sampling_logprobs[mine][0])) if mine.any() else 0.0
        assert frequency == pytest.approx(probability, abs=4 * math.sqrt(0.25 / count))
        if mine.any():
            assert math.exp(float(drawn.logprobs[mine][0])) == pytest.approx(float(full[token]), rel=1e-5)
    if drawn.kept is not None:
        assert set(drawn.tokens.tolist()) <= set(drawn.kept[0].nonzero().squeeze(-1).tolist())


@given(
    st.lists(st.floats(-20, 20), min_size=2, max_size=12),
    st.floats(0.01, 1.0),
    st.integers(0, 12),
)
@settings(deadline=None)
def test_kept_set_is_the_smallest_with_the_mass(values: list[float], top_p: float, top_k: int) -> None:
    probabilities = torch.softmax(torch.tensor([values], dtype=torch.float64), -1)
    limit = top_k or len(values)
    kept = keep(probabilities, torch.tensor([[limit]]), torch.tensor([[top_p]], dtype=torch.float64))[0]
    order = sorted(range(len(values)), key=lambda i: (-float(probabilities[0, i]), i))[:limit]
    mass = sum(float(probabilities[0, i]) for i in order)
    count = int(kept.sum())
    assert 1 <= count <= len(order)
    assert set(kept.nonzero().squeeze(-1).tolist()) == set(order[:count])
    held = sum(float(probabilities[0, i]) for i in order[:count])
    assert held >= top_p * mass - 1e-12
    if count > 1:
        assert held - float(probabilities[0, order[count - 1]]) < top_p * mass + 1e-12


def test_settings_of_one_row_do_not_reach_another() -> None:
    torch.manual_seed(1)
    logits = torch.randn(3, 20)
    uniforms = torch.rand(3, dtype=torch.float64)
    mixed = [Sampling(temperature=0), Sampling(temperature=0.8, top_p=0.5), Sampling()]
    together = draw(logits, uniforms, sampling_rows(mixed, CPU))
    assert together.kept is not None
    for i, sampling in enumerate(mixed):
        alone = draw(logits[i : i + 1], uniforms[i : i + 1], sampling_rows([sampling], CPU))
        assert alone.tokens[0] == together.tokens[i]
        assert alone.logprobs[0] == together.logprobs[i]
        assert alone.sampling_logprobs[0] == together.sampling_logprobs[i]
    assert together.sampling_logprobs[2] == together.logprobs[2]
    assert float(together.sampling_logprobs[1]) > float(together.logprobs[1])


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
    for uniform in (0.0, 0.5, float(np.nextafter(1.0, 0.0))):
        drawn = draw(logits, torch.tensor([uniform], dtype=torch.float64), sampling_rows([Sampling()], CPU))
        assert int(drawn.tokens[0]) in (1, 2)


@pytest.mark.parametrize(
    ("sampling", "names"),
    [
        (Sampling(temperature=-1), "temperature"),
        (Sampling(temperature=math.nan), "temperature"),
        (Sampling(top_p=0.0), "top_p"),
        (Sampling(top_p=1.1), "top_p"),
        (Sampling(top_k=-1), "top_k"),
        (Sampling(samples=0), "samples"),
        (Sampling(max_tokens=0), "max_tokens"),
    ],
)
def test_settings_out_of_bounds_are_named(sampling: Sampling, names: str) -> None:
    with pytest.raises(UserError, match=names):
        check_sampling(sampling)


def test_greedy_does_not_truncate() -> None:
    assert not truncates(Sampling(temperature=0, top_p=0.5))
    assert truncates(Sampling(top_k=5))
    assert not truncates(Sampling())
