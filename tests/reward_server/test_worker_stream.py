"""The scoring worker between a real ledger on a real Redis and a real reward server."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from reward_server.client import RewardClient
from reward_server.config import RewardSection, WorkerSection
from reward_server.serve import RewardServer
from reward_server.worker import ScoringWorker
from services.records import Attention, Group, Lease, PolicyVersion, Prompt, Sample
from services.stream.connect import connect
from services.stream.embedded import EmbeddedRedis
from services.stream.ledger import Ledger

EOS = 2
SECTION = WorkerSection(groups=3, block_ms=20, backoff_s=0.01, retries=0, data_budget=0)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with EmbeddedRedis(tmp_path / "redis") as redis:
        yield Ledger(connect(redis.url), "run")


def generated(lease: Lease, ids: tuple[int, ...]) -> Group:
    """Two samples of the leased prompt."""
    rows = (0.5,) * len(ids)
    samples = tuple(
        Sample(
            sample_id=f"{lease.group_id}:{k}", group_id=lease.group_id, prompt_id=lease.prompt.prompt_id,
            attempt=lease.attempt, policy_versions=((0, 0, len(ids)),), prompt="p", prompt_ids=(7, 8), response="r",
            response_ids=ids, finish_reason="stop", logprobs=(-1.0,) * len(ids), created_at=0.0,
            attention=Attention(
                layers=(0,), content=(0, 1), salient=(1,), salient_weights=(1.0,), mass=rows, salient_mass=rows,
                neg_entropy_sum=(-0.5,) * len(ids), peak=rows,
            ),
        )
        for k in range(2)
    )  # fmt: skip
    return Group(
        group_id=lease.group_id, attempt=lease.attempt, epoch=lease.epoch, order=lease.order,
        version=PolicyVersion(0, 0), prompt=lease.prompt, eos_ids=(EOS,), samples=samples,
    )  # fmt: skip


def test_from_generated_to_scored_and_failed(ledger: Ledger) -> None:
    names = [f"0:{n}" for n in range(6)]
    ledger.register(0, [(name, order) for order, name in enumerate(names)])
    ledger.reconcile({}, {})
    ledger.attach({name: Prompt(prompt_id=name[2:], source="t", text="p") for name in names})
    ledger.open_gate(PolicyVersion(0, 0), "weights.json", 100)
    for n in range(len(names)):
        lease = ledger.lease("actor", PolicyVersion(0, 0), 60.0)
        assert isinstance(lease, Lease)
        assert ledger.put_generated(generated(lease, (EOS,) if n == 4 else (5, 6, EOS)))

    async def work() -> None:
        server = RewardServer(RewardSection(), token="t")
        async with RewardClient(await server.start(), "t") as client:
            worker = ScoringWorker(ledger, client, SECTION, 2, consumer="w0")
            while await worker.step():
                pass
        await server.stop()

    asyncio.run(work())
    counts = ledger.counts()
    assert (counts["scored"], counts["failed"], counts["generated"]) == (5, 1, 0)
    (failed,) = ledger.list("failed")
    assert failed.group_id == "0:4"
    assert failed.failure is not None
    assert (failed.failure.kind, failed.failure.code) == ("data", "empty_response")
    scored = [name for name in names if name != "0:4"]
    for group in ledger.fetch(scored):
        assert all(sample.reward is not None and sample.reward.status == "ok" for sample in group.samples)
