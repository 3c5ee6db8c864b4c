"""Several sources as one number: ensembles, CRS, disagreement."""

import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from reward_server.combination import Ensemble, combine, deviation, reducer
from reward_server.config import EnsembleSection, RewardSection
from reward_server.schema import Component, ErrorCode, Result, failed_component
from reward_server.sources_config import SourceBase


def parts(**values: float | None) -> dict[str, Component]:
    missing = failed_component(ErrorCode.SOURCE_TIMEOUT, "late")
    return {name: missing if value is None else Component(status="ok", value=value) for name, value in values.items()}


def combined(components: dict[str, Component], reduce: Any = "mean", **more: Any) -> Result:
    """Of an ensemble `three` of a, b and c, and whatever stands beside it."""
    sources = {name: SourceBase(**more.get(name, {})) for name in components}
    section = EnsembleSection(of=("a", "b", "c"), reduce=reduce, **more.get("three", {}))
    ensembles = {"three": Ensemble(section.of, reducer(section.reduce, section.quantile), section)}
    return combine("x", components, sources, ensembles=ensembles, weights=more.get("weights"),
                   disagreement=more.get("disagreement"))  # fmt: skip


@pytest.mark.parametrize(("reduce", "expected"), [("mean", 3.0), ("min", 1.0), ("quantile", 1.5)])
def test_an_ensemble_counts_once_and_its_members_stand_beside_it(reduce: str, expected: float) -> None:
    result = combined(parts(a=6.0, b=1.0, c=2.0, d=10.0), reduce, three={"weight": 2.0})
    assert result.reward == 2 * expected + 10
    assert list(result.components) == ["a", "b", "c", "d", "three"]
    three = result.components["three"]
    assert three.value == expected
    assert three.detail == {"members": 3, "disagreement": pytest.approx(statistics.pstdev([6, 1, 2]))}


def test_members_are_shifted_by_their_own_constants_first() -> None:
    result = combined(parts(a=6.0, b=1.0, c=2.0), a={"scale": 0.5, "clip": (0.0, 2.0)}, b={"offset": 3.0})
    assert result.reward == pytest.approx((2 + 4 + 2) / 3)
    clipped = combined(parts(a=6.0, b=1.0, c=2.0), three={"clip": (0.0, 1.0), "offset": 5.0})
    assert clipped.reward == 1.0


def test_a_member_that_failed() -> None:
    required = combined(parts(a=6.0, b=None, c=2.0))
    assert (required.status, required.error and required.error.code) == ("failed", "source_timeout")
    optional = combined(parts(a=6.0, b=None, c=2.0), b={"required": False})
    assert (optional.reward, optional.flags) == (4.0, ("without:b",))
    assert optional.components["three"].detail["members"] == 2
    none = combined(parts(a=None, b=None, c=None), **{name: {"required": False} for name in "abc"})
    assert none.status == "failed"
    assert none.reward is None


def test_an_ensemble_of_what_was_asked_for() -> None:
    assert combined(parts(c=2.0, b=1.0)).reward == 1.5
    assert "three" not in combined(parts(d=2.0)).components


numbers = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9)


@given(numbers, st.floats(0, 1))
def test_the_quantile_is_numpys(values: list[float], quantile: float) -> None:
    assert reducer("quantile", quantile)(values) == pytest.approx(np.quantile(values, quantile), abs=1e-9)


@given(numbers)
def test_the_deviation_is_the_populations(values: list[float]) -> None:
    if len(values) == 1:
        assert deviation(values) is None
    else:
        assert deviation(values) == pytest.approx(np.std(values), abs=1e-9)


def test_disagreement_is_told_and_flagged() -> None:
    calm = combined(parts(d=1.0, e=2.0), disagreement=1.0)
    assert (calm.detail, calm.flags) == ({"disagreement": 0.5}, ())
    torn = combined(parts(d=1.0, e=9.0), disagreement=1.0)
    assert (torn.detail, torn.flags) == ({"disagreement": 4.0}, ("sources_disagree",))
    assert combined(parts(d=1.0)).detail == {}
    assert combined(parts(d=1.7e308, e=-1.7e308)).detail == {}


CRS: dict[str, Any] = {
    "sources": {
        "preference": {"kind": "length", "unit": "words", "target": 1, "penalty": 1},
        "absolute": {"kind": "exact_match"},
        "other": {"kind": "exact_match", "weight": 10},
    },
}
"""Two words: -1 of the first, 1 of the second where they match."""


@pytest.mark.parametrize(("weight", "expected"), [(0.5, -0.5 + 0.5), (0.75, -0.75 + 0.25), (0.0, 1.0), (1.0, -1.0)])
def test_crs_weights_add_up_to_one_and_raw_scores_are_averaged(serving: Any, weight: float, expected: float) -> None:
    client = serving(**CRS, crs={"weight": weight})
    items = [{"id": "a", "response": "a b", "reference": "a b"}]
    (result,) = client.post("/v1/rewards", json={"items": items}).json()["results"]
    assert result["reward"] == expected + 10
    assert [component["value"] for component in result["components"].values()] == [-1.0, 1.0, 1.0]
    assert result["detail"]["disagreement"] == pytest.approx(statistics.pstdev([-1, 1, 1]))
    assert "attune_reward_disagreement_count 1.0" in client.get("/metrics").text


def test_crs_of_ensembles(serving: Any) -> None:
    client = serving(
        sources={**CRS["sources"], "second": {"kind": "length", "unit": "characters", "target": 1, "penalty": 1}},
        ensembles={"both": {"of": ["preference", "second"], "reduce": "min"}},
        crs={"preference": "both", "absolute": "absolute", "weight": 0.25},
    )
    items = [{"id": "a", "response": "a b", "reference": "a b"}]
    (result,) = client.post("/v1/rewards", json={"items": items}).json()["results"]
    assert result["reward"] == 0.25 * -2 + 0.75 * 1 + 10
    assert result["components"]["both"]["value"] == -2


def test_what_is_combined_is_in_the_revision() -> None:
    def revision(**more: Any) -> str:
        return RewardSection.model_validate({**CRS, **more}).recipe_revision()

    plain = revision()
    assert len({plain, revision(crs={}), revision(crs={"weight": 0.6}),
                revision(ensembles={"x": {"of": ["absolute", "other"]}}),
                revision(ensembles={"x": {"of": ["absolute", "other"], "reduce": "min"}})}) == 5  # fmt: skip
    assert revision(disagreement=1.0) == plain


@pytest.mark.parametrize(("more", "named"), [
    ({"ensembles": {"x": {"of": ["absolute", "nothing"]}}}, "nothing is no source"),
    ({"ensembles": {"x": {"of": ["absolute"]}}}, "at least 2"),
    ({"ensembles": {"other": {"of": ["absolute", "preference"]}}}, "has that name"),
    ({"ensembles": {"x": {"of": ["absolute", "other"]}, "y": {"of": ["absolute", "preference"]}}}, "is in x already"),
    ({"crs": {"preference": "nobody"}}, "nobody is neither"),
    ({"crs": {}, "ensembles": {"x": {"of": ["absolute", "other"]}}}, "absolute is neither"),
    ({"crs": {"absolute": "preference"}}, "are two"),
])  # fmt: skip
def test_a_wrong_combination_is_refused(more: Any, named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        RewardSection.model_validate({**CRS, **more})
