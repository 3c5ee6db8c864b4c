"""The OpenAPI document is pinned and true: requests made from it, right and wrong; and a thousand broken bodies."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import (
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from reward_server.app import create_app
from reward_server.config import RewardSection
from reward_server.schema import Component, Item
from reward_server.scorers.base import Scored

ROOT = Path(__file__).resolve().parents[2]
PINNED = ROOT / "docs" / "openapi" / "reward_server.json"
TOKEN = "correct horse"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


class Size:
    """Scores any item at all, so that whatever a format lets through is answered."""

    revision = "1"

    async def score(self, items: Sequence[Item]) -> Sequence[Scored]:
        return [
            Scored(Component(status="ok", value=float(len(item.response or item.text or "")), detail={"k": 1}))
            for item in items
        ]


app = create_app(RewardSection(), token=TOKEN, scorers={"attention": Size()})
schema = schemathesis.openapi.from_dict(json.loads(PINNED.read_text(encoding="utf-8")))
schema.app = app


def test_the_document_is_the_one_in_the_repository() -> None:
    """Where this fails, the contract has changed: look at what `make docs` changes, and say so to the clients."""
    check = [sys.executable, ROOT / "scripts" / "openapi.py", "--check"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@schema.exclude(path=["/get_reward", "/v1/score", "/v1/rerank", "/v2/rerank"]).parametrize()  # second names
@settings(
    max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
def test_the_document_is_true(case: Any) -> None:
    response = case.call(headers=HEADERS)
    if response.status_code == 504:  # a deadline of milliseconds was asked for, and kept
        assert int(case.headers["X-Request-Deadline-Ms"]) < 10_000
        return
    case.validate_response(
        response,
        checks=[
            not_a_server_error,
            status_code_conformance,
            content_type_conformance,
            response_headers_conformance,
            response_schema_conformance,
            negative_data_rejection,
            unsupported_method,
        ],
    )


BODIES: dict[str, dict[str, Any]] = {
    "/v1/rewards": {"items": [{"id": "a", "text": "pr"}]},
    "/openrlhf": {"query": ["pr", "ps"], "prompts": ["p", "p"], "labels": ["r", "s"]},
    "/slime": {"prompt": "p", "response": "r", "label": "r"},
    "/classify": {"model": "m", "input": ["pr"]},
    "/v1/embeddings": {"model": "m", "input": "pr"},
    "/score": {"text_1": "p", "text_2": ["r"]},
    "/rerank": {"query": "p", "documents": ["r"]},
    "/predict": {"inputs": [["p", "r"]]},
    "/verify": {
        "responses_create_params": {"input": [{"role": "user", "content": "p"}]},
        "response": {"output": [{"type": "message", "content": [{"type": "output_text", "text": "r"}]}]},
    },
}
NEEDED = {"items", "id", "query", "prompts", "prompt", "response", "input", "text_1", "text_2", "inputs", "output",
          "responses_create_params"}  # fmt: skip


def spoilt(draw: random.Random, body: dict[str, Any]) -> bytes:
    """A body that is no request any more, whatever the draw."""
    text = json.dumps(body).encode()
    way = draw.randrange(6)
    if way == 0:
        return text[: draw.randrange(len(text))]
    if way == 1:
        return text + draw.choice([b"}", b",", b"\x00", b"{}", b"\xff"])
    if way == 2:
        return draw.randbytes(draw.randrange(200))
    if way == 3:
        return b"[" * draw.randrange(1, 3000)
    places = [(holder, key) for holder, key in fields(body) if key in NEEDED]
    holder, key = draw.choice(places)
    if way == 4:
        del holder[key]
    else:
        holder[key] = draw.choice([None, True, 1.5, {"x": [1]}, [[["deep"]]], [None]])
    return json.dumps(body).encode()


def fields(value: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Every object of a value with each of its keys."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from fields(inner)
    if isinstance(value, dict):
        yield from ((value, key) for key in list(value))


def test_a_thousand_broken_bodies_are_each_told_what_is_wrong() -> None:
    draw = random.Random(11)
    with TestClient(app, headers=HEADERS, raise_server_exceptions=False) as client:
        for path, body in BODIES.items():
            assert client.post(path, json=body).status_code == 200, path
        for number in range(1000):
            path = draw.choice(list(BODIES))
            body = spoilt(draw, json.loads(json.dumps(BODIES[path])))
            answer = client.post(path, content=body)
            assert answer.status_code == 422, (number, path, body)
            told = answer.json()
            assert told["error"]["message"], (number, path, body)
            assert told["detail"][0]["path"], (number, path, body)
        assert client.get("/readyz").status_code == 200
        for path, body in BODIES.items():
            assert client.post(path, json=body).status_code == 200, path
