"""`POST /v1/rewards` against the contract: the specification's worked cases, answers, options, failures of items."""

import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from reward_server.schema import INFRA_CODES, AttentionOptionsBody, ErrorCode
from services.attention.failures import FAILURE_CODES
from services.attention.options import AttentionOptions

CASES = json.loads((Path(__file__).parent.parent / "attention" / "data" / "attention_reward_cases.json").read_text())[
    "cases"
]
TERMS = ("coverage", "focus", "spike", "repeat", "mass_mean", "peak_share", "entropy_q05", "rows_without_mass")


def rows_item(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": case["name"],
        "prompt": "p",
        "response": "r",
        "response_ids": case["response_ids"],
        "eos_ids": case["eos_ids"],
        "attention": {"rows": case["attention"], **{k: case[k] for k in ("content", "salient", "salient_weights")}},
        "attention_options": case["options"],
    }


def statistics_item(case: dict[str, Any]) -> dict[str, Any]:
    """The same case as statistics, computed here from the specification's definitions."""
    rows = np.array(case["attention"] or np.zeros((0, 99)), dtype=np.float64)
    content, salient = case["content"], case["salient"]
    weights = np.array(case["salient_weights"] or [1.0] * len(salient))
    inside = rows[:, content]
    logs = np.log(inside, where=inside > 0, out=np.zeros_like(inside))
    salient_mass = (rows[:, salient] * (weights / weights.mean() if salient else weights)).sum(1)
    return {
        **rows_item(case),
        "attention": {
            "mass": inside.sum(1).tolist(),
            "salient_mass": salient_mass.tolist(),
            "neg_entropy_sum": (inside * logs).sum(1).tolist(),
            "peak": inside.max(1, initial=0.0).tolist(),
            "salient_count": len(salient),
            "content_count": len(content),
        },
    }


def check(case: dict[str, Any], result: dict[str, Any]) -> None:
    expected = case["expected"]
    assert result["id"] == case["name"]
    assert result["status"] == expected["status"]
    if expected["status"] == "failed":
        assert result["reward"] is None
        assert (result["error"]["code"], result["error"]["kind"]) == (expected["error"], "data")
        assert result["components"]["attention"]["value"] is None
        return
    assert result["error"] is None
    assert result["reward"] == pytest.approx(expected["reward"], rel=1e-12, abs=1e-12)
    assert result["components"]["attention"]["value"] == result["reward"]
    detail = result["components"]["attention"]["detail"]
    assert set(detail) == set(TERMS)
    for term in TERMS:
        assert detail[term] == pytest.approx(expected[term], rel=1e-12, abs=1e-12), term
    assert result["flags"] == expected["flags"]


@pytest.mark.parametrize("form", [rows_item, statistics_item])
def test_worked_cases_of_the_specification(client: Any, form: Any) -> None:
    answer = client.post("/v1/rewards", json={"items": [form(case) for case in CASES], "sources": ["attention"]})
    assert answer.status_code == 200
    for case, result in zip(CASES, answer.json()["results"], strict=True):
        check(case, result)


def test_a_score_does_not_depend_on_company(client: Any) -> None:
    together = client.post("/v1/rewards", json={"items": [rows_item(case) for case in CASES]}).json()["results"]
    for case, result in zip(CASES, together, strict=True):
        alone = client.post("/v1/rewards", json={"items": [rows_item(case)]}).json()["results"]
        assert alone == [result]


def test_the_answer_says_who_scored(client: Any, item: dict[str, Any]) -> None:
    server = client.post("/v1/rewards", json={"items": [item]}).json()["server"]
    assert set(server) == {"version", "recipe_revision", "sources", "latency_ms"}
    assert set(server["sources"]) == {"attention"}
    assert server["sources"]["attention"]["revision"]
    assert server["latency_ms"] > 0


def test_no_items_no_results(client: Any) -> None:
    answer = client.post("/v1/rewards", json={"items": []})
    assert (answer.status_code, answer.json()["results"]) == (200, [])


def statistic(name: str, *value: Any) -> Any:
    return lambda item: item["attention"].update({name: [0.1, *value, 0.1]})


def rows(rows: list[list[Any]], content: list[int], salient: list[int], weights: Any = None) -> Any:
    attention = {"rows": rows, "content": content, "salient": salient, "salient_weights": weights}
    return lambda item: item.update(attention=attention)


R3 = [[0.1, 0.2], [0.1, 0.2], [0.1, 0.2]]
FAILING = [
    (statistic("mass", None), "non_finite_attention"),
    (statistic("salient_mass", "NaN"), "non_finite_attention"),
    (statistic("neg_entropy_sum", "-Infinity"), "non_finite_attention"),
    (statistic("peak", "inf"), "non_finite_attention"),
    (statistic("mass", float("nan")), "non_finite_attention"),
    (statistic("mass", float("inf")), "non_finite_attention"),
    (statistic("mass", 10**350), "non_finite_attention"),
    (statistic("mass", 0.1, 0.1), "length_mismatch"),
    (statistic("mass", -0.1), "negative_attention"),
    (lambda item: item.pop("attention"), "missing_attention"),
    (lambda item: item.update(attention=None), "missing_attention"),
    (lambda item: item.pop("response_ids"), "missing_response_ids"),
    (lambda item: item.update(response_ids=[]), "empty_response"),
    (lambda item: item.update(response_ids=[2]), "empty_response"),
    (lambda item: item["attention"].update(content_count=0, salient_count=0), "no_content_tokens"),
    (lambda item: item["attention"].update(salient_count=9), "salient_outside_content"),
    (lambda item: item["attention"].update(mass=[0, 0, 0]), "no_attention_mass"),
    (rows([[0.1, 0.2], [0.1], [0.1, 0.2]], [0], [0]), "ragged_rows"),
    (rows(R3, [0, 2], [0]), "index_out_of_range"),
    (rows(R3, [0, -1], [0]), "index_out_of_range"),
    (rows(R3, [0, 2**70], [0]), "index_out_of_range"),
    (rows(R3, [0, 0], [0]), "duplicate_position"),
    (rows(R3, [0], [1]), "salient_outside_content"),
    (rows(R3, [0, 1], [1], [1.0, 2.0]), "length_mismatch"),
    (rows(R3, [0, 1], [1], [None]), "invalid_weights"),
    (rows(R3, [], []), "no_content_tokens"),
    (rows([[], [], []], [0], [0]), "no_content_tokens"),
    (rows([*R3[:2], [None, 0.2]], [0, 1], [1]), "non_finite_attention"),
    (rows(R3[:2], [0, 1], [1]), "length_mismatch"),
]


@pytest.mark.parametrize(("spoil", "code"), FAILING)
def test_what_concerns_an_item_fails_that_item(client: Any, item: dict[str, Any], spoil: Any, code: str) -> None:
    good = json.loads(json.dumps(item))
    spoil(item)
    body = json.dumps({"items": [good, {**item, "id": "bad"}, good]})  # Python's encoder writes NaN and Infinity
    answer = client.post("/v1/rewards", content=body)
    assert answer.status_code == 200
    first, bad, last = answer.json()["results"]
    assert first["status"] == last["status"] == "ok"
    assert first == last
    assert (bad["status"], bad["reward"]) == ("failed", None)
    assert (bad["error"]["code"], bad["error"]["kind"]) == (code, "data")
    assert bad["error"]["message"]
    assert bad["components"]["attention"]["status"] == "failed"
    assert bad["components"]["attention"]["value"] is None


def test_flags_of_the_attention_come_back(client: Any, item: dict[str, Any]) -> None:
    item["attention"]["flags"] = ["no_salient_tokens"]
    (result,) = client.post("/v1/rewards", json={"items": [item]}).json()["results"]
    assert result["flags"] == ["no_salient_tokens"]


def test_options_count_only_where_the_recipe_allows_them(serving: Any, item: dict[str, Any]) -> None:
    attention = {"kind": "attention", "options": {"focus_weight": 0.0}}
    changed = {**item, "attention_options": {"coverage_weight": 3.0}}

    def rewards(**section: Any) -> tuple[list[float], list[str]]:
        results = serving(**section).post("/v1/rewards", json={"items": [item, changed]}).json()["results"]
        return [result["reward"] for result in results], results[1]["flags"]

    (plain, tripled), flags = rewards(sources={"attention": attention})
    assert tripled == pytest.approx(3 * plain)
    assert flags == []
    (plain, ignored), flags = rewards(sources={"attention": attention}, allow_options=False)
    assert ignored == plain
    assert flags == ["attention_options_ignored"]
    (_, ignored), flags = rewards(sources={"attention": attention, "length": {"kind": "length", "weight": 0}})
    assert ignored == plain
    assert flags == ["attention_options_ignored"]


def test_the_wire_is_in_step_with_the_services() -> None:
    assert [code.value for code in ErrorCode if code.value in FAILURE_CODES] == list(FAILURE_CODES)
    assert not INFRA_CODES & {ErrorCode(code) for code in FAILURE_CODES}
    assert set(AttentionOptionsBody.model_fields) == set(AttentionOptions.model_fields)
    for name, field in AttentionOptions.model_fields.items():
        body = AttentionOptionsBody.model_validate_json(json.dumps({name: field.default}))
        assert getattr(body, name) == field.default
        assert AttentionOptions.model_validate(body.model_dump(exclude_none=True)) == AttentionOptions()
        choices = [a for a in get_args(field.annotation) if isinstance(a, str)]
        for choice in choices:
            AttentionOptionsBody.model_validate({name: choice})
