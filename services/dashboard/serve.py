"""`attune dashboard`: the run page under uvicorn, on loopback unless told otherwise, always with a token."""

import ipaddress
import os
import secrets
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from services.dashboard.app import Runs, create_app
from services.dashboard.cache import sweep
from services.errors import UserError

TOKEN_VARIABLE = "ATTUNE_DASHBOARD_TOKEN"  # noqa: S105 - the variable's name
LEAST_TOKEN = 16
NICENESS = 10
"""The run comes first: where both want a core, the page waits."""
GRACE_S = 2


def serve(
    root: Path, *, host: str = "127.0.0.1", port: int = 0, expose: bool = False, allowed: Sequence[str] = ()
) -> None:
    """Serves until it is interrupted, and prints the address with the token.

    Raises:
        UserError: no such directory; an address that others can reach, without `expose`; a port that is taken.
    """
    if not is_loopback(host) and not expose:
        raise UserError(
            f"--host {host}: others can reach this address, and the page shows prompts and responses over plain HTTP; "
            "use an SSH tunnel to 127.0.0.1, or say --expose"
        )
    token = os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(24)
    if len(token) < LEAST_TOKEN:
        raise UserError(f"{TOKEN_VARIABLE} has {len(token)} characters; a token has at least {LEAST_TOKEN}")
    runs = Runs(root)
    sweep()
    listener = bound(host, port)
    shown = f"[{host}]" if ":" in host else host
    app = create_app(runs, token=token, hosts=["127.0.0.1", "localhost", "[::1]", shown, *allowed])
    os.nice(NICENESS)
    sys.stdout.write(f"The run page of {root}: http://{shown}:{listener.getsockname()[1]}/#token={token}\n")
    sys.stdout.flush()
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GRACE_S,
        server_header=False,
        lifespan="off",
    )
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, _done)
    try:
        Server(config, runs).run(sockets=[listener])
    finally:
        runs.close()


class Server(uvicorn.Server):
    """Ends its streams when it is asked to end: it would wait for them otherwise."""

    def __init__(self, config: uvicorn.Config, runs: Runs) -> None:
        super().__init__(config)
        self._runs = runs

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._runs.end()
        super().handle_exit(sig, frame)


def _done(_sign: int, _frame: FrameType | None) -> None:
    """uvicorn raises the signal again when it has ended: an end that was asked for is no failure."""
    raise SystemExit(0)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bound(host: str, port: int) -> socket.socket:
    """Raises UserError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise UserError(f"--host {host} --port {port}: {error.strerror}") from error
    return listener
