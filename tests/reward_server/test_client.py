"""The client: deadlines of whole calls, one key for all tries, items asked again, without an event loop; and what other
trainers call."""

import asyncio
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import run_command
from reward_server import trainers
from reward_server.client import RewardClient, RewardRefused, RewardUnavailable, SyncRewardClient, pause_s
from reward_server.config import RewardSection
from reward_server.rewardbench import count_pairs
from reward_server.schema import Component, ErrorCode, Item, Result, failed_component
from reward_server.scorers.base import Scored
from reward_server.serve import RewardServer

SOURCES = {
    "words": {"kind": "length", "unit": "words", "target": 4, "bonus": 2.0},
    "match": {"kind": "exact_match", "required": False, "weight": 10.0},
}


class Flaky:
    """Fails items as infra by their id: `a2` the first two times that it is asked for."""

    revision = "1"

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    async def score(self, items: Sequence[Item]) -> Sequence[Scored]:
        self.asked.append([item.id for item in items])
        return [self._one(item.id) for item in items]

    def _one(self, item_id: str) -> Scored:
        if sum(item_id in ids for ids in self.asked) <= int(item_id[1:]):
            return Scored(failed_component(ErrorCode.SOURCE_TIMEOUT, f"{item_id} is late"))
        if item_id.startswith("d"):
            return Scored(failed_component(ErrorCode.MISSING_REFERENCE, "no reference"))
        return Scored(Component(status="ok", value=float(item_id[1:])))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = RewardServer(RewardSection.model_validate({"sources": SOURCES}), token="t")
    yield asyncio.run(server.start())
    asyncio.run(server.stop())


@pytest.fixture
def flaky() -> Iterator[tuple[str, Flaky]]:
    source = Flaky()
    server = RewardServer(RewardSection(), token="t", scorers={"attention": source})
    yield asyncio.run(server.start()), source
    asyncio.run(server.stop())


def ids(*names: str) -> list[Item]:
    return [Item(id=name) for name in names]


def test_only_items_that_failed_as_infra_are_asked_for_again(flaky: Any) -> None:
    url, source = flaky
    with SyncRewardClient(url, "t", backoff_s=0.01) as client:
        results = client.settled(ids("a0", "a2", "d0", "a1", "a0"), batch_items=4)
    assert [result.reward for result in results] == [0.0, 2.0, None, 1.0, 0.0]
    assert [result.id for result in results] == ["a0", "a2", "d0", "a1", "a0"]
    assert source.asked == [["a0", "a2", "d0", "a1"], ["a2", "a1"], ["a2"], ["a0"]]


def test_items_that_stay_infra_are_an_outage_and_never_a_number(flaky: Any) -> None:
    url, source = flaky
    with SyncRewardClient(url, "t", backoff_s=0.01, retries=2) as client:
        with pytest.raises(RewardUnavailable, match="failed to score 1 items: a9 is late"):
            client.settled(ids("a0", "a9"))
        assert len(source.asked) == 3
        started = time.monotonic()
        with (
            SyncRewardClient(url, "t", backoff_s=0.2, retries=50) as patient,
            pytest.raises(RewardUnavailable, match="a99 is late"),
        ):
            patient.settled(ids("a99"), deadline_s=0.5)
        assert time.monotonic() - started < 2


def test_a_deadline_holds_for_all_tries_together() -> None:
    async def go() -> None:
        async with RewardClient("http://127.0.0.1:9", "t", retries=100, backoff_s=0.1) as client:
            started = time.monotonic()
            with pytest.raises(RewardUnavailable, match=r"127\.0\.0\.1:9.*no further try within 0\.5 s"):
                await client.score([], deadline_s=0.5)
            assert time.monotonic() - started < 2

    asyncio.run(go())


def test_tries_carry_one_key_and_say_how_long_they_wait() -> None:
    """What is on the wire, of a server that answers 503 once."""
    seen: list[dict[str, str]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := (await reader.readuntil(b"\r\n\r\n")).decode():
            headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
            await reader.readexactly(int(headers["content-length"]))
            seen.append(headers)
            body = b"{}" if len(seen) < 2 else b'{"results": [], "server": {"version": "", "recipe_revision": "", "sources": {}, "latency_ms": 0}}'  # fmt: skip  # noqa: E501
            status = b"503 busy" if len(seen) < 2 else b"200 OK"
            writer.write(b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))
            if len(seen) == 3:
                return

    async def go() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with RewardClient(f"http://127.0.0.1:{port}", "t", timeout_s=7, backoff_s=0.01) as client:
            await client.score([])
            await client.score([], deadline_s=2)
        server.close()

    asyncio.run(go())
    first, second, third = seen
    assert first["idempotency-key"] == second["idempotency-key"] != third["idempotency-key"]
    assert first["x-request-id"] != second["x-request-id"]
    assert first["x-request-deadline-ms"] == "7000"
    assert 1000 < int(third["x-request-deadline-ms"]) <= 2000
    assert first["authorization"] == "bearer t"


def test_threads_share_a_client_that_needs_no_event_loop(url: str) -> None:
    with SyncRewardClient(url, "t") as client:
        assert client.ready()

        def score(count: int) -> float | None:
            return client.score([Item(id="a", response="w " * count)]).results[0].reward

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(score, [1, 2, 3, 4] * 10)) == [0.5, 1.0, 1.5, 2.0] * 10
        assert sum(thread.name == "reward-client" for thread in threading.enumerate()) == 1

        async def inside_a_loop() -> float | None:
            return score(2)

        assert asyncio.run(inside_a_loop()) == 1.0
    with SyncRewardClient(url, "wrong") as client, pytest.raises(RewardRefused, match="401"):
        client.score([])


def test_a_forked_process_has_connections_of_its_own(url: str) -> None:
    client = SyncRewardClient(url, "t")
    assert client.ready()
    child = os.fork()
    if child == 0:
        os._exit(0 if client.ready() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert client.ready()
    client.close()
    client.close()


# TRL


def test_trl_texts_and_chats_and_columns(url: str) -> None:
    with SyncRewardClient(url, "t") as client:
        reward = trainers.trl_reward(client, reference="solution", name="server")
        assert reward.__name__ == "server"
        texts = reward(
            prompts=["p", "q", "r"], completions=["a b", "Lima", " "], completion_ids=[[1], [2], [3]],
            solution=["x", "lima", "z"], trainer_state=object(), log_extra=None,
        )  # fmt: skip
        assert texts == [1.0, 10.5, None]  # the last is empty: TRL leaves it out
        chats = reward(
            prompts=[
                [{"role": "user", "content": "p"}],
                [{"role": "user", "content": [{"type": "text", "text": "q"}]}],
            ],
            completions=[[{"role": "assistant", "content": "a b c"}], [{"role": "assistant", "content": "7"}]],
            solution=["x", 7],
        )
        assert chats == [1.5, 10.5]
        assert trainers.trl_reward(client, sources=["words"])(prompts=["p"], completions=["a"]) == [0.5]


def test_trl_counts_tokens_without_the_end_of_sequence() -> None:
    async def go() -> list[float | None]:
        section = RewardSection.model_validate({"sources": {"tokens": {"kind": "length", "target": 4, "bonus": 4}}})
        server = RewardServer(section, token="t")
        url = await server.start()
        with SyncRewardClient(url, "t") as client:
            reward = trainers.trl_reward(client, eos_ids=[2])
            found = await asyncio.to_thread(
                reward, prompts=["p", "p"], completions=["a", "b"], completion_ids=[[5, 6, 2], [2]]
            )
        await server.stop()
        return found

    assert asyncio.run(go()) == [2.0, None]


def test_trl_gets_no_number_from_an_outage() -> None:
    with SyncRewardClient("http://127.0.0.1:9", "t", retries=1, backoff_s=0.01) as client:
        reward = trainers.trl_reward(client)
        with pytest.raises(RewardUnavailable):
            reward(prompts=["p"], completions=["a"])


# verl


def test_verl_compute_score(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTUNE_REWARD_URL", url)
    monkeypatch.setenv("ATTUNE_REWARD_TOKEN", "t")
    score = trainers.compute_score
    assert score(data_source="d", solution_str="Lima", ground_truth="lima", extra_info={"index": 3}) == 10.5
    chat = {"prompt": [{"role": "user", "content": "q"}], "facts": ["f"]}
    assert score("d", "a b", None, chat, reward_router_address=None) == 1.0
    with pytest.raises(trainers.RewardFailed, match="empty_response: the response is empty"):
        score("d", " ", "lima")
    monkeypatch.delenv("ATTUNE_REWARD_URL")
    with pytest.raises(RuntimeError, match="set ATTUNE_REWARD_URL"):
        score("d", "a", "a")


# RewardBench


def pair(chosen: str, rejected: str, **more: Any) -> str:
    return json.dumps({"prompt": "p", "chosen": chosen, "rejected": rejected, "id": 7, **more})


def test_rewardbench_by_subset(url: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = [{"role": "assistant", "content": "a b c"}]
    lines = [
        pair("a b", "a", subset="easy"),
        pair("a", "a b", subset="easy"),
        json.dumps({"prompt": [{"role": "user", "content": "p"}], "chosen": chat, "rejected": "a", "subset": "easy"}),
        "",
        pair("a b", "b a", subset="hard"),
        pair("a", " ", subset="hard"),
        pair("Lima", "a b c", reference="lima"),
    ]  # fmt: skip
    path, out = tmp_path / "pairs.jsonl", tmp_path / "figures.json"
    path.write_text("\n".join(lines))
    monkeypatch.setenv("ATTUNE_REWARD_TOKEN", "t")
    assert run_command(["rewardbench", str(path), "--url", url, "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert figures["subset/easy"] == {"pairs": 3, "scored": 3, "right": 2, "ties": 0, "failed": 0, "accuracy": 2 / 3}
    assert figures["subset/hard"] == {"pairs": 2, "scored": 1, "right": 0, "ties": 1, "failed": 1, "accuracy": 0.0}
    assert figures["subset/all"]["accuracy"] == 1.0
    assert figures["all"] == {"pairs": 6, "scored": 5, "right": 3, "ties": 1, "failed": 1, "accuracy": 0.6}
    table = capsys.readouterr().out
    assert "66.7 %" in table
    assert "all pairs" in table
    assert run_command(["rewardbench", str(path), "--url", url, "--source", "nonsense"]) == 2
    assert "unknown source" in capsys.readouterr().err
    path.write_text(lines[0] + '\n{"prompt": "p", "chosen": 3, "rejected": "r"}')
    assert run_command(["rewardbench", str(path), "--url", url]) == 2
    assert "pairs.jsonl:2: chosen" in capsys.readouterr().err


def test_a_subset_without_a_scored_pair_has_no_accuracy() -> None:
    failed = Result(id="a", status="failed", reward=None, components={}, error=failed_component(ErrorCode.MISSING_RESPONSE, "").error)  # noqa: E501  # fmt: skip
    figures = count_pairs(["s"], [failed, failed])
    assert figures.plain()["subset/s"]["accuracy"] is None


def test_a_server_is_given_the_pause_that_it_asks_for_within_reason() -> None:
    assert 60.0 <= pause_s(0, 0.2, 60.0) <= 72.0
    assert pause_s(0, 0.2, 1e9) <= 144.0
    assert all(0.1 <= pause_s(0, 0.2) <= 0.2 and 2.5 <= pause_s(30, 0.2) <= 5.0 for _ in range(20))
