"""The scoring worker: real HTTP to a real server, and a ledger in memory that keeps the ledger's contract."""

import asyncio
import math
import time
from collections.abc import Sequence
from typing import Any

import pytest

from reward_server.client import RewardClient, RewardUnavailable
from reward_server.config import RewardSection, WorkerSection
from reward_server.replicas import NoReplica, ReplicaLost
from reward_server.schema import Component, ErrorCode, Item, Result, RewardResponse, ServerInfo, failed_component
from reward_server.scorers.base import Scored
from reward_server.serve import RewardServer
from reward_server.worker import ScoringOutage, ScoringRefused, ScoringWorker, group_items
from services.records import Attention, Failure, Group, Message, PolicyVersion, Prompt, Sample

EOS = 2
FAST = WorkerSection(backoff_s=0.01, retries=1, timeout_s=5, block_ms=10, outage_s=0.3, min_idle_ms=1000)


def sample(index: int, *, group_id: str = "0:p", ids: tuple[int, ...] = (5, 6, EOS), mass: float = 0.5) -> Sample:
    rows = len(ids)
    return Sample(
        sample_id=f"{group_id}:{index}", group_id=group_id, prompt_id="p", attempt=1,
        policy_versions=((0, 0, rows),), prompt="the sky is", prompt_ids=(7, 8, 9), response="blue",
        response_ids=ids, finish_reason="stop", logprobs=(-1.0,) * rows, created_at=0.0,
        attention=Attention(
            layers=(1,), content=(0, 1), salient=(1,), salient_weights=(1.0,), mass=(mass,) * rows,
            salient_mass=(0.2,) * rows, neg_entropy_sum=(-0.6,) * rows, peak=(0.3,) * rows,
        ),
    )  # fmt: skip


def group(*samples: Sample, prompt: Prompt | None = None, group_id: str = "0:p") -> Group:
    prompt = prompt or Prompt(prompt_id="p", source="test", text="the sky is", reference="blue")
    return Group(
        group_id=group_id, attempt=1, epoch=0, order=0, version=PolicyVersion(0, 0), prompt=prompt, eos_ids=(EOS,),
        samples=samples,
    )  # fmt: skip


class MemoryLedger:
    """Entries that are read once, and what became of them."""

    def __init__(self, *groups: Group) -> None:
        self.entries = [(f"{i}-0", entry) for i, entry in enumerate(groups)]
        self.scored: dict[str, Group] = {}
        self.failures: list[tuple[str, Failure, int]] = []
        self.read: dict[str, str] = {}

    def read_generated(self, consumer: str, count: int, block_ms: int, min_idle_ms: int) -> Sequence[tuple[str, Group]]:
        assert consumer == "w0"
        assert block_ms > 0
        assert min_idle_ms > 0
        taken, self.entries = self.entries[:count], self.entries[count:]
        self.read |= {entry: group.group_id for entry, group in taken}
        return taken

    def put_scored(self, entry_id: str, group: Group) -> bool:
        self.scored[entry_id] = group
        return True

    def fail(self, group_id: str, attempt: int, failure: Failure, budget: int, *, entry_id: str | None = None) -> str:
        assert attempt == 1
        assert entry_id is not None
        assert self.read[entry_id] == group_id
        self.failures.append((group_id, failure, budget))
        return "pending"


def work(
    ledger: MemoryLedger, *, section: WorkerSection = FAST, server: Any = None, scorers: Any = None, token: str = "t",  # noqa: S107
    min_ok: int = 2,
) -> ScoringWorker:  # fmt: skip
    """Starts a server, runs the worker until the stream is empty, and gives the worker."""

    async def go() -> ScoringWorker:
        reward_server = RewardServer(server or RewardSection(), token="t", scorers=scorers)
        url = await reward_server.start()
        try:
            async with RewardClient(url, token, section.timeout_s, retries=0) as client:
                worker = ScoringWorker(ledger, client, section, min_ok, consumer="w0")
                while await worker.step():
                    pass
                return worker
        finally:
            await reward_server.stop()

    return asyncio.run(go())


def test_groups_come_back_scored() -> None:
    groups = [group(*(sample(k, group_id=f"0:{g}") for k in range(4)), group_id=f"0:{g}") for g in range(5)]
    ledger = MemoryLedger(*groups)
    section = RewardSection.model_validate(
        {"sources": {"attention": {"kind": "attention"}, "match": {"kind": "exact_match", "weight": 2.0}}}
    )
    worker = work(ledger, section=FAST.model_copy(update={"groups": 3, "batch_items": 7}), server=section)
    assert [entry.group_id for entry in ledger.scored.values()] == [entry.group_id for entry in groups]
    for before, after in zip(groups, ledger.scored.values(), strict=True):
        for old, new in zip(before.samples, after.samples, strict=True):
            assert set(new.scores) == {"attention", "match"}
            assert new.scores["match"].value == 1.0
            assert new.reward is not None
            assert new.reward.value == new.scores["attention"].value + 2.0
            # Of two values the deviation is half their distance; a weight is no part of it.
            half = pytest.approx(abs(new.scores["attention"].value - 1.0) / 2)
            assert new.reward.detail == {"recipe_revision": section.recipe_revision(), "disagreement": half}
            assert "mass_mean" in new.scores["attention"].detail
            assert new.model_copy(update={"scores": {}, "reward": None}) == old
        assert Group.model_validate_json(after.model_dump_json()) == after
    assert worker.counters == {"groups_scored": 5, "samples_ok": 20, "samples_failed": 0}


def test_a_failed_sample_keeps_its_name_and_the_group_goes_on() -> None:
    ledger = MemoryLedger(group(sample(0), sample(1, ids=(EOS,)), sample(2), sample(3, mass=math.nan)))
    worker = work(ledger)
    (after,) = ledger.scored.values()
    codes = [entry.reward and entry.reward.error and entry.reward.error.code for entry in after.samples]
    assert codes == [None, "empty_response", None, "non_finite_attention"]
    assert [entry.reward and entry.reward.value is None for entry in after.samples] == [False, True, False, True]
    assert worker.counters["failed/empty_response"] == 1


@pytest.mark.parametrize(("min_ok", "failed"), [(1, False), (2, True)])
def test_a_group_with_too_few_scored_samples_fails(min_ok: int, failed: bool) -> None:
    ledger = MemoryLedger(group(sample(0), sample(1, ids=(EOS,)), sample(2, ids=(EOS,))))
    work(ledger, min_ok=min_ok)
    assert bool(ledger.scored) == (not failed)
    if failed:
        ((group_id, failure, budget),) = ledger.failures
        assert (group_id, failure.kind, failure.code, budget) == ("0:p", "data", "empty_response", FAST.data_budget)
        assert "1 of 3 samples scored, 2 are needed" in failure.message


def test_messages_facts_and_flags_reach_the_server() -> None:
    prompt = Prompt(
        prompt_id="p", source="t", messages=(Message(role="user", content="hi"),), facts=("f",), principles=("q",)
    )
    flagged = sample(0).model_copy(update={"flags": ("no_salient_tokens", "mine"), "attention": None})
    first, second = group_items(
        group(flagged, sample(1).model_copy(update={"flags": ("no_salient_tokens",)}), prompt=prompt)
    )
    assert first.prompt is None
    assert first.messages is not None
    assert [message.content for message in first.messages] == ["hi"]
    assert (first.facts, first.principles, first.attention) == (("f",), ("q",), None)
    assert second.attention is not None
    assert second.attention.flags == ("no_salient_tokens",)


class Flaky:
    """Fails as infra, per item or altogether, until it has been asked often enough."""

    revision = "1"

    def __init__(self, failures: int, only: str = "", code: ErrorCode = ErrorCode.SOURCE_TIMEOUT) -> None:
        self.failures = failures
        self.only = only
        self.code = code
        self.asked: list[list[str]] = []

    async def score(self, items: Sequence[Item]) -> Sequence[Scored]:
        self.asked.append([item.id for item in items])
        down = len(self.asked) <= self.failures
        return [
            Scored(failed_component(self.code, "late"))
            if down and self.only in item.id
            else Scored(Component(status="ok", value=1.0))
            for item in items
        ]


def test_items_that_fail_as_infra_are_asked_for_again() -> None:
    ledger = MemoryLedger(group(sample(0), sample(1)))
    flaky = Flaky(1, only=":1")
    work(ledger, scorers={"attention": flaky})
    assert flaky.asked == [["0:p:0", "0:p:1"], ["0:p:1"]]
    (after,) = ledger.scored.values()
    assert [entry.reward and entry.reward.value for entry in after.samples] == [1.0, 1.0]


def test_an_item_that_stays_infra_fails_its_group_as_infra() -> None:
    ledger = MemoryLedger(group(sample(0), sample(1)))
    work(ledger, scorers={"attention": Flaky(99, only=":1")})
    ((_, failure, budget),) = ledger.failures
    assert (failure.kind, failure.code, budget) == ("infra", "source_timeout", FAST.infra_budget)


def test_a_batch_is_held_while_nobody_is_there_to_score() -> None:
    ledger = MemoryLedger(group(sample(0), sample(1)))
    flaky = Flaky(6, code=ErrorCode.SOURCE_DOWN)
    work(ledger, section=FAST.model_copy(update={"outage_s": 20.0, "retries": 0}), scorers={"attention": flaky})
    assert len(flaky.asked) == 7
    assert len(ledger.scored) == 1
    assert not ledger.failures


def test_time_without_groups_is_no_outage() -> None:
    async def go() -> None:
        server = RewardServer(RewardSection(), token="t", scorers={"attention": Flaky(99)})
        async with RewardClient(await server.start(), "t", 5, retries=0) as client:
            ledger = MemoryLedger(group(sample(0), sample(1)))
            worker = ScoringWorker(ledger, client, FAST, 2, consumer="w0")
            assert await worker.step() == 1
            assert await worker.step() == 0
            await asyncio.sleep(2 * FAST.outage_s)
            ledger.entries = [("1-0", group(sample(0), sample(1)))]
            assert await worker.step() == 1
        await server.stop()
        assert [failure.code for _, failure, _ in ledger.failures] == ["source_timeout"] * 2

    asyncio.run(go())


def test_a_source_that_stays_down_is_an_outage() -> None:
    ledger = MemoryLedger(group(sample(0), sample(1)))
    with pytest.raises(ScoringOutage, match=r"has scored nothing for .*last: .*late"):
        work(ledger, scorers={"attention": Flaky(99, code=ErrorCode.SOURCE_DOWN)})
    assert not ledger.scored
    assert not ledger.failures


class Mortal:
    """Dies of the items of one group, and is back after `away_s`."""

    revision = "1"

    def __init__(self, of: str, away_s: float) -> None:
        self.of = of
        self.away_s = away_s
        self.back = 0.0
        self.deaths = 0

    async def score(self, items: Sequence[Item]) -> Sequence[Scored]:
        if time.monotonic() < self.back:
            raise NoReplica("gone")
        if any(item.id.startswith(self.of) for item in items):
            self.back = time.monotonic() + self.away_s
            self.deaths += 1
            raise ReplicaLost("died")
        return [Scored(Component(status="ok", value=1.0))] * len(items)


def test_a_group_that_takes_the_model_down_spends_its_budget_and_is_not_tried_on_the_next() -> None:
    names = ("0:good", "0:bad", "0:next")
    ledger = MemoryLedger(*(group(*(sample(k, group_id=name) for k in range(2)), group_id=name) for name in names))
    mortal = Mortal("0:bad", 0.6)
    section = FAST.model_copy(update={"groups": 1, "retries": 2, "outage_s": 1.5})
    work(ledger, section=section, scorers={"attention": mortal})
    assert mortal.deaths == 1
    assert [entry.group_id for entry in ledger.scored.values()] == ["0:good", "0:next"]
    ((group_id, failure, budget),) = ledger.failures
    assert (group_id, failure.kind, failure.code, budget) == ("0:bad", "infra", "source_error", FAST.infra_budget)


def test_an_outage_ends_the_run_and_writes_nothing() -> None:
    ledger = MemoryLedger(group(sample(0), sample(1)))
    with pytest.raises(ScoringOutage, match=r"http://127.0.0.1:9 has scored nothing for .*last: .*127.0.0.1:9"):
        asyncio.run(step_against("http://127.0.0.1:9", ledger))
    assert not ledger.scored
    assert not ledger.failures


async def step_against(url: str, ledger: MemoryLedger) -> None:
    async with RewardClient(url, "t", 1, retries=0) as client:
        await ScoringWorker(ledger, client, FAST, 2, consumer="w0").step()


def test_a_server_that_comes_back_is_found() -> None:
    async def go() -> None:
        ledger = MemoryLedger(group(sample(0), sample(1)))
        first = RewardServer(RewardSection(), token="t")
        url = await first.start()
        await first.stop()
        section = FAST.model_copy(update={"outage_s": 20.0})
        async with RewardClient(url, "t", 1, retries=0) as client:
            step = asyncio.create_task(ScoringWorker(ledger, client, section, 2, consumer="w0").step())
            await asyncio.sleep(0.2)
            again = RewardServer(RewardSection(port=int(url.rsplit(":", 1)[1])), token="t")
            await again.start()
            assert await step == 1
            await again.stop()
        assert len(ledger.scored) == 1

    asyncio.run(go())


def test_a_client_that_is_replaced_is_closed_when_no_try_uses_it() -> None:
    async def go() -> None:
        let = asyncio.Event()
        first, second, third = Scripted(let), Scripted(let), Scripted(let)
        worker = ScoringWorker(MemoryLedger(group(sample(0), sample(1))), first, FAST, 2, consumer="w0")
        step = asyncio.create_task(worker.step())
        while not first.asked:
            await asyncio.sleep(0.01)
        await worker.use(second)
        await worker.use(third)
        assert [client.closed for client in (first, second, third)] == [False, True, False]
        let.set()
        assert await step == 1
        assert [client.closed for client in (first, second, third)] == [True, True, False]
        assert [client.asked for client in (first, second, third)] == [1, 0, 1]

    asyncio.run(go())


class Scripted(RewardClient):
    """Fails once it is let; says afterwards that all is scored with 1."""

    def __init__(self, let: asyncio.Event) -> None:
        super().__init__("http://127.0.0.1:9")
        self._let = let
        self.asked = 0
        self.closed = False

    async def score(self, items: Any, *_: Any, **__: Any) -> RewardResponse:
        assert not self.closed
        self.asked += 1
        if not self._let.is_set():
            await self._let.wait()
            raise RewardUnavailable("it is gone")
        results = tuple(Result(id=item.id, status="ok", reward=1.0, components={}, error=None) for item in items)
        return RewardResponse(
            results=results, server=ServerInfo(version="1", recipe_revision="1", sources={}, latency_ms=1.0)
        )

    async def close(self) -> None:
        self.closed = True
        await super().close()


def test_a_wrong_token_is_no_outage_but_a_refusal() -> None:
    with pytest.raises(ScoringRefused, match="401"):
        work(MemoryLedger(group(sample(0), sample(1))), token="wrong")


def test_a_request_that_is_too_large_is_split_and_an_item_that_is_fails() -> None:
    ledger = MemoryLedger(group(sample(0), sample(1), sample(2), sample(3, ids=tuple(range(5, 200)))))
    work(ledger, server=RewardSection(max_bytes=1024))
    (after,) = ledger.scored.values()
    codes = [entry.reward and entry.reward.error and entry.reward.error.code for entry in after.samples]
    assert codes == [None, None, None, "too_large"]


def test_stop_leaves_a_pause_and_the_groups_in_the_stream() -> None:
    async def go() -> None:
        ledger = MemoryLedger(group(sample(0), sample(1)))
        section = FAST.model_copy(update={"outage_s": 60.0, "backoff_s": 5.0})
        async with RewardClient("http://127.0.0.1:9", "t", 1, retries=0) as client:
            worker = ScoringWorker(ledger, client, section, 2, consumer="w0")
            running = asyncio.create_task(worker.run())
            await asyncio.sleep(0.1)
            worker.stop()
            await asyncio.wait_for(running, 1)
        assert not ledger.scored
        assert not ledger.failures

    asyncio.run(go())
