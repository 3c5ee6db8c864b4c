"""Deadlines of clients, clients that go away, idempotency keys, sizes, ids: what a request may ask of the service."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from reward_server.app import create_app
from reward_server.config import RewardSection
from reward_server.idempotency import Answered, Repeats
from reward_server.metrics import Metrics
from reward_server.schema import Component, ErrorCode, Item, failed_component
from reward_server.scorers.base import Scored
from reward_server.serve import RewardServer

ONE = {"items": [{"id": "a", "response": "x"}]}


class Counting:
    """Scores with the number of its calls, each of which takes `seconds`; fails as infra the first `failures` times."""

    revision = "1"

    def __init__(self, seconds: float = 0.0, failures: int = 0) -> None:
        self.seconds = seconds
        self.failures = failures
        self.calls = 0
        self.ended = 0

    async def score(self, items: Sequence[Item]) -> Sequence[Scored]:
        self.calls += 1
        number = self.calls
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.ended += 1
        if number <= self.failures:
            return [Scored(failed_component(ErrorCode.SOURCE_TIMEOUT, "late"))] * len(items)
        return [Scored(Component(status="ok", value=float(number)))] * len(items)


def client_of(source: Any, **section: Any) -> httpx.AsyncClient:
    app = create_app(RewardSection.model_validate(section), scorers={"attention": source})
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


def asking(client: httpx.AsyncClient, body: Any = ONE, path: str = "/v1/rewards", **headers: str) -> Any:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post(path, json=body, headers=named)


# deadlines


def test_a_deadline_is_kept_while_scoring_and_while_waiting() -> None:
    async def go() -> None:
        source = Counting(seconds=1.0)
        async with client_of(source, concurrency=1) as client:
            first = asyncio.create_task(asking(client))
            await asyncio.sleep(0.05)
            started = time.monotonic()
            waiting = await asking(client, X_Request_Deadline_Ms="200")
            assert 0.15 < time.monotonic() - started < 0.8
            assert (waiting.status_code, waiting.json()["error"]["code"]) == (504, "deadline_exceeded")
            assert "within the 200 ms" in waiting.json()["error"]["message"]
            assert (await first).status_code == 200
            assert source.calls == 1
            scoring = await asking(
                client, path="/slime", body={"prompt": "p", "response": "r"}, X_Request_Deadline_Ms="200"
            )
            assert scoring.status_code == 504
            assert source.ended == source.calls == 2
            assert (await asking(client, X_Request_Deadline_Ms="5000")).status_code == 200
            metrics = (await client.get("/metrics")).text
            assert "attune_reward_admitted_requests 0.0" in metrics
            assert "attune_reward_scoring_requests 0.0" in metrics

    asyncio.run(go())


@pytest.mark.parametrize("value", ["0", "-5", "1.5", "soon", "", "9" * 12, "²"])
def test_a_wrong_deadline_is_named(value: str) -> None:
    async def go() -> None:
        async with client_of(Counting()) as client:
            answer = await client.post("/v1/rewards", json=ONE, headers=[(b"X-Request-Deadline-Ms", value.encode())])
            assert answer.status_code == 422
            assert answer.json()["detail"][0]["path"] == "header.x-request-deadline-ms"

    asyncio.run(go())


def test_a_deadline_counts_the_time_that_the_body_takes() -> None:
    async def go() -> None:
        server = RewardServer(RewardSection(), token="t")
        url = await server.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        head = b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer t\r\nContent-Length: 10\r\n"
        writer.write(head + b"X-Request-Deadline-Ms: 200\r\n\r\n{")
        assert b" 504 " in await asyncio.wait_for(reader.readline(), 5)
        writer.close()
        await server.stop()

    asyncio.run(go())


# clients that go away


def test_a_client_that_goes_away_leaves_the_queue_and_the_source() -> None:
    async def go() -> None:
        source = Counting(seconds=30.0)
        server = RewardServer(RewardSection(concurrency=1), token="t", scorers={"attention": source})
        url = await server.start()
        async with httpx.AsyncClient(base_url=url, headers={"Authorization": "Bearer t"}, trust_env=False) as client:
            scored = asyncio.create_task(asking(client))
            await until(client, "attune_reward_admitted_requests 1.0")
            waiting = [asyncio.create_task(asking(client)) for _ in range(2)]
            await until(client, "attune_reward_waiting_requests 2.0")
            for call in waiting:
                call.cancel()
            await until(client, "attune_reward_waiting_requests 0.0")
            assert (source.calls, source.ended) == (1, 0)
            scored.cancel()
            await until(client, "attune_reward_admitted_requests 0.0")
            assert (source.calls, source.ended) == (1, 1)
            assert 'route="/v1/rewards",status="499"} 3.0' in (await client.get("/metrics")).text
        await server.stop()

    asyncio.run(go())


async def until(client: httpx.AsyncClient, line: str) -> None:
    """Waits until the metrics say it."""
    async with asyncio.timeout(10):
        while line not in (await client.get("/metrics")).text.splitlines():
            await asyncio.sleep(0.02)


# idempotency


def reward(answer: httpx.Response) -> float:
    assert answer.status_code == 200, answer.text
    return answer.json()["results"][0]["reward"]


def test_the_same_key_gets_the_same_answer_computed_once() -> None:
    async def go() -> None:
        source = Counting(seconds=0.1)
        async with client_of(source) as client:
            together = await asyncio.gather(*(asking(client, Idempotency_Key="k") for _ in range(5)))
            later = await asking(client, Idempotency_Key="k")
            assert {answer.content for answer in (*together, later)} == {later.content}
            assert source.calls == 1
            assert "attune_reward_repeated_requests_total 5.0" in (await client.get("/metrics")).text
            assert reward(await asking(client, Idempotency_Key="other")) == 2.0
            assert reward(await asking(client)) == 3.0
            slime = {"prompt": "p", "response": "r"}
            assert (await asking(client, slime, "/slime", Idempotency_Key="k")).json() == 4.0  # another route

    asyncio.run(go())


def test_the_same_key_with_another_body_is_refused() -> None:
    async def go() -> None:
        source = Counting()
        async with client_of(source) as client:
            await asking(client, Idempotency_Key="k")
            other = await asking(client, {"items": []}, Idempotency_Key="k")
            assert (other.status_code, other.json()["error"]["code"]) == (422, "invalid_request")
            assert other.json()["detail"][0]["type"] == "idempotency_key_reused"
            other = await asking(client, ONE, "/v1/rewards?sources=another", Idempotency_Key="k")
            assert other.json()["detail"][0]["type"] == "idempotency_key_reused"
            assert reward(await asking(client, Idempotency_Key="k")) == 1.0
            for wrong in ("", "x" * 256, "a\tb"):
                answer = await asking(client, Idempotency_Key=wrong)
                assert answer.json()["detail"][0]["path"] == "header.idempotency-key"

    asyncio.run(go())


def test_what_a_client_tries_again_for_is_not_kept() -> None:
    async def go() -> None:
        source = Counting(failures=1)
        async with client_of(source, concurrency=1, queue_timeout_s=0.1) as client:
            first = await asking(client, Idempotency_Key="k")
            assert first.json()["results"][0]["error"]["kind"] == "infra"
            assert reward(await asking(client, Idempotency_Key="k")) == 2.0
            source.seconds = 0.5
            slow = asyncio.create_task(asking(client))
            await asyncio.sleep(0.1)
            assert (await asking(client, Idempotency_Key="busy")).status_code == 429
            await slow
            assert reward(await asking(client, Idempotency_Key="busy")) == 4.0

    asyncio.run(go())


def test_who_goes_away_takes_nothing_from_others_with_the_same_key() -> None:
    async def go() -> None:
        source = Counting(seconds=0.6)
        async with client_of(source) as client:
            leaver = asyncio.create_task(asking(client, Idempotency_Key="k", X_Request_Deadline_Ms="200"))
            await asyncio.sleep(0.05)
            stays = asyncio.create_task(asking(client, Idempotency_Key="k"))
            assert (await leaver).status_code == 504
            assert reward(await stays) == 1.0
            alone = await asking(client, Idempotency_Key="alone", X_Request_Deadline_Ms="100")
            assert alone.status_code == 504
            assert source.ended == source.calls == 2  # nobody waited for it any more
            assert reward(await asking(client, Idempotency_Key="alone")) == 3.0

    asyncio.run(go())


def test_answers_are_kept_for_a_while_and_within_bounds() -> None:
    async def go() -> None:
        source = Counting()
        async with client_of(source, idempotency_window_s=0.3) as client:
            assert reward(await asking(client, Idempotency_Key="k")) == 1.0
            assert reward(await asking(client, Idempotency_Key="k")) == 1.0
            await asyncio.sleep(0.35)
            assert reward(await asking(client, Idempotency_Key="k")) == 2.0
        async with client_of(Counting(), idempotency_bytes=1000) as client:
            for key in "abcdef":
                await asking(client, Idempotency_Key=key)
            assert reward(await asking(client, Idempotency_Key="f")) == 6.0
            assert reward(await asking(client, Idempotency_Key="a")) == 7.0

    asyncio.run(go())


def test_what_is_being_computed_holds_up_no_forgetting() -> None:
    async def go() -> None:
        source = Counting()
        async with client_of(source, idempotency_window_s=0.2) as client:
            source.seconds = 1.0
            first = asyncio.create_task(asking(client, Idempotency_Key="slow"))
            await asyncio.sleep(0.1)
            source.seconds = 0.0
            assert reward(await asking(client, Idempotency_Key="k")) == 2.0
            await asyncio.sleep(0.3)
            assert not first.done()
            assert reward(await asking(client, Idempotency_Key="k")) == 3.0
            assert reward(await first) == 1.0
            assert reward(await asking(client, Idempotency_Key="slow")) == 1.0

    asyncio.run(go())


def test_a_request_costs_the_same_however_many_answers_are_kept() -> None:
    async def compute() -> Answered:
        return Answered(b"x", keep=True)

    async def go() -> None:
        repeats = Repeats(3600, 10**9, Metrics())
        seconds: list[float] = []
        for start in range(0, 8000, 500):
            began = time.process_time()
            for i in range(start, start + 500):
                await repeats.answer("who", "/route", str(i), b"", compute)
            seconds.append(time.process_time() - began)
        assert min(seconds[-4:]) < 5 * min(seconds[:4])

    asyncio.run(go())


# sizes


LARGE = [
    ({"prompt": "x" * 101}, "prompt"),
    ({"response": "x" * 101}, "response"),
    ({"text": "x" * 101}, "text"),
    ({"reference": "x" * 101}, "reference"),
    ({"messages": [{"role": "user", "content": "x" * 60}] * 2}, "messages"),
    ({"facts": ["x", "x" * 101]}, "facts[1]"),
    ({"principles": ["x" * 101]}, "principles[0]"),
    ({"response_ids": [1] * 11}, "response_ids"),
    ({"attention": {"rows": [[0.1]] * 11, "content": [0]}}, "attention.rows"),
]


@pytest.mark.parametrize(("fields", "named"), LARGE)
def test_a_text_or_a_response_that_is_too_long_is_named(fields: dict[str, Any], named: str) -> None:
    async def go() -> None:
        async with client_of(Counting(), max_text_chars=100, max_tokens=10, max_items=2) as client:
            answer = await asking(client, {"items": [{"id": "a"}, {"id": "b", **fields}]})
            assert answer.status_code == 413
            assert answer.json()["detail"][0]["path"] == f"items[1].{named}"
            assert "at most 10" in answer.json()["detail"][0]["msg"]

    asyncio.run(go())


def test_adapters_name_their_own_fields() -> None:
    async def go() -> None:
        async with client_of(Counting(), max_text_chars=100, max_items=2) as client:
            long = await asking(client, {"text_1": "p", "text_2": ["r", "x" * 101]}, "/score")
            assert (long.status_code, long.json()["detail"][0]["path"]) == (413, "text_2[1]")
            many = await asking(client, {"inputs": [["p", "r"]] * 3}, "/predict")
            assert (many.status_code, many.json()["detail"][0]["path"]) == (413, "inputs")

    asyncio.run(go())


def test_a_body_that_says_it_is_no_json_is_refused() -> None:
    async def go() -> None:
        async with client_of(Counting()) as client:
            for kind, status in (("text/plain", 415), ("application/x-www-form-urlencoded", 415),
                                 ("application/json; charset=utf-8", 200), ("application/ld+json", 200)):  # fmt: skip
                answer = await client.post("/v1/rewards", content=b'{"items": []}', headers={"Content-Type": kind})
                assert answer.status_code == status, kind

    asyncio.run(go())


# ids, readiness


def test_a_request_has_an_id() -> None:
    async def go() -> None:
        async with client_of(Counting()) as client:
            assert (await asking(client, X_Request_Id="run-7.3")).headers.get_list("x-request-id") == ["run-7.3"]
            for wrong in ("two words", "x" * 129, ""):
                given = (await asking(client, X_Request_Id=wrong)).headers["x-request-id"]
                assert given != wrong
                assert len(given) == 16
            assert len((await client.get("/nowhere")).headers["x-request-id"]) == 16

    asyncio.run(go())


def test_a_source_that_answers_the_probe_and_nobody_else_is_not_ready() -> None:
    class Wedged(Counting):
        async def score(self, items: Sequence[Item]) -> Sequence[Scored]:
            if items[0].id == "probe":
                return [Scored(Component(status="ok", value=1.0))]
            return await super().score(items)

    async def go() -> None:
        source = Wedged(failures=99)
        async with client_of(source, stalled_s=0.3) as client:
            await asking(client)
            assert (await client.get("/readyz")).status_code == 200
            await asyncio.sleep(0.2)
            await asking(client)
            await asyncio.sleep(0.2)
            answer = await client.get("/readyz")
            assert answer.status_code == 503
            assert "attention: has scored nothing that was sent for" in answer.json()["error"]["message"]
            source.failures = 0
            await asking(client)
            assert (await client.get("/readyz")).status_code == 200
            source.failures = 99
            for _ in range(3):
                await asking(client)
                await asyncio.sleep(0.15)
            assert (await client.get("/readyz")).status_code == 503
            await asyncio.sleep(0.3)
            assert (await client.get("/readyz")).status_code == 200  # nobody has asked since: nothing is known

    asyncio.run(go())
