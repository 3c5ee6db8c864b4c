"""The symbolic sources, the combination, revisions, readiness and metrics."""

import asyncio
import json
import math
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from reward_server.combination import combine
from reward_server.config import RewardSection
from reward_server.replicas import NoReplica, ReplicaLost
from reward_server.schema import Component, ErrorCode, Item, failed_component
from reward_server.scorers.base import FunctionScorer, Scored, ok
from reward_server.sources_config import AttentionSource, SourceBase
from services.attention.options import AttentionOptions
from services.errors import UserError


def result_of(client: Any, item: dict[str, Any], sources: Any = None) -> dict[str, Any]:
    answer = client.post("/v1/rewards", json={"items": [item], "sources": sources})
    assert answer.status_code == 200, answer.text
    (result,) = answer.json()["results"]
    return result


def value_of(serving: Any, source: dict[str, Any], **item: Any) -> float | str:
    """The value, or the failure's code."""
    result = result_of(serving(sources={"s": source}), {"id": "a", **item})
    return result["error"]["code"] if result["error"] else result["reward"]


@pytest.mark.parametrize(
    ("source", "item", "expected"),
    [
        ({}, {"response_ids": [1] * 64}, 0.0),
        ({}, {"response_ids": [1] * 96}, -0.5),
        ({"bonus": 2.0}, {"response_ids": [1] * 32}, 1.0),
        ({"bonus": 2.0}, {"response_ids": [1] * 64 + [2], "eos_ids": [2]}, 2.0),
        ({"unit": "words", "target": 2}, {"response": "a  b\nc d"}, -1.0),
        ({"unit": "characters", "target": 4, "bonus": 1, "penalty": 0}, {"response": "abc"}, 0.75),
        ({}, {"response": "a b"}, "missing_response_ids"),
        ({"unit": "words"}, {"response_ids": [1]}, "missing_response"),
        ({}, {"response_ids": [2], "eos_ids": [2]}, "empty_response"),
        ({"unit": "words"}, {"response": " \n"}, "empty_response"),
    ],
)
def test_length(serving: Any, source: Any, item: Any, expected: Any) -> None:
    assert value_of(serving, {"kind": "length", **source}, **item) == expected


@pytest.mark.parametrize(
    ("source", "item", "expected"),
    [
        ({}, {"response_ids": [4, 5, 4, 5, 4]}, -3 / 7),
        ({"repeat_count": "types", "rate": False}, {"response_ids": [4, 5, 4, 5, 4, 2], "eos_ids": [2]}, -3.0),
        ({"unit": "words", "ngrams": [1], "rate": False}, {"response": "The the cat, the"}, -2.0),
        ({}, {"response_ids": [4]}, 0.0),
        ({}, {"response": "x"}, "missing_response_ids"),
    ],
)
def test_repetition(serving: Any, source: Any, item: Any, expected: Any) -> None:
    assert value_of(serving, {"kind": "repetition", **source}, **item) == expected


@pytest.mark.parametrize(
    ("normalise", "response", "reference", "expected"),
    [
        ("words", "The answer is: Paris.", "the answer is Paris", 1.0),
        ("words", "-5", "5", 0.0),
        ("words", "3.14", "3 14", 0.0),
        ("words", ":)", ":(", 0.0),
        ("words", "Straße", "STRASSE", 1.0),
        ("whitespace", " a  b\n", "a b", 1.0),
        ("whitespace", "A b", "a b", 0.0),
        ("none", "a b ", "a b", 0.0),
        ("none", "a b", "a b", 1.0),
        ("words", "x", None, "missing_reference"),
        ("words", None, "x", "missing_response"),
        ("words", "", "x", "empty_response"),
    ],
)
def test_exact_match(serving: Any, normalise: str, response: Any, reference: Any, expected: Any) -> None:
    source = {"kind": "exact_match", "normalise": normalise}
    assert value_of(serving, source, response=response, reference=reference) == expected


@pytest.mark.parametrize(
    ("source", "response", "reference", "expected"),
    [
        ({}, "so it is 42.", "42", 1.0),
        ({}, "First 41, then 42", "the answer is 42.0", 1.0),
        ({"which": "first"}, "First 41, then 42", "42", 0.0),
        ({"which": "only"}, "First 41, then 42", "42", 0.0),
        ({}, "1,234.5 km", "1234.5", 1.0),
        ({}, "x = -3/4", "-0.75", 1.0),
        ({}, "−2e3", "-2000", 1.0),
        ({}, "7-5", "5", 1.0),
        ({}, "1/0", "1", 0.0),
        ({"absolute": 0.01}, "3.14", "3.1415", 1.0),
        ({"absolute": 0.001}, "3.14", "3.1415", 0.0),
        ({"absolute": 0, "relative": 0.1}, "-91", "-100", 1.0),
        ({"absolute": 0, "relative": 0.1}, "-89", "-100", 0.0),
        ({}, "no idea", "42", 0.0),
        ({}, "42", "no idea", "invalid_reference"),
        ({}, "42", None, "missing_reference"),
        ({}, " ", "42", "empty_response"),
    ],
)
def test_numeric_match(serving: Any, source: Any, response: Any, reference: Any, expected: Any) -> None:
    assert value_of(serving, {"kind": "numeric_match", **source}, response=response, reference=reference) == expected


@pytest.mark.parametrize(
    ("source", "response", "expected"),
    [
        ({"pattern": r"<b>.*</b>"}, "<b>x</b>", 1.0),
        ({"pattern": r"<b>.*</b>"}, "a <b>x</b>", 0.0),
        ({"pattern": r"<b>.*</b>", "match": "search"}, "a <b>x</b>", 1.0),
        ({"pattern": r"\p{Lu}\w*"}, "Élan", 1.0),
        ({"pattern": "x"}, None, "missing_response"),
    ],
)
def test_pattern(serving: Any, source: Any, response: Any, expected: Any) -> None:
    assert value_of(serving, {"kind": "pattern", **source}, response=response) == expected


def test_scoring_that_nobody_waits_for_ends_after_the_item_in_hand() -> None:
    begun: list[str] = []

    def slowly(item: Item) -> Scored:
        begun.append(item.id)
        time.sleep(0.1)
        return ok(1.0, {})

    async def leave() -> None:
        items = [Item(id=str(i), prompt="p", response="r") for i in range(50)]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(FunctionScorer("r", slowly).score(items), 0.25)
        in_hand = len(begun)
        await asyncio.sleep(0.5)
        assert in_hand <= len(begun) <= in_hand + 1  # the thread may have looked just before it was told

    asyncio.run(leave())
    assert 1 <= len(begun) < 50


def test_a_pattern_that_backtracks_fails_the_item_in_time(serving: Any) -> None:
    source = {"kind": "pattern", "pattern": r"(?:(a)|(a))*\d?[^a]$", "timeout_s": 0.2}
    client = serving(sources={"s": source})
    started = time.monotonic()
    result = result_of(client, {"id": "a", "response": "a" * 64})
    assert result["error"]["code"] == "pattern_timeout"
    assert time.monotonic() - started < 30  # unbounded, it takes longer than anybody waits
    assert result_of(client, {"id": "a", "response": "aab"})["reward"] == 1.0


@pytest.mark.parametrize(
    ("source", "prompt", "response", "expected"),
    [
        ({}, "Where is Rome?", "In Italy. 100 %!", 1.0),
        ({}, "Where is Rome?", "В Италии.", 0.0),
        ({"threshold": None}, "Where is Rome?", "abcd где?", 4 / 7),
        ({}, "ローマはどこの国ですか", "イタリアです。", 1.0),
        ({}, "罗马在哪里", "イタリアにあります", 0.0),
        ({}, "Explain the word 'Ω' in Greek", "Τελευταίο γράμμα", 0.0),
        ({}, "1 + 1 = ?", "two", "no_letters"),
        ({}, "How many?", "42", "no_letters"),
        ({}, None, "two", "missing_prompt"),
    ],
)
def test_language(serving: Any, source: Any, prompt: Any, response: Any, expected: Any) -> None:
    assert value_of(serving, {"kind": "language", **source}, prompt=prompt, response=response) == expected


def test_the_language_of_the_last_user_message_counts(serving: Any) -> None:
    messages = [{"role": "user", "content": "Где Рим?"}, {"role": "assistant", "content": "В Италии."},
                {"role": "user", "content": "And Oslo?"}]  # fmt: skip
    assert value_of(serving, {"kind": "language"}, messages=messages, response="In Norway") == 1.0


def test_a_pattern_that_is_none_is_refused_at_the_start(serving: Any) -> None:
    with pytest.raises(UserError, match="no regular expression"):
        serving(sources={"s": {"kind": "pattern", "pattern": "(a"}})


FOUR = {
    "attention": {"kind": "attention", "preset": "comparable"},
    "length": {"kind": "length", "target": 1, "weight": 0.5, "clip": [-1.0, 0.0]},
    "repetition": {"kind": "repetition", "required": False},
    "match": {"kind": "exact_match", "scale": 2.0, "offset": -1.0},
}


def test_the_sum_and_its_components(serving: Any, item: dict[str, Any]) -> None:
    client = serving(sources=FOUR)
    item["reference"] = "green"
    result = result_of(client, item)
    values = {name: component["value"] for name, component in result["components"].items()}
    assert list(values) == list(FOUR)
    assert (values["length"], values["match"]) == (-1.0, 0.0)
    assert result["reward"] == values["attention"] + 0.5 * -1.0 + values["repetition"] + (2.0 * 0.0 - 1.0)
    only = result_of(client, item, ["match", "length", "match"])
    assert list(only["components"]) == ["match", "length"]
    assert only["reward"] == -1.5


def test_required_and_optional_sources(serving: Any, item: dict[str, Any]) -> None:
    sources = {"length": {"kind": "length"}, "match": {"kind": "exact_match", "required": False}}
    del item["reference"]
    result = result_of(serving(sources=sources), item)
    assert (result["status"], result["reward"], result["flags"]) == ("ok", 0.0, ["without:match"])
    assert result["components"]["match"]["error"]["code"] == "missing_reference"
    sources["match"]["required"] = True
    result = result_of(serving(sources=sources), item)
    assert (result["status"], result["reward"], result["error"]["code"]) == ("failed", None, "missing_reference")
    assert result["components"]["length"]["status"] == "ok"


def test_only_optional_sources_and_none_scored() -> None:
    failed = failed_component(ErrorCode.SOURCE_TIMEOUT, "late")
    result = combine("a", {"x": failed}, {"x": SourceBase(required=False)})
    assert result.status == "failed"
    assert result.error is not None
    assert result.error.kind == "infra"


def test_a_sum_that_overflows_is_a_failure() -> None:
    huge = Component(status="ok", value=1e308)
    result = combine("a", {"x": huge, "y": huge}, {"x": SourceBase(), "y": SourceBase()})
    assert (result.reward, result.error and result.error.code) == (None, ErrorCode.NON_FINITE_SCORE)


finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(finite, finite, finite, finite, st.none() | st.tuples(finite, finite).map(lambda c: (min(c), max(c))))
def test_a_contribution_is_within_its_clip(value: float, weight: float, scale: float, offset: float, clip: Any) -> None:
    source = SourceBase(weight=weight, scale=scale, offset=offset, clip=clip)
    reward = combine("a", {"x": Component(status="ok", value=value)}, {"x": source}).reward
    assert reward is not None
    if clip is None:
        assert reward == weight * (scale * value + offset)
    else:
        low, high = sorted((weight * clip[0], weight * clip[1]))
        assert low <= reward <= high


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_no_number_stands_for_a_failure(value: Any) -> None:
    with pytest.raises(ValidationError):
        Component(status="ok", value=value)
    with pytest.raises(ValidationError):
        Component(status="failed", value=0.0, error=failed_component(ErrorCode.EMPTY_RESPONSE, "x").error)


def test_revisions_say_what_a_score_depends_on(serving: Any, item: dict[str, Any]) -> None:
    def server(**section: Any) -> Any:
        return serving(**section).post("/v1/rewards", json={"items": [item]}).json()["server"]

    plain = server()
    assert server(port=1, max_items=9)["recipe_revision"] == plain["recipe_revision"]
    heavier = server(sources={"attention": {"kind": "attention", "weight": 2.0}})
    assert heavier["recipe_revision"] != plain["recipe_revision"]
    assert heavier["sources"] == plain["sources"]
    other = server(sources={"attention": {"kind": "attention", "preset": "comparable"}})
    assert other["sources"] != plain["sources"]
    spelled = AttentionOptions(per_token=False, normalised=True, repeat_count="excess", rate=True).model_dump()
    assert server(sources={"attention": {"kind": "attention", "options": spelled}})["sources"] == other["sources"]


def test_options_lie_over_the_preset() -> None:
    source = AttentionSource(preset="comparable", options=AttentionOptions(rate=False))
    assert source.resolved() == AttentionOptions(per_token=False, normalised=True, repeat_count="excess", rate=False)


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"sources": {}}, "sources"),
        ({"sources": {"a": {"kind": "magic"}}}, "kind"),
        ({"sources": {"a": {"kind": "attention", "weight": float("nan")}}}, "weight"),
        ({"sources": {"a": {"kind": "attention", "clip": [1, 0]}}}, "clip"),
        ({"sources": {"No Name": {"kind": "attention"}}}, "sources"),
        ({"worker": {"min_idle_ms": 1000}}, "min_idle_ms"),
        ({"worker": {"url": "http://user:secret@host"}}, "url"),
        ({"worker": {"url": "scores:8077"}}, "url"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_wrong_recipe_is_refused(section: Any, named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        RewardSection.model_validate(section)


class Broken:
    revision = "1"

    def __init__(self, error: Exception | None = None, answers: int = 0) -> None:
        self.error, self.answers = error, answers

    async def score(self, items: Sequence[Item]) -> Sequence[Scored]:  # noqa: ARG002 - the interface's
        if self.error is not None:
            raise self.error
        if self.answers < 0:
            await asyncio.sleep(3600)
        return [Scored(Component(status="ok", value=0.0))] * self.answers


@pytest.mark.parametrize(
    ("scorer", "code"),
    [(Broken(RuntimeError("secret text")), "source_error"), (Broken(answers=3), "source_error"),
     (Broken(ReplicaLost("died")), "source_error"), (Broken(NoReplica("none lives")), "source_down"),
     (Broken(answers=-1), "source_timeout")],
)  # fmt: skip
def test_a_broken_source_fails_as_infra_and_readiness_says_so(
    serving: Any, item: dict[str, Any], scorer: Any, code: str
) -> None:
    client = serving(scorers={"attention": scorer}, source_timeout_s=0.05, ready_timeout_s=0.05)
    result = result_of(client, item)
    assert (result["reward"], result["error"]["code"], result["error"]["kind"]) == (None, code, "infra")
    assert "secret" not in json.dumps(result)
    ready = client.get("/readyz")
    assert ready.status_code == 503
    assert "attention" in ready.json()["error"]["message"]
    assert client.get("/livez").status_code == 200
    assert f'attune_reward_failures_total{{code="{code}",source="attention"}} 1.0' in client.get("/metrics").text


def test_readiness_scores_every_kind_of_source(serving: Any) -> None:
    kinds: dict[str, Any] = {
        kind: {"kind": kind}
        for kind in ("attention", "length", "repetition", "exact_match", "numeric_match", "language")
    }
    kinds["pattern"] = {"kind": "pattern", "pattern": ".*"}
    assert serving(sources=kinds).get("/readyz").json()["status"] == "ready"


def test_metrics_count_what_happened(client: Any, item: dict[str, Any]) -> None:
    client.post("/v1/rewards", json={"items": [item, {"id": "b"}]})
    client.post("/v1/rewards", content=b"{")
    client.get("/../etc/passwd")
    text = client.get("/metrics").text
    for line in (
        'attune_reward_requests_total{route="/v1/rewards",status="200"} 1.0',
        'attune_reward_requests_total{route="/v1/rewards",status="422"} 1.0',
        'attune_reward_requests_total{route="other",status="404"} 1.0',
        'attune_reward_items_total{status="ok"} 1.0',
        'attune_reward_items_total{status="failed"} 1.0',
        'attune_reward_failures_total{code="missing_response_ids",source="attention"} 1.0',
        'attune_reward_score_count{source="attention"} 1.0',
        "attune_reward_admitted_requests 0.0",
        "attune_reward_waiting_requests 0.0",
        "attune_reward_queue_seconds_count 1.0",
        'attune_reward_source_seconds_count{source="attention"} 1.0',
        'attune_reward_source_items_sum{source="attention"} 2.0',
        'attune_reward_source_calls{source="attention"} 0.0',
        'attune_reward_source_last_success_timestamp_seconds{source="attention"} 1.',
    ):
        assert line in text


def test_the_openapi_document_has_the_request_and_the_codes(client: Any) -> None:
    document = client.get("/openapi.json").json()
    post = document["paths"]["/v1/rewards"]["post"]
    assert post["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/RewardRequest")
    assert set(document["components"]["schemas"]["ErrorCode"]["enum"]) == {code.value for code in ErrorCode}
    assert post["security"] == [{"bearer": []}, {"basic": []}]
    assert "security" not in document["paths"]["/livez"]["get"]
    text = json.dumps(document)
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= set(document["components"]["schemas"])
    assert "#/$defs" not in text
