"""The embedded server under a keeper: killed, deaf, with a damaged log, and once too often."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.stream.connect import connect
from services.stream.embedded import EmbeddedRedis
from services.stream.errors import StreamLost, StreamUnavailable
from services.stream.keeper import KeptRedis
from services.stream.ledger import Ledger


class Events:
    def __init__(self) -> None:
        self.rows: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, kind: str, **fields: Any) -> None:
        self.rows.append((kind, fields))

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.rows]


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_killed_server_is_back_with_its_data_while_its_clients_wait(tmp_path: Path, new_desk: Any) -> None:
    events = Events()
    with KeptRedis(EmbeddedRedis(tmp_path / "redis", "always"), restarts=3, told=events) as kept:
        desk = new_desk(Ledger(connect(kept.server.url), "run", patience_s=10))
        ids = desk.fill(6)
        for n in range(3):
            desk.make_scored(2)
            os.kill(kept.server.pid, signal.SIGKILL)
            assert desk.ledger.take(n, 2) == ids[2 * n : 2 * n + 2]  # at once: the call waits for the server
            # A server that answers may still be in the middle of its start, and a death there is not a second one.
            until(lambda n=n: len(events.rows) == n + 1, 30)
        kept.check()
    assert events.kinds() == ["redis_restarted"] * 3
    assert [fields["deaths"] for _, fields in events.rows] == [1, 2, 3]
    assert all(fields["seconds"] < 5 for _, fields in events.rows)
    assert not kept.server.alive()


def test_a_deaf_server_is_killed_and_started_again(tmp_path: Path) -> None:
    events = Events()
    server = EmbeddedRedis(tmp_path / "redis", "always")
    with KeptRedis(server, restarts=3, told=events, deaf_s=1.5) as kept:
        client = connect(kept.server.url)
        client.set("key", "value")
        before = kept.server.pid
        os.kill(before, signal.SIGSTOP)
        until(lambda: events.kinds() == ["redis_restarted"], 20)
        assert "did not answer" in events.rows[0][1]["why"]
        assert kept.server.pid != before
        assert connect(kept.server.url).get("key") == b"value"


def test_more_deaths_than_allowed_are_said_and_the_clients_do_not_hang(tmp_path: Path) -> None:
    events = Events()
    with KeptRedis(EmbeddedRedis(tmp_path / "redis"), restarts=1, told=events) as kept:
        ledger = Ledger(connect(kept.server.url), "run", patience_s=1)
        for said in ("redis_restarted", "redis_given_up"):
            kept.check()
            os.kill(kept.server.pid, signal.SIGKILL)
            until(lambda said=said: said in events.kinds())
        with pytest.raises(StreamUnavailable, match=r"died 2 times within 600 s.*stream\.restarts allows 1"):
            kept.check()
        with pytest.raises(StreamLost):
            ledger.counts()
    assert events.kinds() == ["redis_restarted", "redis_given_up"]


def test_a_log_that_cannot_be_loaded_is_set_aside_and_said(tmp_path: Path) -> None:
    events = Events()
    with EmbeddedRedis(tmp_path / "redis") as first:
        client = connect(first.url)
        for n in range(100):
            client.set(f"key{n}", n)
    log = tmp_path / "redis" / "appendonly.aof"
    whole = log.read_bytes()
    log.write_bytes(whole[:500] + b"\x00" * 40 + whole[540:])  # in its middle: the end alone would be cut off
    with KeptRedis(EmbeddedRedis(tmp_path / "redis"), restarts=1, told=events) as kept:
        assert connect(kept.server.url).dbsize() == 0
    ((kind, fields),) = events.rows
    assert kind == "redis_log_damaged"
    assert "ad file format" in fields["error"]
    assert len(Path(fields["kept_as"]).read_bytes()) == len(whole)


def flip(log: bytes) -> bytes:
    at = log.index(b"value of key50") + 3
    return log[:at] + bytes([log[at] ^ 1]) + log[at + 1 :]


def of_no_type(log: bytes) -> bytes:
    at = log.index(b"\x05key50") - 1
    return log[:at] + b"\xc3" + log[at + 1 :]


def of_another_version(log: bytes) -> bytes:
    return b"REDIS9009" + log[9:]


def cut(log: bytes) -> bytes:
    return log[: log.index(b"key50")]


@pytest.mark.parametrize("damage", [flip, of_no_type, of_another_version, cut])
def test_damage_in_what_the_server_wrote_anew_is_set_aside_too(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    """Most of a log that was rewritten is in another format, about which the server says other things."""
    events, log = Events(), tmp_path / "redis" / "appendonly.aof"
    with EmbeddedRedis(tmp_path / "redis") as first:
        client = connect(first.url)
        for n in range(10, 100):
            client.set(f"key{n}", f"value of key{n}")
        client.bgrewriteaof()
        until(lambda: log.read_bytes().startswith(b"REDIS"))
    damaged = damage(log.read_bytes())
    log.write_bytes(damaged)
    with KeptRedis(EmbeddedRedis(tmp_path / "redis"), restarts=1, told=events) as kept:
        assert connect(kept.server.url).dbsize() == 0
    ((kind, fields),) = events.rows
    assert kind == "redis_log_damaged"
    assert Path(fields["kept_as"]).read_bytes() == damaged


def test_a_torn_log_is_not_used_where_a_server_died_while_it_mended_it(tmp_path: Path) -> None:
    events, directory = Events(), tmp_path / "redis"
    with EmbeddedRedis(directory, "always") as first:
        connect(first.url).set("key", "value")
    os.truncate(directory / "appendonly.aof", (directory / "appendonly.aof").stat().st_size - 3)
    with EmbeddedRedis(directory):  # says that it was torn, and mends it
        pass
    (directory / "loading").write_text("0")  # as if it had been killed before that was done
    with KeptRedis(EmbeddedRedis(directory), restarts=1, told=events) as kept:
        assert connect(kept.server.url).dbsize() == 0
    ((kind, fields),) = events.rows
    assert kind == "redis_log_damaged"
    assert "part of a transaction" in fields["error"]
    assert Path(fields["kept_as"]).exists()
    with KeptRedis(EmbeddedRedis(directory), restarts=1, told=events):
        pass
    assert len(events.rows) == 1


def test_what_is_no_damage_is_not_set_aside(tmp_path: Path) -> None:
    with KeptRedis(EmbeddedRedis(tmp_path / "redis"), restarts=1, told=Events()) as kept:
        connect(kept.server.url).set("key", "value")
        assert kept.server.set_log_aside() is None
    assert (tmp_path / "redis" / "appendonly.aof").exists()


def test_a_keeper_that_cannot_write_what_happened_says_so(tmp_path: Path) -> None:
    """A full disk: its thread must not end in silence, with nobody left to start the server again."""

    def told(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with KeptRedis(EmbeddedRedis(tmp_path / "redis"), restarts=3, told=told) as kept:
        kept.check()
        os.kill(kept.server.pid, signal.SIGKILL)
        until(lambda: not kept._thread.is_alive(), 30)
        with pytest.raises(StreamUnavailable, match="No space left on device"):
            kept.check()
