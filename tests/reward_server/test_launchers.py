"""One contract under three launchers: uvicorn in a thread, a Ray actor, a Ray Serve application."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from reward_server.client import RewardClient, RewardRefused
from reward_server.config import RewardSection
from reward_server.keys import make_key
from reward_server.schema import Item
from reward_server.serve import RewardServer

SOURCES = {"words": {"kind": "length", "unit": "words", "target": 4, "bonus": 2.0}}
Launch = Callable[[dict[str, Any]], str]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def uvicorn_alone() -> Iterator[Launch]:
    servers: list[RewardServer] = []

    def launch(section: dict[str, Any]) -> str:
        servers.append(RewardServer(section, token=None))
        return asyncio.run(servers[-1].start())

    yield launch
    for server in servers:
        asyncio.run(server.stop())


@pytest.fixture
def ray_actor(ray_session: str) -> Iterator[Launch]:  # noqa: ARG001
    import ray

    actors: list[Any] = []

    def launch(section: dict[str, Any]) -> str:
        actors.append(ray.remote(num_cpus=0)(RewardServer).remote(section, token=None))
        return ray.get(actors[-1].start.remote(), timeout=60)

    yield launch
    for actor in actors:
        ray.get(actor.stop.remote(), timeout=60)
        ray.kill(actor)


@pytest.fixture
def ray_serve(ray_session: str) -> Iterator[Launch]:  # noqa: ARG001
    from ray import serve

    from reward_server.ray_serve import application

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})

    def launch(section: dict[str, Any]) -> str:
        serve.run(application(section), name="reward")
        return f"http://127.0.0.1:{port}"

    yield launch
    serve.shutdown()


@pytest.mark.parametrize("launcher", ["uvicorn_alone", "ray_actor", pytest.param("ray_serve", marks=pytest.mark.slow)])
def test_the_contract_holds_under_every_launcher(launcher: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    key = make_key(path, "trainer")
    section = {"sources": SOURCES, "keys_file": str(path), "max_items": 3, "max_bytes": 4096, "max_requests": 1}
    url = request.getfixturevalue(launcher)(section)
    asyncio.run(contract(url, key))


async def contract(url: str, key: str) -> None:
    headers = {"Authorization": f"Bearer {key}", "X-Request-Id": "mine"}
    async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=False) as http:
        assert (await http.get("/livez", headers={"Authorization": ""})).json() == {"status": "ok"}
        for path in ("/readyz", "/metrics", "/openapi.json", "/nowhere"):
            assert (await http.get(path, headers={"Authorization": "Bearer wrong"})).status_code == 401
        ready = await http.get("/readyz")
        assert (ready.status_code, ready.headers["x-request-id"]) == (200, "mine")

        async with RewardClient(url, key, retries=0) as client:
            answer = await client.score([Item(id="a", response="a b"), Item(id="b")])
            assert [result.reward for result in answer.results] == [1.0, None]
            assert answer.results[1].error is not None
            assert answer.results[1].error.code == "missing_response"
            assert answer.server.recipe_revision == RewardSection.model_validate({"sources": SOURCES}).recipe_revision()
            with pytest.raises(RewardRefused, match="413: items: 4 items, at most 3"):
                await client.score([Item(id="a")] * 4)
            with pytest.raises(RewardRefused, match="413: the body has more than 4096 bytes"):
                await client.score([Item(id="a", response="x" * 5000)])

        scores = await http.post("/score", json={"text_1": "p", "text_2": ["a b", "a b c d"]})
        assert [entry["score"] for entry in scores.json()["data"]] == [1.0, 2.0]
        wrong = await http.post("/v1/rewards", json={"items": [{"id": 3}]})
        assert (wrong.status_code, wrong.json()["detail"][0]["path"]) == (422, "items[0].id")
        metrics = (await http.get("/metrics")).text
        assert 'attune_reward_requests_total{route="/score",status="200"} 1.0' in metrics

        # One request is held by a client that has not sent its whole body; the next are told to come again.
        held, release = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        release.write(
            b"POST /v1/rewards HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %b\r\n"
            b"Content-Type: application/json\r\nContent-Length: 13\r\n\r\n{" % key.encode()
        )
        await asyncio.sleep(0.5)
        native = await http.post("/v1/rewards", json={"items": []})
        assert (native.status_code, native.headers["retry-after"]) == (429, "1")
        adapter = await http.post("/score", json={"text_1": "p", "text_2": "a"})
        assert (adapter.status_code, adapter.headers["retry-after"]) == (503, "1")
        release.write(b'"items": []}')
        assert b" 200 " in await asyncio.wait_for(held.readline(), 10)
        release.close()


@pytest.mark.slow
def test_ray_serve_starts_nothing_that_asks_for_no_key(ray_serve: Launch) -> None:
    with pytest.raises(RuntimeError, match="reward"):
        ray_serve({"sources": SOURCES})
