"""The reward server and the scoring worker as actors of a run.

A module of their own: neither needs torch in its process.
"""

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import httpx

from cluster.plan import machines_of_ray
from cluster.ray_metrics import SCORING_COUNTERS, SERVER_COUNTERS, export_counters
from reward_server.client import RewardClient
from reward_server.config import RewardSection
from reward_server.model_actor import ActorReplica
from reward_server.placement import placed_models
from reward_server.replicas import ReplicaRunner, start_all
from reward_server.serve import RewardServer, is_loopback
from reward_server.worker import ScoringWorker
from services.errors import UserError
from services.stream.config import StreamSection
from services.stream.ledger import open_ledger

LIVE_S = 10.0
"""Seconds in which a reward server that lives says so."""


class RewardActor(RewardServer):
    """The run's reward server, on loopback; on a cluster of several machines, on the address that the others reach."""

    def __init__(
        self,
        section: RewardSection,
        *,
        token: str,
        models: Mapping[str, Sequence[Any]],
        load_s: float,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """`models`: the actors that hold each source's model; `load_s`: deadline for them to load it; `labels`: of what
        it exports of itself by Ray."""

        def runners() -> dict[str, ReplicaRunner]:
            import ray

            def started(name: str) -> ReplicaRunner:
                replicas = [ActorReplica(handle, ray, load_s=load_s) for handle in models[name]]
                return ReplicaRunner(name, replicas, restarts=placed[name].restarts, needs_all=False)

            placed = placed_models(section)
            return start_all({name: partial(started, name) for name in models})

        self._labels = labels
        self._watching: asyncio.Task[None] | None = None
        super().__init__(section, token=token, host=_host(section), runners=runners)

    async def start(self) -> str:
        if self._labels is not None:
            self._watching = asyncio.create_task(
                export_counters(self.counters, names=SERVER_COUNTERS, labels=self._labels)
            )
        try:
            return await super().start()
        except Exception as error:
            # An error of a model's actor comes wrapped: the user is told what is wrong with the model.
            cause = getattr(error, "cause", None)
            if isinstance(cause, UserError):
                raise cause from None
            raise

    async def counters(self) -> dict[str, float]:
        """Seconds so far in which it was busy, as `RewardServer.busy_s`."""
        return self.busy_s()

    async def pulse(self) -> tuple[int, bool]:
        """That it serves: it is asked for its own liveness, as others would ask. Until it does, it has work."""
        if self._url is None:
            return 0, True
        async with httpx.AsyncClient(trust_env=False, timeout=LIVE_S) as client:
            (await client.get(f"{self._url}/livez")).raise_for_status()
        return 0, False


class ScoringActor:
    """What a scoring worker's process holds: a client of the reward server, a connection to the ledger, the loop."""

    def __init__(
        self,
        section: RewardSection,
        *,
        url: str,
        token: str | None,
        stream_url: str,
        run_id: str,
        min_ok: int,
        name: str,
        stream: StreamSection,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """`labels`: of what it exports of itself by Ray."""
        self._labels = labels
        self._timeout_s = section.worker.timeout_s
        self._client = self._client_of(url, token)
        ledger = open_ledger(stream_url, run_id, stream)
        self._worker = ScoringWorker(ledger, self._client, section.worker, min_ok, consumer=name)

    def _client_of(self, url: str, token: str | None) -> RewardClient:
        # One try each: the worker tries again by itself, and may have been pointed elsewhere by then.
        return RewardClient(url, token, self._timeout_s, retries=0)

    async def run(self) -> None:
        """Works until `stop`, and closes its connections."""
        watching = (
            None
            if self._labels is None
            else asyncio.create_task(export_counters(self.counters, names=SCORING_COUNTERS, labels=self._labels))
        )
        try:
            await self._worker.run()
        finally:
            if watching is not None:
                watching.cancel()
            await self._client.close()

    async def stop(self) -> None:
        self._worker.stop()

    async def point_to(self, url: str, token: str) -> None:
        """The reward server was started again, elsewhere: from the next try on, it is asked there."""
        self._client = self._client_of(url, token)
        await self._worker.use(self._client)

    async def pulse(self) -> tuple[int, bool]:
        """Groups read and answered, and whether it has some at hand; an outage has a deadline of its own."""
        return self._worker.progress()

    async def counters(self) -> dict[str, float]:
        """Groups and samples so far, failures by code, and `busy_s`, seconds with groups at hand."""
        return {**self._worker.counters, "busy_s": self._worker.busy_s()}


def _host(section: RewardSection) -> str:
    import ray

    several = machines_of_ray(ray.nodes()) > 1
    return ray.util.get_node_ip_address() if several and is_loopback(section.host) else section.host
