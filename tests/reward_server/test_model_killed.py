"""A model's process or actor is killed under load: what is in flight is scored elsewhere or fails as infra, no answer
is a wrong number, and the server is ready again without a restart of its own."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from reward_server.config import RewardSection
from reward_server.schema import Item, Result
from reward_server.scorers.build import build_scorers

TOKEN = "t"
ITEMS = [Item(id=str(i), prompt="Where is Rome?", response=f"It is number {i}. " + "In Italy. " * (i % 7))
         for i in range(40)]  # fmt: skip


@dataclass(frozen=True)
class Served:
    """A server whose source `s` has two replicas: its URL, and the replicas' process ids."""

    url: str
    replicas: list[int]


def recipe(model: Path) -> dict[str, Any]:
    source = {"kind": "preference", "model": str(model), "replicas": 2, "batch_tokens": 256, "restarts": 3}
    return {"sources": {"s": source}, "drain_s": 20, "log_level": "warning"}


@contextmanager
def alone(section: dict[str, Any], root: Path) -> Iterator[Served]:
    """The command, whose models are its child processes."""
    (root / "recipe.yaml").write_text(yaml.safe_dump({"reward": section}))
    command = [sys.executable, "-m", "cluster", "reward-server", str(root / "recipe.yaml"), "--port", "0"]
    with subprocess.Popen(command, stdout=-1, text=True, env={**os.environ, "ATTUNE_REWARD_TOKEN": TOKEN}) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[3]
            yield Served(url, [child.pid for child in psutil.Process(process.pid).children()])
            children = psutil.Process(process.pid).children()
            process.terminate()
            assert process.wait(40) == 0
            assert not any(child.is_running() for child in children)
        finally:
            process.kill()


@contextmanager
def in_a_run(section: dict[str, Any], _: Path) -> Iterator[Served]:
    """The server's actor of a run, whose models are actors that Ray starts again."""
    import ray

    from cluster.reward_actors import RewardActor
    from reward_server.model_actor import ModelActor
    from reward_server.placement import model_spec, placed_models

    values = RewardSection.model_validate(section)
    spec = model_spec("s", placed_models(values)["s"])

    class Told(ModelActor):
        def pid(self) -> int:
            return os.getpid()

    remote: Any = ray.remote
    handles = [remote(Told).options(num_cpus=1, max_restarts=3, max_concurrency=2).remote(spec) for _ in range(2)]
    server = remote(RewardActor).options(num_cpus=0).remote(values, token=TOKEN, models={"s": handles}, load_s=240)
    try:
        url = ray.get(server.start.remote(), timeout=240)
        yield Served(url, [ray.get(handle.pid.remote(), timeout=60) for handle in handles])
    finally:
        for handle in (server, *handles):
            ray.kill(handle)


@pytest.mark.parametrize("launch", [alone, pytest.param(in_a_run, marks=pytest.mark.slow)])
def test_a_model_that_is_killed_under_load(
    launch: Any, scoring_models: dict[str, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if launch is in_a_run:
        request.getfixturevalue("ray_session")
    section = recipe(scoring_models["sequence"])
    (scorer,) = build_scorers(RewardSection.model_validate(section)).values()
    offline = asyncio.run(scorer.score(ITEMS))
    expected = {item.id: scored.component.value for item, scored in zip(ITEMS, offline, strict=True)}
    with launch(section, tmp_path) as served:
        asyncio.run(kill_under_load(served, expected))


async def kill_under_load(served: Served, expected: dict[str, float | None]) -> None:
    results: list[Result] = []
    ended = asyncio.Event()
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(base_url=served.url, headers=headers, trust_env=False, timeout=60) as http:

        async def client(number: int) -> None:
            turn = number
            while not ended.is_set():
                items = [ITEMS[(turn + k) % len(ITEMS)].model_dump(mode="json", exclude_unset=True) for k in range(3)]
                answer = await http.post("/v1/rewards", json={"items": items})
                assert answer.status_code == 200
                results.extend(Result.model_validate(one) for one in answer.json()["results"])
                turn += 1
                if results[-1].status == "failed":
                    await asyncio.sleep(0.3)

        async def more(count: int) -> list[Result]:
            """The next results, of requests of which some were in flight before."""
            at = len(results)
            await asyncio.wait_for(reached(lambda: len(results) >= at + count), 60)
            return results[at:]

        async def ready() -> int:
            return (await http.get("/readyz")).status_code

        async def living() -> float:
            told = (await http.get("/metrics")).text
            name = 'attune_reward_source_replicas{source="s"} '
            return next(float(line.removeprefix(name)) for line in told.splitlines() if line.startswith(name))

        clients = [asyncio.create_task(client(5 * number)) for number in range(4)]
        try:
            await more(100)
            assert await living() == 2
            # One of two dies, with a batch in flight: the other has it all.
            os.kill(served.replicas[0], signal.SIGKILL)
            assert {result.status for result in await more(200)} == {"ok"}
            assert await ready() == 200
            # The other dies before the first is back.
            assert await living() == 1
            os.kill(served.replicas[1], signal.SIGKILL)
            await asyncio.wait_for(reached(lambda: results[-1].status == "failed"), 30)
            assert (await ready(), await living()) == (503, 0)
            began = time.monotonic()
            while await ready() != 200:
                assert time.monotonic() - began < 90
                await asyncio.sleep(0.2)
            await more(100)
            assert {result.status for result in await more(100)} == {"ok"}
        finally:
            ended.set()
            outcomes = await asyncio.wait_for(asyncio.gather(*clients, return_exceptions=True), 60)
    assert outcomes == [None] * len(clients)
    for result in results:
        if result.status == "ok":
            assert result.reward == pytest.approx(expected[result.id], abs=1e-5)
        else:
            assert result.reward is None
            assert result.error is not None
            assert result.error.kind == "infra"
            assert result.error.code in ("source_error", "source_down")  # in its hands when it died, or none lives


async def reached(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.02)
