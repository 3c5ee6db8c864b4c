"""The launchers over a real socket, and the client against servers that answer 500, garbage, or never."""

import asyncio
import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from reward_server.client import RewardClient, RewardRefused, RewardUnavailable
from reward_server.config import RewardSection
from reward_server.schema import Component, Item
from reward_server.scorers.base import Scored
from reward_server.serve import RewardServer, bind
from services.errors import UserError

CONTRACT_CASES = "attention/data/attention_reward_cases.json"


def load_cases() -> list[dict[str, Any]]:
    from pathlib import Path

    return json.loads((Path(__file__).parent.parent / CONTRACT_CASES).read_text())["cases"]


def case_item(case: dict[str, Any]) -> Item:
    attention = {"rows": case["attention"], **{key: case[key] for key in ("content", "salient", "salient_weights")}}
    body = {
        "id": case["name"], "response_ids": case["response_ids"], "eos_ids": case["eos_ids"],
        "attention": attention, "attention_options": case["options"],
    }  # fmt: skip
    return Item.model_validate_json(json.dumps(body))


def test_worked_cases_over_a_socket() -> None:
    async def go() -> None:
        server = RewardServer(RewardSection(), token="t")
        url = await server.start()
        async with RewardClient(url, "t") as client:
            assert await client.ready()
            cases = load_cases()
            answer = await client.score([case_item(case) for case in cases])
            for case, result in zip(cases, answer.results, strict=True):
                assert result.status == case["expected"]["status"]
                if result.status == "ok":
                    assert result.reward == pytest.approx(case["expected"]["reward"], rel=1e-12, abs=1e-12)
                else:
                    assert result.error is not None
                    assert result.error.code.value == case["expected"]["error"]
            with pytest.raises(RewardRefused, match="unknown source; there are: attention") as refusal:
                await client.score([], ["nonsense"])
            assert refusal.value.status == 422
        async with RewardClient(url, "wrong") as client:
            assert not await client.ready()
            with pytest.raises(RewardRefused, match="401"):
                await client.score([])
        await server.stop()
        await server.stop()
        assert not server.alive()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/livez", trust_env=False)
        assert await server.start()  # once more, from the same object
        await server.stop()

    asyncio.run(go())


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} on 127.0.0.1 is in use"):
            asyncio.run(RewardServer(RewardSection(port=port), token="t").start())


def test_a_refusal_reaches_a_client_that_still_sends() -> None:
    async def go() -> None:
        server = RewardServer(RewardSection(max_bytes=2**16, max_requests=1), token="t")
        url = await server.start()
        big = [Item(id="a", response="x" * 8 * 2**20)]
        for token, status in (("t", 413), ("wrong", 401)):
            async with RewardClient(url, token, retries=0) as client:
                for _ in range(5):
                    with pytest.raises(RewardRefused) as refusal:
                        await client.score(big)
                    assert refusal.value.status == status
        await server.stop()

    asyncio.run(go())


def test_a_body_that_never_arrives_is_408_and_its_place_is_free_again() -> None:
    async def go() -> None:
        server = RewardServer(RewardSection(body_timeout_s=0.2, max_requests=1), token="t")
        url = await server.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        writer.write(b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer t\r\nContent-Length: 10\r\n\r\n{")
        assert b" 408 " in await asyncio.wait_for(reader.readline(), 5)
        writer.close()
        async with RewardClient(url, "t", retries=0) as client:
            assert (await client.score([])).results == ()
        await server.stop()

    asyncio.run(go())


HALF = b"GET /livez HTTP/1.1\r\nHost: x"
LIVEZ = HALF + b"\r\n\r\n"


@pytest.mark.parametrize("protocol", [H11Protocol, HttpToolsProtocol])
@pytest.mark.parametrize(
    ("sent", "then", "answered"), [(b"", b"", 0), (HALF, b"x", 0), (LIVEZ + HALF, b"x", 1), (LIVEZ * 2 + HALF, b"x", 2)]
)
def test_a_header_that_never_ends_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, protocol: Any, sent: bytes, then: bytes, answered: int
) -> None:
    monkeypatch.setattr("reward_server.serve.AutoHTTPProtocol", protocol)

    async def go() -> None:
        server = RewardServer(RewardSection(body_timeout_s=0.5), token="t")
        reader, writer = await asyncio.open_connection("127.0.0.1", int((await server.start()).rsplit(":", 1)[1]))
        writer.write(sent)
        came: list[bytes] = []

        async def read() -> None:
            with contextlib.suppress(ConnectionError):
                while part := await reader.read(1000):
                    came.append(part)

        reading = asyncio.create_task(read())
        for _ in range(20):
            await asyncio.sleep(0.1)
            writer.write(then)  # a byte now and then changes nothing
        assert reading.done()
        assert b"".join(came).count(b"HTTP/1.1 200") == answered
        writer.close()
        await server.stop()

    asyncio.run(go())


@pytest.mark.parametrize("protocol", [H11Protocol, HttpToolsProtocol])
def test_a_request_may_take_longer_than_its_header(monkeypatch: pytest.MonkeyPatch, protocol: Any) -> None:
    monkeypatch.setattr("reward_server.serve.AutoHTTPProtocol", protocol)

    async def go() -> None:
        server = RewardServer(RewardSection(body_timeout_s=0.3), token="t", scorers={"attention": Slow()})
        async with RewardClient(await server.start(), "t", retries=0) as client:
            for _ in range(2):  # the second on the connection of the first, which was idle meanwhile
                (result,) = (await client.score([Item(id="a")])).results
                assert result.reward == 1.0
                await asyncio.sleep(0.5)
        await server.stop()

    asyncio.run(go())


class Slow:
    """A source that takes a second."""

    revision = "1"

    async def score(self, items: Sequence[Item]) -> Sequence[Scored]:
        await asyncio.sleep(1)
        return [Scored(Component(status="ok", value=1.0))] * len(items)


def test_an_address_that_is_not_ours_is_named() -> None:
    with pytest.raises(UserError, match=r"192\.0\.2\.1"):
        bind("192.0.2.1", 0)
    with pytest.raises(UserError, match=r"no\.such\.host\.invalid"):
        bind("no.such.host.invalid", 0)


def test_without_a_token_only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("0.0.0.0", "::", "10.1.2.3", "example.org"):  # noqa: S104 - it is refused
        with pytest.raises(UserError, match="needs a token: set ATTUNE_REWARD_TOKEN"):
            RewardServer(RewardSection(host=host), token=None)
        RewardServer(RewardSection(host=host), token="t")
    for host in ("127.0.0.1", "localhost", "::1"):
        RewardServer(RewardSection(host=host), token=None)
    monkeypatch.setenv("ATTUNE_REWARD_TOKEN", " ")
    with pytest.raises(UserError, match="ATTUNE_REWARD_TOKEN is empty"):
        RewardSection().token()
    monkeypatch.setenv("ATTUNE_REWARD_TOKEN", "t\n")
    assert RewardSection().token() == "t"
    assert RewardSection().worker_token() is None  # a run's own server gets a random one
    assert RewardSection.model_validate({"worker": {"url": "http://scores:8077"}}).worker_token() == "t"
    monkeypatch.delenv("ATTUNE_REWARD_TOKEN")
    assert RewardSection().token() is None


def test_the_command_serves_and_ends_on_a_signal() -> None:
    program = "from reward_server.serve import run; from reward_server.config import RewardSection; " \
        "run(RewardSection(), port=0, say=lambda line: print(line, flush=True))"  # fmt: skip
    environment = {**os.environ, "ATTUNE_REWARD_TOKEN": "t"}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[3]
        assert httpx.get(f"{url}/livez", trust_env=False).status_code == 200
        assert httpx.get(f"{url}/readyz", trust_env=False).status_code == 401
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_neither_client_nor_server_needs_torch() -> None:
    program = """
import sys
import reward_server.client
ours = sorted(m for m in sys.modules if m.split('.')[0] in ('reward_server', 'services') and m != 'reward_server')
assert ours == ['reward_server.client', 'reward_server.schema'], ours
import reward_server.serve, reward_server.worker
assert not {'torch', 'transformers', 'ray'} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


def answers(status: int, body: bytes, **headers: str) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def trickles(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(100):
        try:
            handler.wfile.write(b" ")
        except OSError:
            return
        time.sleep(0.05)


def never(_: http.server.BaseHTTPRequestHandler) -> None:
    time.sleep(0.6)


def hangs_up(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def bad_server() -> Iterator[Callable[[Answer], tuple[str, list[float]]]]:
    """Starts a server that answers every POST in its own way; gives its URL and the times of the requests."""
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(answer: Answer) -> tuple[str, list[float]]:
        times: list[float] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                times.append(time.monotonic())
                answer(self)

            def log_message(self, *_: object) -> None:
                """Nothing: the tests' output stays clean."""

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", times

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def result(reward: str) -> bytes:
    body = (
        b'{"results": [{"id": "a", "status": "ok", "reward": REWARD, "components": {}, "error": null, "flags": []}],'
        b' "server": {"version": "1", "recipe_revision": "r", "sources": {}, "latency_ms": 1}}'
    )
    return body.replace(b"REWARD", reward.encode())


async def score_one(url: str, **options: Any) -> float | None:
    async with RewardClient(url, "t", timeout_s=0.3, backoff_s=0.01, **options) as client:
        return (await client.score([Item(id="a")])).results[0].reward


GARBAGE = [
    (answers(500, b"Internal Server Error"), "answered 500: Internal Server Error"),
    (answers(503, b'{"error": {"code": "not_ready", "message": "warming up"}}'), "503: warming up"),
    (answers(302, b"", Location="http://elsewhere"), "answered 302"),
    (answers(200, b"<html>proxy</html>"), "answered what is no result"),
    (answers(200, b""), "answered what is no result"),
    (answers(200, b"{}"), "answered what is no result"),
    (answers(200, result("NaN")), "finite reward"),
    (answers(200, result("null")), "finite reward"),
    (answers(200, result('"high"')), "answered what is no result"),
    (answers(200, result("0.5").replace(b'"a"', b'"b"')), "not one for each item"),
    (trickles, "did not answer within 0.3 s"),
    (never, "did not answer within 0.3 s"),
    (hangs_up, "127.0.0.1"),
]


@pytest.mark.parametrize(("answer", "told"), GARBAGE)
def test_no_usable_answer_is_tried_again_and_then_said(bad_server: Any, answer: Answer, told: str) -> None:
    url, times = bad_server(answer)
    with pytest.raises(RewardUnavailable, match=told):
        asyncio.run(score_one(url, retries=2))
    assert len(times) == 3


def test_a_refusal_is_not_tried_again(bad_server: Any) -> None:
    url, times = bad_server(answers(422, b'{"error": {"code": "invalid_request", "message": "items[0].id: no"}}'))
    with pytest.raises(RewardRefused, match=r"422: items\[0\].id: no"):
        asyncio.run(score_one(url))
    assert len(times) == 1


def test_the_client_waits_as_long_as_it_is_asked_to(bad_server: Any) -> None:
    url, times = bad_server(answers(429, b"", Retry_After="1"))
    with pytest.raises(RewardUnavailable):
        asyncio.run(score_one(url, retries=1))
    assert times[1] - times[0] >= 1


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RewardUnavailable, match=f"127.0.0.1:{port}"):
        asyncio.run(score_one(f"http://127.0.0.1:{port}", retries=0))


def test_a_good_answer(bad_server: Any) -> None:
    url, _ = bad_server(answers(200, result("0.25").replace(b'"flags"', b'"new_field": 1, "flags"')))
    assert asyncio.run(score_one(url)) == 0.25
