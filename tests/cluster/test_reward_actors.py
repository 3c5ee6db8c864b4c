"""The scoring worker's actor against servers that accept and never answer."""

import asyncio
import time
from typing import Any

import pytest

import cluster.reward_actors
from cluster.reward_actors import ScoringActor
from reward_server.config import RewardSection, WorkerSection
from reward_server.serve import RewardServer
from reward_server.worker import ScoringOutage
from services.stream.config import StreamSection
from tests.reward_server.test_worker import MemoryLedger, group, sample


class Silent:
    """A host that takes connections and says nothing."""

    def __init__(self) -> None:
        self.connections = 0
        self.lost = asyncio.Event()
        self.url = ""

    async def __aenter__(self) -> "Silent":
        self._server = await asyncio.start_server(self._take, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while await reader.read(2**16):
            pass
        writer.close()
        self.lost.set()


def actor_of(monkeypatch: pytest.MonkeyPatch, ledger: MemoryLedger, url: str, **worker: Any) -> ScoringActor:
    monkeypatch.setattr(cluster.reward_actors, "open_ledger", lambda *_: ledger)
    section = RewardSection(worker=WorkerSection.model_validate({"backoff_s": 0.01, "block_ms": 1, **worker}))
    return ScoringActor(
        section, url=url, token="t", stream_url="", run_id="r", min_ok=2, name="w0", stream=StreamSection()
    )


def test_a_silent_server_is_an_outage_after_outage_s(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        async with Silent() as silent:
            ledger = MemoryLedger(group(sample(0), sample(1)))
            actor = actor_of(monkeypatch, ledger, silent.url, timeout_s=1.0, outage_s=1.5)
            began = time.monotonic()
            with pytest.raises(ScoringOutage, match="has scored nothing for 2 s"):
                await actor.run()
            assert time.monotonic() - began < 3.5
            assert silent.connections == 2

    asyncio.run(go())


def test_a_worker_leaves_a_server_that_was_replaced_after_one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        async with Silent() as silent:
            server = RewardServer(RewardSection(), token="t")
            ledger = MemoryLedger(group(sample(0), sample(1)))
            actor = actor_of(monkeypatch, ledger, silent.url, timeout_s=1.0, outage_s=1.0)
            running = asyncio.create_task(actor.run())
            while not silent.connections:
                await asyncio.sleep(0.01)
            await actor.point_to(silent.url, "t")  # which is replaced, too, before anybody asks it
            await actor.point_to(await server.start(), "t")
            async with asyncio.timeout(5):
                while not ledger.scored:
                    await asyncio.sleep(0.01)
            assert silent.connections == 1
            await actor.stop()
            await running
            await server.stop()

    asyncio.run(go())
