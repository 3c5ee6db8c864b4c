"""The reward server's benchmark: its load generator against a real server, its figures from loads that are known."""

import asyncio
import json
from collections.abc import Iterator

import pytest

from benchmarks.http_load import Answered, Generator, Load
from benchmarks.reward_server import max_error, overload, percentile, rate
from reward_server.config import RewardSection
from reward_server.serve import RewardServer

BODIES = [json.dumps({"items": [{"id": str(n), "response": "a " * n}]}).encode() for n in range(1, 5)]


@pytest.fixture(scope="module")
def generator() -> Iterator[Generator]:
    """Against a server that counts words, and holds two requests at a time."""
    source = {"kind": "length", "unit": "words", "target": 10, "bonus": 10.0}
    server = RewardServer(RewardSection.model_validate({"sources": {"s": source}, "max_requests": 2}), token=None)
    generator = Generator(asyncio.run(server.start()), "/v1/rewards", BODIES)
    yield generator
    generator.end()
    asyncio.run(server.stop())


def test_a_closed_loop_sends_every_body_and_keeps_to_its_clients(generator: Generator) -> None:
    load = generator.closed(2, 1, 6, wait_s=60)
    assert sorted(answer.index for answer in load.answers) == [0, 1, 1, 2, 2, 3]
    assert {answer.status for answer in load.answers} == {200}, "never more at once than the server holds"
    assert max_error(load.answers, [1.0, 2.0, 3.0, 4.0]) == 0
    assert max_error(load.answers, [1.0, 2.0, 3.0, 4.25]) == 0.25
    assert 0 < load.cpu_s < load.wall_s
    assert rate(load) < rate(load, cores=2) < rate(load, cores=1)


def test_an_open_loop_sends_on_time_whatever_is_answered(generator: Generator) -> None:
    load = generator.open(20.0, 0, 10, wait_s=60)
    assert len(load.answers) == 10
    assert max(answer.sent_s for answer in load.answers) >= 9 / 20
    crowd = generator.open(1e6, 0, 100, wait_s=60)  # all at once: the server refuses what it cannot hold
    assert {answer.status for answer in crowd.answers} == {200, 429}
    found = overload(crowd, 10.0, [1.0] * 6)
    assert found["overload_lost"] == 0
    assert found["overload_scored"] + found["overload_refused"] == found["overload_sent"] == 100


def answered(status: int, sent: float, done: float, retry_after: str | None = None) -> Answered:
    return Answered(0, status, sent, done, retry_after, b"")


def test_figures_of_an_overload() -> None:
    answers = (
        *(answered(200, second, second + 2.0) for second in range(9)),
        *(answered(429, second, second + 0.5, "1") for second in range(6)),
        answered(429, 0.0, 0.1),  # does not say when to come again
        answered(500, 0.0, 0.1),
        answered(0, 0.0, 0.1),
    )
    found = overload(Load(answers, 10.0, 0.0), 1.0, [5.0, 5.0, 10.0, 10.0, 11.0, 11.0])
    assert (found["overload_sent"], found["overload_scored"], found["overload_refused"]) == (18, 9, 6)
    assert found["overload_lost"] == 3
    assert found["goodput_kept"] == pytest.approx(0.9)  # 9 in the 10 s until the last of them
    assert found["memory_growth"] == pytest.approx(1.1)
    assert found["overload_p99_ms"] == pytest.approx(2000)
    assert found["overload_refusal_p99_ms"] == pytest.approx(500)


def test_a_wrong_answer_is_no_measurement() -> None:
    with pytest.raises(RuntimeError, match="1 of 2 requests were answered 503"):
        rate(Load((answered(200, 0, 1), answered(503, 0, 1)), 1.0, 0.0))
    failed = json.dumps({"results": [{"status": "failed", "reward": None, "error": {"code": "source_error"}}]})
    with pytest.raises(RuntimeError, match="an item failed: source_error"):
        max_error([Answered(0, 200, 0.0, 1.0, None, failed.encode())], [1.0])


def test_percentiles_are_of_requests_and_medians_of_rounds() -> None:
    rounds = [
        Load(tuple(answered(200, 0.0, factor * n / 100) for n in range(1, 101)), 1.0, 0.0) for factor in (1, 2, 9)
    ]
    assert percentile(rounds, 0.5) == pytest.approx(1000)
    assert percentile(rounds, 0.99) == pytest.approx(1980)
