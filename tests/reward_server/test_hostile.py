"""Requests that are wrong, hostile or too many: each refusal is a 4xx that names the field, and the server goes on."""

import asyncio
import json
import random
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reward_server.app import create_app
from reward_server.config import RewardSection
from reward_server.schema import Component, Item
from reward_server.scorers.base import Scored


def put(item: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`item` with the value at a dotted path."""
    *inner, last = path.split(".")
    target = item
    for step in inner:
        target = target.setdefault(step, {})
    target[last] = value
    return item


WRONG = [
    ("id", 3, "items[0].id"),
    ("id", "x" * 1000, "items[0].id"),
    ("surprise", 1, "items[0].surprise"),
    ("prompt", ["p"], "items[0].prompt"),
    ("response_ids", [1, "2"], "items[0].response_ids[1]"),
    ("response_ids", [1, True], "items[0].response_ids[1]"),
    ("response_ids", [1, 2.5], "items[0].response_ids[1]"),
    ("response_ids", [1, -2], "items[0].response_ids[1]"),
    ("response_ids", [2**40], "items[0].response_ids[0]"),
    ("eos_ids", 2, "items[0].eos_ids"),
    ("attention", 5, "items[0].attention"),
    ("attention", [1], "items[0].attention"),
    ("attention.mass", [0.1, "x", 0.1], "items[0].attention.mass[1]"),
    ("attention.mass", [0.1, [0.1], 0.1], "items[0].attention.mass[1]"),
    ("attention.mass", [True], "items[0].attention.mass[0]"),
    ("attention.mass", None, "items[0].attention.mass"),
    ("attention.salient_count", -1, "items[0].attention.salient_count"),
    ("attention.rows", [[0.1]], "items[0].attention.content"),
    ("attention.surprise", 1, "items[0].attention.surprise"),
    ("attention_options", {"coverage_weight": float("nan")}, "items[0].attention_options.coverage_weight"),
    ("attention_options", {"coverage_weight": "1"}, "items[0].attention_options.coverage_weight"),
    ("attention_options", {"ngrams": [0]}, "items[0].attention_options.ngrams[0]"),
    ("attention_options", {"ngrams": [2, 2]}, "items[0].attention_options.ngrams"),
    ("attention_options", {"ngrams": []}, "items[0].attention_options.ngrams"),
    ("attention_options", {"mass": "rwa"}, "items[0].attention_options.mass"),
    ("attention_options", {"entropy_floor": -1}, "items[0].attention_options.entropy_floor"),
    ("attention_options", {"alpha": 1}, "items[0].attention_options.alpha"),
    ("messages", [{"role": "user", "content": "x"}], "items[0]"),
]


@pytest.mark.parametrize(("path", "value", "named"), WRONG)
def test_a_wrong_field_is_named(client: Any, item: dict[str, Any], path: str, value: Any, named: str) -> None:
    answer = client.post("/v1/rewards", content=json.dumps({"items": [put(item, path, value)]}))
    assert answer.status_code == 422
    body = answer.json()
    assert body["error"]["code"] == "invalid_request"
    assert named in [problem["path"] for problem in body["detail"]]
    assert body["detail"][0]["loc"][:2] == ["body", "items"]


def test_a_missing_field_is_named(client: Any, item: dict[str, Any]) -> None:
    del item["attention"]["peak"], item["id"]
    answer = client.post("/v1/rewards", json={"items": [item]})
    assert {problem["path"] for problem in answer.json()["detail"]} == {"items[0].id", "items[0].attention.peak"}
    assert client.post("/v1/rewards", json={}).json()["detail"][0]["path"] == "items"


@pytest.mark.parametrize(
    ("request_", "path"),
    [
        ({"items": [], "sources": ["attention", "nonsense"]}, "sources[1]"),
        ({"items": [], "sources": []}, "sources"),
        ({"items": [], "sources": "attention"}, "sources"),
        ({"items": {}}, "items"),
        ({"items": [], "url": "http://x"}, "url"),
        ([], "body"),
        (7, "body"),
        (None, "body"),
    ],
)
def test_a_wrong_request_is_named(client: Any, request_: Any, path: str) -> None:
    answer = client.post("/v1/rewards", json=request_)
    assert (answer.status_code, answer.json()["detail"][0]["path"]) == (422, path)


ZEROS = [0] * 1000
STATISTICS = {"mass": [], "salient_mass": [], "neg_entropy_sum": [], "peak": [], "salient_count": 1, "content_count": 1}
NUMBERS = {"response_ids": ["x"] * 1000, "eos_ids": ["x"] * 1000, "attention": {"rows": [], "content": ["x"] * 1000}}
OPENAI = {"responses_create_params": {"input": "x"}, "response": {"output": []}}


@pytest.mark.parametrize(
    ("route", "body", "named"),
    [
        ("/v1/rewards", {"items": ZEROS, "sources": ["attention", *ZEROS]}, ["items[0]", "sources[1]"]),
        ("/v1/rewards", {"items": [], "sources": ["x"] * 1000}, [f"sources[{i}]" for i in range(20)]),
        ("/v1/rewards", {"items": [{"id": "a", "messages": ZEROS, "facts": ZEROS, "principles": ZEROS}]},
         ["items[0].messages[0]", "items[0].facts[0]", "items[0].principles[0]"]),
        ("/v1/rewards", {"items": [{"id": "a", **NUMBERS}]},
         ["items[0].response_ids[0]", "items[0].eos_ids[0]", "items[0].attention.content[0]"]),
        ("/v1/rewards", {"items": [{"id": "a", "attention": {"rows": [[0.5], ["x"] * 1000], "content": []}}]},
         ["items[0].attention.rows[1][0]"]),
        ("/v1/rewards", {"items": [{"id": "a", "attention": {**STATISTICS, "peak": [0.5, *["x"] * 1000]}}]},
         ["items[0].attention.peak[1]"]),
        ("/openrlhf", {"query": ZEROS, "prompts": ZEROS}, ["query[0]", "prompts[0]"]),
        ("/slime", {"prompt": ZEROS, "response": "x"}, ["prompt[0]"]),
        ("/classify", {"input": ZEROS}, ["input[0]"]),
        ("/score", {"queries": "x", "documents": ZEROS}, ["documents[0]"]),
        ("/rerank", {"query": "x", "texts": ZEROS}, ["texts[0]"]),
        ("/predict", {"inputs": [["x"], *ZEROS]}, ["inputs[1]"]),
        ("/verify", {**OPENAI, "response": {"output": ZEROS}}, ["response.output[0]"]),
        ("/verify", {**OPENAI, "responses_create_params": {"input": [{"content": ZEROS}]}},
         ["responses_create_params.input[0].content[0]"]),
    ],
)  # fmt: skip
def test_only_the_first_wrong_entry_of_a_list_is_told(client: Any, route: str, body: Any, named: list[str]) -> None:
    answer = client.post(route, json=body)
    assert answer.status_code == 422
    assert [problem["path"] for problem in answer.json()["detail"]] == named


def test_so_many_unknown_fields_are_counted_and_not_named(client: Any, item: dict[str, Any]) -> None:
    few = client.post("/v1/rewards", json={"items": [], **{f"f{i}": 0 for i in range(30)}}).json()["detail"]
    assert [problem["path"] for problem in few] == [f"f{i}" for i in range(20)]
    many = {f"f{i}": 0 for i in range(20_000)}
    for body in ({"items": [], **many}, {"items": [{**item, **many}]}):
        answer = client.post("/v1/rewards", json=body)
        assert answer.status_code == 422
        (told,) = answer.json()["detail"]
        assert (told["path"], told["msg"]) == ("body", "20000 fields are wrong")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"\xff\xfe", b'{"items": ', b'{"items": []}x', b"not json", b'{"items": [{"id": "\\ud800"}]}',
        b"[" * 100_000, b'{"items":' + b"[" * 300 + b"]" * 300 + b"}", b'{"items": [' + b"9" * 5000 + b"]}",
        b'{"items": [{"id": "a", "response_ids": [1e999]}]}', b'{"a":' * 1000, b"\x00" * 64, b"NaN",
    ],
)  # fmt: skip
def test_what_is_no_json_is_422_and_the_server_goes_on(client: Any, item: dict[str, Any], body: bytes) -> None:
    answer = client.post("/v1/rewards", content=body)
    assert answer.status_code == 422
    assert answer.json()["detail"]
    assert client.post("/v1/rewards", json={"items": [item]}).json()["results"][0]["status"] == "ok"


def test_a_refusal_quotes_nothing_that_was_sent(client: Any, item: dict[str, Any]) -> None:
    item["response"] = {"secret": "hunter2"}
    assert "hunter2" not in client.post("/v1/rewards", json={"items": [item]}).text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
PATHS = sorted({path for path, _, _ in WRONG} | {"response", "reference", "facts", "attention.peak", "attention.flags"})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(PATHS), value=json_values)
def test_any_value_in_any_field_is_scored_failed_or_refused(client: Any, item: Any, path: str, value: Any) -> None:
    changed = put(json.loads(json.dumps(item)), path, value)
    try:
        body = json.dumps({"items": [changed]}).encode()
    except UnicodeEncodeError:
        return
    answer = client.post("/v1/rewards", content=body)
    assert answer.status_code in (200, 422)
    if answer.status_code == 200:
        (result,) = answer.json()["results"]
        assert (result["status"] == "ok") == (result["reward"] is not None) == (result["error"] is None)
    else:
        assert answer.json()["detail"][0]["path"].startswith("items")


def test_random_damage_to_a_body_is_never_a_5xx(client: Any, item: dict[str, Any]) -> None:
    body = json.dumps({"items": [item]}).encode()
    draw = random.Random(7)
    for _ in range(500):
        damaged = bytearray(body)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(damaged))
            damaged[at : at + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 3))
        assert client.post("/v1/rewards", content=bytes(damaged)).status_code in (200, 422)
    assert client.get("/readyz").status_code == 200


def test_caps_on_bytes_and_items(serving: Any, item: dict[str, Any]) -> None:
    small = serving(max_bytes=2048, max_items=2)
    assert small.post("/v1/rewards", json={"items": [item, item]}).status_code == 200
    answer = small.post("/v1/rewards", json={"items": [item] * 9})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    chunked = small.post("/v1/rewards", content=(b"x" * 512 for _ in range(9)))  # without a declared length
    assert chunked.status_code == 413
    many = serving(max_items=2).post("/v1/rewards", json={"items": [item] * 3})
    assert (many.status_code, many.json()["detail"][0]["path"]) == (413, "items")


@pytest.mark.parametrize("route", ["/v1/rewards", "/readyz", "/metrics", "/openapi.json", "/docs", "/nowhere"])
@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}, {"Authorization": "correct horse"},
     {"Authorization": "Basic correct horse"}, {"Authorization": b"Bearer \xff\xfe"}],
)  # fmt: skip
def test_every_route_but_livez_needs_the_token(route: str, headers: Any) -> None:
    client = TestClient(create_app(RewardSection(), token="correct horse"))
    for answer in (client.get(route, headers=headers), client.post(route, headers=headers, content=b"{")):
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "unauthorized"
    assert client.get("/livez").status_code == 200
    assert client.get("/metrics", headers={"Authorization": "bearer correct horse"}).status_code == 200


def test_no_route_and_no_method(client: Any) -> None:
    assert (client.get("/nowhere").status_code, client.get("/v1/rewards").status_code) == (404, 405)
    assert client.get("/nowhere").json()["error"]["code"] == "not_found"


class Waits:
    """A source that answers when it is let."""

    revision = "1"

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.seen = 0

    async def score(self, items: Sequence[Item]) -> Sequence[Scored]:
        self.seen += 1
        await self.go.wait()
        return [Scored(Component(status="ok", value=1.0))] * len(items)


def test_more_than_it_can_hold_is_429_and_none_is_lost(item: dict[str, Any]) -> None:
    asyncio.run(overload(item))


async def overload(item: dict[str, Any]) -> None:
    source = Waits()
    section = RewardSection(concurrency=2, max_requests=5, retry_after_s=3)
    app = create_app(section, scorers={"attention": source})
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        calls = [asyncio.create_task(client.post("/v1/rewards", json={"items": [item]})) for _ in range(20)]
        done, waiting = await asyncio.wait(calls, timeout=1)
        refused = [task.result() for task in done]
        assert [answer.status_code for answer in refused] == [429] * 15
        assert {answer.headers["retry-after"] for answer in refused} == {"3"}
        assert source.seen == 2
        source.go.set()
        assert [(await task).status_code for task in waiting] == [200] * 5
        assert "attune_reward_admitted_requests 0.0" in (await client.get("/metrics")).text


def test_a_turn_that_does_not_come_is_429(item: dict[str, Any]) -> None:
    asyncio.run(no_turn(item))


async def no_turn(item: dict[str, Any]) -> None:
    source = Waits()
    app = create_app(RewardSection(concurrency=1, queue_timeout_s=0.1), scorers={"attention": source})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        first = asyncio.create_task(client.post("/v1/rewards", json={"items": [item]}))
        await asyncio.sleep(0.05)
        assert (await client.post("/v1/rewards", json={"items": [item]})).status_code == 429
        source.go.set()
        assert (await first).status_code == 200
