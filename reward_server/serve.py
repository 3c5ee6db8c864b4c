"""Launchers of the app: uvicorn in a thread of its own (`RewardServer`, for a Ray actor or a test), and in the
foreground until a signal (`run`, the command `attune reward-server`). The app is the same.

Invariant: without a token or keys the service is bound to loopback only.
"""

import asyncio
import errno
import ipaddress
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from reward_server.app import create_app
from reward_server.config import RewardSection
from reward_server.connections import with_header_deadline
from reward_server.logs import configure
from reward_server.metrics import Metrics
from reward_server.model_process import model_processes
from reward_server.replicas import ReplicaRunner
from reward_server.scorers.base import Scorer
from services.errors import Deadline, UserError

log = logging.getLogger(__name__)

START_S = 30.0
STOP_S = 10.0
"""Seconds to stop, beyond the draining."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what is bound to `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is a free one. Raises UserError where the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"reward.host: {host} is no address of this machine ({error.strerror})") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"reward.port: port {port} on {host} is in use by another process; give a free one, or 0 for any"
            ) from error
        raise UserError(f"cannot listen on {host}, port {port}: {error.strerror}") from error
    return listener


def check_guarded(section: RewardSection, token: str | None, host: str) -> None:
    """Raises UserError where others could reach a service that asks nobody for a key."""
    if token is None and section.keys_file is None and not is_loopback(host):
        raise UserError(
            f"reward.host: {host} can be reached from other machines, which needs a token: "
            f"set {section.token_env} or reward.keys_file, or bind to 127.0.0.1"
        )


def url_of(host: str, listener: socket.socket) -> str:
    """Where a client on this machine, or on another where `host` is its address, finds the service."""
    port = listener.getsockname()[1]
    if host in ("0.0.0.0", "::", ""):  # noqa: S104 - compared, not bound
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class RewardServer:
    """The service on a socket of its own, in a thread with its own event loop, so that its host's loop stays free.

    A plain class: a run wraps it in a Ray actor. `section` is a `RewardSection` or its plain values.
    """

    def __init__(
        self,
        section: RewardSection | Mapping[str, Any],
        *,
        token: str | None,
        host: str | None = None,
        port: int | None = None,
        scorers: Mapping[str, Scorer] | None = None,
        runners: Callable[[], Mapping[str, ReplicaRunner]] | None = None,
    ) -> None:
        """`host` and `port` default to the section's. `runners` gives the models, when it starts; they are closed when
        it ends. None: children of this process. Raises UserError for an open address without a token."""
        self.section = section if isinstance(section, RewardSection) else RewardSection.model_validate(section)
        self._host = self.section.host if host is None else host
        self._port = self.section.port if port is None else port
        check_guarded(self.section, token, self._host)
        self._token = token
        self._scorers = scorers
        self._runners = runners or (lambda: model_processes(self.section, without=scorers or ()))
        self._running: Mapping[str, ReplicaRunner] = {}
        self._metrics = Metrics()
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._url: str | None = None

    @property
    def url(self) -> str:
        """`http://host:port`, once started."""
        if self._url is None:
            raise RuntimeError("the reward server has not been started")
        return self._url

    async def start(self) -> str:
        """Binds, serves, and returns the URL. Raises UserError where the port is in use, Deadline where it hangs."""
        if self._thread is not None:
            raise RuntimeError("the reward server is running already")
        listener = bind(self._host, self._port)
        try:
            # Models are loaded here, or waited for: the host's loop is not held up meanwhile.
            app = await asyncio.to_thread(self._app)
        except BaseException:
            listener.close()
            self._close_models()
            raise
        config = uvicorn.Config(
            app,
            http=with_header_deadline(AutoHTTPProtocol, self.section.body_timeout_s),
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=self.section.drain_s,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="reward-server", daemon=True)
        self._server, self._thread = server, thread
        thread.start()
        deadline = time.monotonic() + START_S
        while not server.started:
            if not thread.is_alive():
                self._thread = None
                self._close_models()
                raise RuntimeError("the reward server ended while it was starting; its log says why")
            if time.monotonic() > deadline:
                raise Deadline(waited_for="the reward server to start", who="uvicorn", seconds=START_S)
            await asyncio.sleep(0.005)
        self._url = url_of(self._host, listener)
        return self._url

    def _app(self) -> FastAPI:
        self._running = self._runners()
        self._metrics = Metrics()
        return create_app(
            self.section, token=self._token, scorers=self._scorers, runners=self._running, metrics=self._metrics
        )

    def _close_models(self) -> None:
        for runner in self._running.values():
            runner.close()
        self._running = {}

    async def stop(self) -> None:
        """Takes no more requests, lets those under way finish, and ends. Does nothing where nothing runs."""
        server, thread = self._server, self._thread
        if server is None or thread is None:
            return
        server.should_exit = True
        seconds = self.section.drain_s + STOP_S
        await asyncio.to_thread(thread.join, seconds)
        if thread.is_alive():
            raise Deadline(waited_for="the reward server to stop", who="uvicorn", seconds=seconds)
        await asyncio.to_thread(self._close_models)
        self._server, self._thread, self._url = None, None, None

    def busy_s(self) -> dict[str, float]:
        """Seconds so far: `server`, with any request being scored; `model/SOURCE`, of the batches of a source's model,
        those of several replicas added up."""
        models = {f"model/{name}": busy.work_s() for name, busy in self._metrics.busy_models.items()}
        return {"server": self._metrics.busy_scoring.busy_s(), **models}

    def alive(self) -> bool:
        """Whether the serving thread runs."""
        return self._thread is not None and self._thread.is_alive()


def run(
    section: RewardSection,
    *,
    host: str | None = None,
    port: int = 8077,
    say: Callable[[str], None] = print,
) -> None:
    """Serves in the foreground until SIGTERM or SIGINT, then drains. The token comes from the environment. Logs
    are JSON lines on standard error.

    `say` gets the line that names the URL. Main thread only. Raises UserError.
    """
    token = section.token()
    server = RewardServer(section, token=token, host=host, port=port)
    ended = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    configure(section.log_level)
    # While models load nothing is served: a signal ends this process at once, and they end with it.
    previous = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        url = asyncio.run(server.start())
        for number in previous:
            signal.signal(number, end)
        guards = [f"bearer token of {section.token_env}"] if token else []
        if section.keys_file is not None:
            guards.append(f"keys of {section.keys_file}")
        guard = " and ".join(guards) or "no token: loopback only"
        say(f"reward server on {url} ({', '.join(section.sources)}; {guard})")
        while not ended.wait(0.5):
            if not server.alive():
                raise RuntimeError("the reward server's thread ended; its log says why")
        asyncio.run(server.stop())
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
