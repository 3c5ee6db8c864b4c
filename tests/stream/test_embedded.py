"""The embedded server: data that survives a kill, a death with its parent, a directory of its own, a kept secret."""

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import redis

from services.errors import UserError
from services.stream.connect import connect
from services.stream.embedded import EmbeddedRedis, address_in
from services.stream.errors import StreamUnavailable

PARENT = """
import sys, time
from pathlib import Path
from services.stream.embedded import EmbeddedRedis
server = EmbeddedRedis(Path(sys.argv[1]))
server.start()
print(server.pid, server.url, flush=True)
time.sleep(60)
"""


def gone(pid: int, within_s: float = 5.0) -> bool:
    give_up = time.monotonic() + within_s
    while time.monotonic() < give_up:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def start_parent(directory: Path) -> tuple[subprocess.Popen[str], int, str]:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(directory)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, url = parent.stdout.readline().split()
    return parent, int(pid), url


def test_what_was_answered_survives_a_kill_of_the_server(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis", "always") as server:
        client = connect(server.url)
        for n in range(200):
            client.set(f"key{n}", n)
        os.kill(server.pid, signal.SIGKILL)
        assert gone(server.pid)
        assert not server.alive()
        url = server.url
        server.start()
        assert server.url == url  # the clients of a run know no other
        assert connect(url).dbsize() == 200


def test_it_ends_for_its_owner_alone(tmp_path: Path) -> None:
    """Who stops a run by signals to all its processes must not take the ledger from its last commit."""
    with EmbeddedRedis(tmp_path / "redis") as server:
        client = connect(server.url)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(server.pid, number)
        time.sleep(0.5)  # the server looks for signals 100 times a second
        assert server.alive()
        assert client.set("key", "value")
    assert gone(server.pid)
    with EmbeddedRedis(tmp_path / "redis") as server:
        assert connect(server.url).get("key") == b"value"


def test_data_stays_for_the_next_server_of_the_directory(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis") as first:
        connect(first.url).set("key", "value")
    with EmbeddedRedis(tmp_path / "redis") as second:
        assert connect(second.url).get("key") == b"value"
        assert second.url != first.url


def test_it_dies_with_a_parent_that_is_killed_and_the_directory_is_free_again(tmp_path: Path) -> None:
    parent, pid, _ = start_parent(tmp_path / "redis")
    try:
        os.kill(pid, signal.SIGSTOP)  # not even a server that cannot act may stay
    finally:
        parent.kill()
        parent.wait()
    assert gone(pid)
    with EmbeddedRedis(tmp_path / "redis") as server:
        assert connect(server.url).ping()


def test_it_outlives_the_thread_that_asked_for_it(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "redis")
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    try:
        time.sleep(0.2)
        assert server.alive()
        assert connect(server.url).ping()
    finally:
        server.stop()
    assert gone(server.pid)


def test_a_directory_in_use_is_refused_and_names_who_uses_it(tmp_path: Path) -> None:
    parent, pid, url = start_parent(tmp_path / "redis")
    try:
        with pytest.raises(UserError, match=f"in use: process {parent.pid} runs a redis-server .{pid}."):
            EmbeddedRedis(tmp_path / "redis").start()
        assert connect(url).ping()  # which is none the worse for it
    finally:
        parent.kill()
        parent.wait()


@pytest.mark.parametrize("seconds", [5.0, 60.0])
def test_a_lock_that_a_dead_server_left_is_waited_for(tmp_path: Path, seconds: float) -> None:
    """What a server forked to write its log anew holds its lock, and outlives it."""
    directory = tmp_path / "redis"
    directory.mkdir()
    hold = f"""
import fcntl, sys, time
lock = open({str(directory / "lock")!r}, "w")
lock.write("999999999 1")
lock.flush()
fcntl.flock(lock, fcntl.LOCK_EX)
print(flush=True)
time.sleep({seconds})
"""
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        try:
            if seconds < 10:
                with EmbeddedRedis(directory) as server:
                    assert connect(server.url).ping()
            else:
                with pytest.raises(UserError, match="lock is held by what an earlier one left"):
                    EmbeddedRedis(directory).start()
        finally:
            holder.kill()


def test_a_mark_that_a_power_cut_emptied_keeps_no_server_from_starting(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis"):
        pass
    (tmp_path / "redis" / "loading").write_text("")
    with EmbeddedRedis(tmp_path / "redis") as server:
        assert connect(server.url).ping()


def test_the_password_is_in_private_files_alone(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        password = server.url.split(":")[2].split("@")[0]
        assert len(password) >= 32
        assert password not in repr(server)
        assert password.encode() not in Path(f"/proc/{server.pid}/cmdline").read_bytes()
        assert password.encode() not in Path(f"/proc/{server.pid}/environ").read_bytes()
        holders = [path for path in server.directory.iterdir() if password.encode() in path.read_bytes()]
        assert {path.name for path in holders} == {"address.json"}
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in holders)
        with pytest.raises(StreamUnavailable) as refused:
            connect(server.url.replace(password, "wrong"), 1.0)
        assert "password" in str(refused.value)
        with pytest.raises(StreamUnavailable):
            connect(server.url.replace(f":{password}@", ""), 1.0)
    assert not [path for path in server.directory.iterdir() if password.encode() in path.read_bytes()]


def test_it_listens_on_loopback_keeps_a_log_and_never_evicts(server: EmbeddedRedis, client: redis.Redis) -> None:
    settings = {
        name: client.config_get(name)[name]
        for name in ("bind", "appendonly", "maxmemory-policy", "save", "appendfsync")
    }
    assert settings == {
        "bind": "127.0.0.1",
        "appendonly": "yes",
        "maxmemory-policy": "noeviction",
        "save": "",
        "appendfsync": "everysec",
    }
    assert address_in(server.directory) == server.url


def test_no_address_of_a_server_that_is_gone(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        os.kill(server.pid, signal.SIGKILL)
        assert gone(server.pid)
        assert address_in(server.directory) is None
    assert address_in(tmp_path / "nowhere") is None


def test_a_directory_that_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    directory = tmp_path / "redis"
    directory.mkdir()
    (directory / "appendonly.aof").write_bytes(b"this is no append-only file\r\n" * 10)
    with pytest.raises(UserError, match=r"does not start .*(?i:bad file format)"):
        EmbeddedRedis(directory).start()


def test_a_transaction_that_was_torn_from_the_log_is_never_carried_out_in_part(tmp_path: Path) -> None:
    """Redis 6.2 alone does so, at the start after the one that cut the log."""
    directory = tmp_path / "redis"
    with EmbeddedRedis(directory, "always") as server:
        client = connect(server.url)
        client.set("before", 1)
        with client.pipeline(transaction=True) as pipe:
            pipe.set("first", 1).set("second", 2).set("third", 3)
            pipe.execute()
        os.kill(server.pid, signal.SIGKILL)
        assert gone(server.pid)
    log = directory / "appendonly.aof"
    os.truncate(log, log.read_bytes().index(b"second") + 3)
    for start in range(3):
        with EmbeddedRedis(directory) as server:
            client = connect(server.url)
            assert client.mget("before", "first", "second", "third") == [b"1", None, None, None], start
            with client.pipeline(transaction=True) as pipe:
                pipe.set(f"later{start}", start)
                pipe.execute()
            assert client.dbsize() == 2 + start
            os.kill(server.pid, signal.SIGKILL)
            assert gone(server.pid)


def test_a_long_log_with_a_torn_end_is_mended_before_anybody_is_let_in(tmp_path: Path) -> None:
    """While Redis loads a log it answers INFO already: that is not a server to go on with."""
    directory = tmp_path / "redis"
    directory.mkdir()
    entry = b"*3\r\n$3\r\nSET\r\n$7\r\n%07d\r\n$1\r\n1\r\n"
    commands = 300_000
    log = directory / "appendonly.aof"
    log.write_bytes(b"".join(entry % n for n in range(commands)) + b"*1\r\n$5\r\nMULTI\r\n" + (entry % 0)[:-9])
    with EmbeddedRedis(directory) as server:
        client = connect(server.url)
        assert client.info("persistence")["loading"] == 0
        assert client.dbsize() == commands
        assert b"Background append only file rewriting started" in (directory / "redis.log").read_bytes()
        assert b"MULTI" not in log.read_bytes()[-40:]
        assert not (directory / "loading").exists()
