"""A Redis that answers and cannot serve: waited for where that passes, and else said for what it is."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from services.stream.connect import connect
from services.stream.embedded import EmbeddedRedis
from services.stream.errors import StreamFull, StreamLost
from services.stream.ledger import Ledger

NOWHERE = ("REPLICAOF", "127.0.0.1", "1")


@pytest.fixture
def own(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path / "redis") as server:
        yield server


def after(seconds: float, call: Callable[[], Any]) -> threading.Timer:
    timer = threading.Timer(seconds, call)
    timer.start()
    return timer


@pytest.mark.parametrize("reader", ["scorer", "driver"])
def test_who_is_blocked_in_a_read_when_the_master_steps_down_waits_for_the_next_one(
    own: EmbeddedRedis, new_desk: Any, reader: str
) -> None:
    """An orderly failover: Redis tells all who are blocked that its role has changed, and hangs up."""
    desk, admin = new_desk(Ledger(connect(own.url), "run", patience_s=20)), connect(own.url)
    desk.fill(2)
    found: list[Any] = []
    readers: dict[str, Callable[[], Any]] = {
        "scorer": lambda: Ledger(connect(own.url), "run").read_generated("scorer", 1, 2000, 60_000),
        "driver": lambda: Ledger(connect(own.url), "run").wait_scored(2000),
    }

    def read() -> None:
        while not found or not found[-1]:
            found.append(readers[reader]())

    blocked = threading.Thread(target=read, daemon=True)
    blocked.start()
    while not admin.info("clients")["blocked_clients"]:
        time.sleep(0.01)
    admin.execute_command(*NOWHERE)
    back = after(0.5, lambda: admin.execute_command("REPLICAOF", "NO", "ONE"))
    desk.generate(1)  # waits, too
    back.join()
    if reader == "driver":
        desk.score()
    blocked.join(10)
    assert found
    assert found[-1]


@pytest.mark.parametrize("patience_s", [20.0, 0.3])
def test_too_few_replicas_to_write_are_waited_for(own: EmbeddedRedis, patience_s: float) -> None:
    ledger, admin = Ledger(connect(own.url), "run", patience_s=patience_s), connect(own.url)
    admin.config_set("min-replicas-to-write", "1")
    back = after(1.0, lambda: admin.config_set("min-replicas-to-write", "0"))
    if patience_s < 1:
        with pytest.raises(StreamLost, match="NOREPLICAS"):
            ledger.claim()
    else:
        ledger.claim()
        assert ledger.look()[1]
    back.join()


def test_a_disk_that_redis_cannot_write_to_is_a_stream_that_is_full(own: EmbeddedRedis) -> None:
    """From within a script it says so in other words than to a command."""
    ledger, admin = Ledger(connect(own.url), "run"), connect(own.url)
    ledger.claim()
    (own.directory / "dump.rdb").mkdir()  # no snapshot can take its place
    admin.config_set("save", "3600 1")
    admin.bgsave()
    while admin.info("persistence")["rdb_last_bgsave_status"] != "err":
        time.sleep(0.01)
    with pytest.raises(redis.ResponseError, match=r"^MISCONF"):
        admin.set("key", "value")
    for write in (lambda: ledger.register(0, [("0:a", 0)]), ledger.forget):
        with pytest.raises(StreamFull, match="MISCONF"):
            write()
