"""Advantages against plain loops over samples and tokens, in float64."""

import math

import pytest
import torch
from torch import Tensor

from learner.advantages import Estimator, Experience, Normalisation, estimate

LENGTHS = [4, 2, 1, 5, 3, 3]
GROUPS = [7, 7, 3, 3, 3, 7]
CUT = [False, True, False, True, False, False]
T = max(LENGTHS)


def batch(*, penalty: bool = True) -> Experience:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.arange(T)[None, :] < torch.tensor(LENGTHS)[:, None]
    poison = torch.where(mask, 0.0, float("nan")).double()  # padding may hold anything
    return Experience(
        scores=rand(6),
        mask=mask,
        groups=torch.tensor(GROUPS),
        truncated=torch.tensor(CUT),
        penalty=rand(6, T) * 0.1 + poison if penalty else None,
        values=rand(6, T) + poison,
        next_values=rand(6),
    )


def totals(e: Experience) -> list[float]:
    if e.penalty is None:
        return [r.item() for r in e.scores]
    return [e.scores[i].item() - sum(e.penalty[i, t].item() for t in range(n)) for i, n in enumerate(LENGTHS)]


def reference_single(e: Experience, estimator: Estimator) -> list[float]:
    r = totals(e)
    result = []
    for i in range(6):
        peers = [r[j] for j in range(6) if GROUPS[j] == GROUPS[i]]
        others = [r[j] for j in range(6) if GROUPS[j] == GROUPS[i] and j != i]
        mean = sum(peers) / len(peers)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in peers) / len(peers))
        v = 0.0 if e.values is None else e.values[i, 0].item()
        result.append(
            {
                "none": r[i],
                "batch_mean": r[i] - sum(r) / 6,
                "value": r[i] - v,
                "paper": r[i] - v,
                "rloo": r[i] - sum(others) / len(others),
                "grpo": (r[i] - mean) / (deviation + 1e-8),
            }[estimator]
        )
    return result


@pytest.mark.parametrize("penalty", [True, False])
@pytest.mark.parametrize("estimator", ["none", "batch_mean", "value", "paper", "rloo", "grpo"])
def test_one_advantage_for_all_tokens(estimator: Estimator, penalty: bool) -> None:
    e = batch(penalty=penalty)
    out = estimate(e, estimator)
    expected, r = reference_single(e, estimator), totals(e)
    for i, n in enumerate(LENGTHS):
        for t in range(T):
            assert out.advantages[i, t].item() == pytest.approx(expected[i] if t < n else 0.0, abs=1e-12)
            trained = estimator in ("paper", "value") and t == 0  # V(x) alone
            assert bool(out.value_mask[i, t]) == trained
            assert out.returns[i, t].item() == pytest.approx(r[i] if trained else 0.0, abs=1e-12)
    assert torch.equal(out.loss_mask, e.mask)


@pytest.mark.parametrize("penalty", [True, False])
@pytest.mark.parametrize("finish", ["bootstrap", "mask"])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_the_sum_of_discounted_deltas(gamma: float, lam: float, finish: str, penalty: bool) -> None:
    e = batch(penalty=penalty)
    assert e.values is not None
    assert e.next_values is not None
    out = estimate(e, "gae", gamma=gamma, lam=lam, finish_length=finish)  # type: ignore[arg-type]
    for i, n in enumerate(LENGTHS):
        v = [e.values[i, t].item() for t in range(n)]
        v.append(e.next_values[i].item() if CUT[i] and finish == "bootstrap" else 0.0)
        r = [0.0 if e.penalty is None else -e.penalty[i, t].item() for t in range(n)]
        r[-1] += e.scores[i].item()
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        lost = finish == "mask" and CUT[i]
        for t in range(T):
            a = sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) if t < n and not lost else 0.0
            assert out.advantages[i, t].item() == pytest.approx(a, abs=1e-12)
            assert out.returns[i, t].item() == pytest.approx(a + v[t] if t < n and not lost else 0.0, abs=1e-12)
            assert bool(out.loss_mask[i, t]) == (t < n and not lost)


def test_gae_of_lambda_one_is_the_return_less_the_value() -> None:
    e = batch(penalty=False)
    assert e.values is not None
    out = estimate(e, "gae", gamma=1.0, lam=1.0, finish_length="mask")
    assert out.advantages[0, 2].item() == pytest.approx((e.scores[0] - e.values[0, 2]).item())


@pytest.mark.parametrize("estimator", ["paper", "rloo", "grpo", "batch_mean"])
def test_mask_takes_the_loss_of_a_cut_response_but_leaves_its_score_in_the_baseline(estimator: Estimator) -> None:
    e = batch()
    whole, masked = estimate(e, estimator), estimate(e, estimator, finish_length="mask")
    for i, cut in enumerate(CUT):
        assert bool(masked.loss_mask[i].any()) != cut
        expected = torch.zeros(T, dtype=torch.float64) if cut else whole.advantages[i]
        assert torch.equal(masked.advantages[i], expected)
        if cut:
            assert not bool(masked.value_mask[i].any())


@pytest.mark.parametrize("normalise", ["batch", "group"])
@pytest.mark.parametrize("finish", ["bootstrap", "mask"])
def test_normalisation(normalise: Normalisation, finish: str) -> None:
    e = batch()
    plain = estimate(e, "gae", finish_length=finish)  # type: ignore[arg-type]
    out = estimate(e, "gae", finish_length=finish, normalise=normalise)  # type: ignore[arg-type]
    for i in range(6):
        members = [j for j in range(6) if normalise == "batch" or GROUPS[j] == GROUPS[i]]
        tokens = [plain.advantages[j, t].item() for j in members for t in range(T) if plain.loss_mask[j, t]]
        mean = sum(tokens) / len(tokens)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in tokens) / len(tokens))
        for t in range(T):
            a = (plain.advantages[i, t].item() - mean) / (deviation + 1e-8) if plain.loss_mask[i, t] else 0.0
            assert out.advantages[i, t].item() == pytest.approx(a, abs=1e-10)
    torch.testing.assert_close(out.returns, plain.returns)


def test_groups_of_one() -> None:
    e = Experience(
        scores=torch.tensor([2.0, 5.0]),
        mask=torch.ones(2, 2, dtype=torch.bool),
        groups=torch.tensor([0, 1]),
        truncated=torch.tensor([False, False]),
    )
    with pytest.raises(ValueError, match="two samples"):
        estimate(e, "rloo")
    assert not estimate(e, "grpo").advantages.any()


@pytest.mark.parametrize("estimator", ["paper", "value", "gae"])
def test_values_that_are_missing_are_named(estimator: Estimator) -> None:
    e = Experience(
        scores=torch.tensor([2.0]),
        mask=torch.ones(1, 2, dtype=torch.bool),
        groups=torch.tensor([0]),
        truncated=torch.tensor([True]),
    )
    with pytest.raises(ValueError, match="needs values"):
        estimate(e, estimator)


@pytest.mark.parametrize("reward", [0.1, 0.3, 0.7, 0.9, 1e-3, 123.4])
@pytest.mark.parametrize("sizes", [(8,), (3, 5), (7, 16, 2)])
@pytest.mark.parametrize("normalise", ["none", "group", "batch"])
def test_groups_whose_rewards_are_alike_teach_nothing_in_float32(
    reward: float, sizes: tuple[int, ...], normalise: Normalisation
) -> None:
    """In float32 the mean of eight times 0.3 is off by its last bit, which would be the deviation as well."""
    rows = sum(sizes)
    groups = torch.tensor([group for group, size in enumerate(sizes) for _ in range(size)])
    mask = torch.arange(7)[None, :] < (torch.arange(rows) % 7 + 1)[:, None]
    experience = Experience(torch.full((rows,), reward), mask, groups, torch.zeros(rows, dtype=torch.bool))
    for estimator in ("grpo", "rloo", "batch_mean"):
        found = estimate(experience, estimator, normalise=normalise).advantages
        assert found.dtype == torch.float32
        assert found.abs().max() < 1e-4
