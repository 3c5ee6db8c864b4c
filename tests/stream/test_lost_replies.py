"""A call whose reply is lost is sent again: the same thing must not happen twice. And how long a call is tried."""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis

from services.errors import Deadline
from services.stream.connect import connect
from services.stream.embedded import EmbeddedRedis
from services.stream.errors import StreamFull, StreamLost
from services.stream.ledger import Ledger


@pytest.fixture
def lossy(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """From now on the first reply to every script (or other command) of a ledger gets lost on its way, after Redis has
    done it."""

    def make(ledger: Ledger, *commands: str) -> None:
        send = ledger._calls._execute
        lost: set[Any] = set()

        def execute(*args: Any) -> Any:
            reply = send(*args)
            if args[0] in (commands or ("EVALSHA", "EVAL")) and args[2:] not in lost:
                lost.add(args[2:])
                raise redis.ConnectionError("the line was cut")
            return reply

        monkeypatch.setattr(ledger._calls, "_execute", execute)

    return make


def test_nothing_happens_twice(desk: Any, lossy: Callable[..., None]) -> None:
    ledger: Ledger = desk.ledger
    lossy(ledger)
    ids = desk.fill(4)
    assert [lease.group_id for lease in desk.generate(3)] == ids[:3]  # no lease is given away twice, no answer is late
    assert ledger.fail(ids[3], desk.lease().attempt, desk.DATA, 1) == "pending"
    assert ledger.fail(ids[3], desk.lease().attempt, desk.DATA, 1) == "failed"
    assert desk.score() == ids[:3]
    assert ledger.take(0, 3) == ids[:3]
    ledger.commit({0: ids[:3]})
    assert ledger.counts()["committed"] == 3
    assert ledger.counters() == {"failures_data": 2}


@pytest.mark.parametrize("command", ["XREADGROUP", "XAUTOCLAIM"])
def test_what_a_lost_reply_gave_to_a_scorer_is_read_next(desk: Any, lossy: Callable[..., None], command: str) -> None:
    """It is the scorer's by then, and nobody else's for as long as a dead one's is."""
    ledger: Ledger = desk.ledger
    ids = desk.fill(3)
    desk.generate(2)
    idle_ms = 3_600_000
    assert ledger.read_generated("scorer", 9, 1, idle_ms) != []
    desk.score()
    desk.generate(1)
    if command == "XAUTOCLAIM":
        assert len(ledger.read_generated("dies", 9, 1, idle_ms)) == 1
        idle_ms = 1_000
        time.sleep(1.1)
    lossy(ledger, command)
    assert ledger.read_generated("scorer", 9, 1, idle_ms) == []
    assert [group.group_id for _, group in ledger.read_generated("scorer", 9, 1, idle_ms)] == ids[2:]


def test_a_restart_of_redis_is_waited_out(tmp_path: Path, new_desk: Any) -> None:
    with EmbeddedRedis(tmp_path / "redis", "always") as server:
        desk = new_desk(Ledger(connect(server.url), "run", patience_s=20))
        ids = desk.fill(3)
        desk.make_scored(2)
        for restart in range(2):
            server._server.kill()  # pyright: ignore[reportOptionalMemberAccess]
            server._server.wait()  # pyright: ignore[reportOptionalMemberAccess]
            server.start()
            assert desk.ledger.counts()["scored"] == 2, restart  # the connection and the scripts are made again
        desk.make_scored(1)
        assert desk.ledger.take(0, 3) == ids
        assert [group.group_id for group in desk.ledger.fetch(ids)] == ids


def dead_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def test_a_redis_that_is_no_master_for_a_moment_is_waited_out(tmp_path: Path, new_desk: Any) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        operator, client = connect(server.url), connect(server.url)
        desk = new_desk(Ledger(client, "run", patience_s=20))
        desk.fill(3)
        desk.make_scored(1)
        connections = {entry["id"] for entry in operator.client_list()}
        operator.execute_command("REPLICAOF", "127.0.0.1", dead_port())
        promoting = threading.Timer(0.5, operator.execute_command, ["REPLICAOF", "NO", "ONE"])
        promoting.start()
        began = time.monotonic()
        desk.make_scored(1)  # scripts, and reads of the stream
        assert time.monotonic() - began > 0.4
        promoting.join()
        assert desk.ledger.counts()["scored"] == 2
        # By new connections, as the name may stand for another server by now.
        own = operator.client_id()
        assert {entry["id"] for entry in operator.client_list()} & connections == {str(own)}
        # A replica that has no master to follow, and may not answer with what it has.
        operator.config_set("replica-serve-stale-data", "no")
        operator.execute_command("REPLICAOF", "127.0.0.1", dead_port())
        promoting = threading.Timer(0.5, operator.execute_command, ["REPLICAOF", "NO", "ONE"])
        promoting.start()
        assert desk.ledger.counts()["scored"] == 2
        promoting.join()
        hasty = Ledger(client, "run", patience_s=0.3)
        operator.config_set("replica-serve-stale-data", "yes")
        operator.execute_command("REPLICAOF", "127.0.0.1", dead_port())
        with pytest.raises(StreamLost, match=r"the ledger's lease: .*read only replica"):
            hasty.lease("a", desk.V0, 60)


@pytest.mark.parametrize("call", ["script", "command", "reads"])
def test_a_redis_that_runs_a_long_script_is_waited_out(tmp_path: Path, new_desk: Any, call: str) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        operator, client = connect(server.url), connect(server.url)
        desk = new_desk(Ledger(client, "run", patience_s=20))
        desk.fill(3)
        operator.config_set("lua-time-limit", 20)
        running = threading.Thread(target=run_for_ever, args=(server.url,))
        running.start()
        end = time.monotonic() + 10
        while not is_busy(operator):
            assert time.monotonic() < end
            time.sleep(0.02)
        killing = threading.Timer(0.3, operator.execute_command, ["SCRIPT", "KILL"])
        killing.start()
        if call == "script":
            assert desk.lease().group_id == "0:p0"
        elif call == "command":
            assert desk.ledger.missing_payload(3) == []
        else:
            assert desk.ledger.counts()["pending"] == 3
        killing.join()
        running.join()


def run_for_ever(url: str) -> None:
    with suppress(redis.ResponseError):  # it is killed
        connect(url).eval("while true do end", 0)


def is_busy(client: redis.Redis) -> bool:
    try:
        client.ping()
    except redis.ResponseError as error:
        return str(error).startswith("BUSY ")
    return False


def test_patience_ends_with_who_did_not_answer(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "redis")
    server.start()
    port = server.url.rpartition(":")[2].split("/")[0]
    client = connect(server.url, socket_timeout_s=0.3)
    ledger = Ledger(client, "run", patience_s=1)
    server._server.send_signal(19)  # pyright: ignore[reportOptionalMemberAccess] - SIGSTOP: there, but silent
    began = time.monotonic()
    try:
        with pytest.raises(StreamLost, match=rf"redis at 127.0.0.1:{port} .* did not answer") as lost:
            ledger.counts()
    finally:
        server._server.send_signal(18)  # pyright: ignore[reportOptionalMemberAccess]
    assert time.monotonic() - began < 3
    assert isinstance(lost.value, Deadline)
    assert ledger.counts()["pending"] == 0
    password = server.url.split(":")[2].split("@")[0]
    server.stop()
    with pytest.raises(StreamLost) as gone:
        ledger.register(0, [("0:p0", 0)])
    assert "the ledger's register" in str(gone.value)
    assert password not in str(gone.value) + str(lost.value)


def test_a_full_redis_refuses_whole_calls(tmp_path: Path, new_desk: Any) -> None:
    with EmbeddedRedis(tmp_path / "redis", maxmemory_mb=16) as server:
        client = connect(server.url)
        desk = new_desk(Ledger(client, "run"))
        desk.fill(3)
        first, second = desk.lease(), desk.lease()
        assert desk.ledger.read_generated("scorer", 9, 1, 60_000) == []
        assert desk.ledger.put_generated(desk.group_of(first))
        client.config_set("maxmemory", "1")
        before = desk.ledger.counts()
        with pytest.raises(StreamFull, match=r"127\.0\.0\.1"):
            desk.ledger.put_generated(desk.group_of(second))
        assert desk.ledger.counts() == before
        # What frees as much as it takes goes through, so that a full server can be worked off.
        desk.score()
        assert desk.ledger.counts()["scored"] == 1
        client.config_set("maxmemory", "0")
        assert desk.ledger.put_generated(desk.group_of(second))


def test_a_client_without_a_timeout_is_refused(server: EmbeddedRedis) -> None:
    with pytest.raises(ValueError, match="no socket timeout"):
        Ledger(redis.Redis.from_url(server.url, socket_timeout=None), "run")
