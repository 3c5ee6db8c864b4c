"""What is logged: a JSON line a request, with its id; never a prompt, a response, or what an exception says of them."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from reward_server.app import create_app
from reward_server.config import RewardSection
from reward_server.keys import make_key
from reward_server.logs import JsonFormatter, where
from reward_server.schema import Component, Item
from reward_server.scorers.base import Scored

SECRET = "hunter2"
TEXTS = {"prompt": f"p {SECRET}", "response": f"r {SECRET}"}


class Talks:
    """Raises with the text that it was to score, like a library that quotes its input; or answers too little."""

    revision = "1"

    async def score(self, items: Sequence[Item]) -> Sequence[Scored]:
        for item in items:
            if "raise" in (item.response or ""):
                raise ValueError(f"cannot read {item!r}")
            if "few" in (item.response or ""):
                return []
            if "slow" in (item.response or ""):
                await asyncio.sleep(1)
        return [Scored(Component(status="ok", value=1.0))] * len(items)


def requests_of(client: TestClient) -> list[tuple[int, Any]]:
    """Every way to be answered or refused, each with the secret wherever the request has a place for it."""

    def item(**fields: Any) -> dict[str, Any]:
        return {"items": [{"id": SECRET, **TEXTS, "facts": [SECRET], "messages": None, **fields}]}

    def post(path: str, body: Any, **headers: str) -> int:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return client.post(
            path, content=content, headers={k.replace("_", "-"): v for k, v in headers.items()}
        ).status_code

    rewards = "/v1/rewards"
    return [
        (200, post(rewards, item())),
        (200, post(rewards, item(response=f"raise {SECRET}"))),
        (200, post(rewards, item(response=f"few {SECRET}"))),
        (200, post(rewards, item(response=f"slow {SECRET}"))),
        (422, post(rewards, json.dumps(item()).encode()[:-9])),
        (422, post(rewards, item(response=[SECRET]))),
        (422, post(rewards, {**item(), "sources": [SECRET]})),
        (422, post(rewards, item(text=SECRET))),
        (413, post(rewards, item(response=SECRET * 100))),
        (413, post(rewards, {"items": item()["items"] * 9})),
        (413, post(rewards, item(response=SECRET * 1000))),
        (415, post(rewards, item(), Content_Type="text/plain")),
        (422, post(rewards, item(), Idempotency_Key="k" * 300)),
        (504, post(rewards, item(response=f"slow {SECRET}"), X_Request_Deadline_Ms="50")),
        (401, post(rewards, item(), Authorization=f"Bearer {SECRET}")),
        (401, post(f"/{SECRET}", item(), Authorization=f"Basic {SECRET}")),
        (404, post(f"/{SECRET}", item())),
        (404, post(f"/nowhere?{SECRET}={SECRET}", item())),
        (405, client.get(rewards, headers={"X-Request-Id": SECRET * 50}).status_code),
        (503, post("/openrlhf", {"query": [f"raise {SECRET}"], "prompts": [""], "labels": [SECRET]})),
        (422, post("/openrlhf", {"query": [SECRET], "prompts": [f"p {SECRET}"]})),
        (422, post("/slime", {"prompt": {SECRET: SECRET}, "response": SECRET})),
        (413, post("/score", {"text_1": SECRET, "text_2": SECRET * 100})),
        (422, post("/predict", {"inputs": [[SECRET, SECRET, SECRET]]})),
        (422, post("/verify", {"responses_create_params": {"input": SECRET}, "response": {"output": SECRET}})),
    ]


def test_what_was_sent_is_in_no_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.handler.setFormatter(logging.Formatter("%(name)s %(message)s %(fields)s", defaults={"fields": ""}))
    section = RewardSection(
        keys_file=tmp_path / "keys.jsonl", max_text_chars=200, max_items=8, max_bytes=4096, source_timeout_s=0.2
    )
    key = make_key(tmp_path / "keys.jsonl", "trainer")
    app = create_app(section, scorers={"attention": Talks()})
    with TestClient(app, headers={"Authorization": f"Bearer {key}"}, raise_server_exceptions=False) as client:
        for number, (expected, status) in enumerate(requests_of(client)):
            assert status == expected, number
    server = "\n".join(line for line in caplog.text.splitlines() if not line.startswith("httpx"))  # the client's own
    assert SECRET not in server
    assert key not in server
    assert "source attention failed: ValueError at " in server
    assert server.count("reward_server.access") == 25
    codes = [record.fields["code"] for record in caplog.records if "code" in getattr(record, "fields", {})]  # type: ignore[attr-defined]
    assert {"invalid_request", "too_large", "deadline_exceeded", "source_error"} <= set(codes)


def test_what_nobody_caught_is_a_500_without_its_words(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    from reward_server.service import ScoringService

    async def broken(*_: Any) -> None:
        raise RuntimeError(f"lost {SECRET}")

    monkeypatch.setattr(ScoringService, "score", broken)
    with TestClient(create_app(RewardSection())) as client:  # an exception that leaves the app fails the test
        answer = client.post("/v1/rewards", json={"items": [{"id": "a"}]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
        assert SECRET not in answer.text
        assert 'route="/v1/rewards",status="500"} 1.0' in client.get("/metrics").text
    assert SECRET not in caplog.text
    assert "/v1/rewards failed: RuntimeError at " in caplog.text


def test_lines_are_json_and_exceptions_lose_their_words() -> None:
    formatter = JsonFormatter()
    try:
        raise KeyError(SECRET)
    except KeyError as error:
        said = where(error)
        record = logging.LogRecord("x", logging.ERROR, __file__, 1, "it %s", ("failed",), sys.exc_info())
    line = json.loads(formatter.format(record))
    assert (line["level"], line["logger"], line["message"]) == ("error", "x", "it failed")
    assert line["exception"] == said
    assert line["time"].endswith("Z")
    assert SECRET not in json.dumps(line)
    assert said.startswith("KeyError at ")
    assert "test_logs.py" in said


def test_the_command_logs_json_and_drains_on_sigterm(tmp_path: Path) -> None:
    """A request under way at SIGTERM gets its answer; a new one finds nobody; every line of the log is JSON."""
    program = """
from reward_server.config import RewardSection
from reward_server.serve import run
run(RewardSection.model_validate({"sources": {"words": {"kind": "length", "unit": "words"}}}), port=0,
    say=lambda line: print(line, flush=True))
"""
    log = tmp_path / "log"
    environment = {**os.environ, "ATTUNE_REWARD_TOKEN": "t"}
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=errors, env=environment, text=True
        ) as process,
    ):
        assert process.stdout is not None
        url = process.stdout.readline().split()[3]
        asyncio.run(drain(url, process))
        assert process.wait(20) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (line,) = [line for line in lines if line["logger"] == "reward_server.access" and line["status"] == 200]
    assert (line["route"], line["items"], line["key"], line["request_id"]) == ("/v1/rewards", 1, "token", "the-last")
    assert SECRET not in log.read_text()


async def drain(url: str, process: subprocess.Popen[str]) -> None:
    """Sends half of a body, SIGTERM, and then the other half."""
    body = json.dumps({"items": [{"id": "a", "response": SECRET}]}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
    writer.write(
        b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer t\r\nX-Request-Id: the-last\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body[:5]
    )
    await writer.drain()
    await asyncio.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 10
    while True:
        try:
            httpx.get(f"{url}/livez", trust_env=False)
        except httpx.TransportError:
            break
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    writer.write(body[5:])
    assert b" 200 " in await asyncio.wait_for(reader.readline(), 10)
    writer.close()
