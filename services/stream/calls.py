"""One way to call Redis: a timeout on every call, a bound in seconds on trying again, errors by what to do about them.

A call whose reply was lost is sent again although it may have been carried out; the ledger's scripts recognise that by
the token that each call carries. A server that has forgotten the scripts (it restarted) is given them again. One that
answers but cannot serve just now (it loads, runs a long script, is no longer the master, lacks replicas) is waited for
as if it were silent.
"""

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib import resources
from typing import Any, TypeVar, cast

import redis
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    ClusterDownError,
    ConnectionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TimeoutError,
)

from services.stream.errors import LedgerError, LedgerForgetting, LedgerLost, StreamFull, StreamLost, StreamUnavailable

T = TypeVar("T")
Argument = str | int | float | bytes

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0


@cache
def script_text(name: str) -> str:
    """The source of a script: the shared functions, then its own file."""
    files = resources.files("services.stream").joinpath("scripts")
    return files.joinpath("common.lua").read_text("utf-8") + files.joinpath(f"{name}.lua").read_text("utf-8")


@cache
def _script_sha(name: str) -> str:
    return hashlib.sha1(script_text(name).encode(), usedforsecurity=False).hexdigest()


class Calls:
    """Commands and scripts on one client, tried again for `patience_s` seconds while nobody answers."""

    def __init__(self, client: redis.Redis, patience_s: float) -> None:
        self._client = client
        self._patience_s = patience_s
        options = client.connection_pool.connection_kwargs
        self.where = f"redis at {options.get('host', 'localhost')}:{options.get('port', 6379)}"
        timeout = options.get("socket_timeout")
        if not timeout:
            raise ValueError("the Redis client has no socket timeout; make it with services.stream.connect")
        self.longest_block_ms = int(timeout * 500)
        """A blocking read must end well before its socket's timeout."""

    def command(self, *args: Argument) -> Any:
        return self._patiently(str(args[0]), lambda: self._execute(*args))

    def script(self, name: str, prefix: str, *args: Argument, wait_out: tuple[type[Exception], ...] = ()) -> Any:
        """The reply of a script. Refusals of the kinds in `wait_out` are waited out as silence is."""

        def call() -> Any:
            try:
                return self._execute("EVALSHA", _script_sha(name), 1, prefix, *args)
            except NoScriptError:
                return self._execute("EVAL", script_text(name), 1, prefix, *args)

        return self._patiently(f"the ledger's {name}", call, wait_out)

    def commands(self, all_args: Sequence[Sequence[Argument]], *, at_once: bool = False) -> list[Any]:
        """Several commands that only read, in one round trip; with `at_once`, nothing comes between them."""

        def call() -> list[Any]:
            with self._client.pipeline(transaction=at_once) as pipe:  # pyright: ignore[reportUnknownMemberType]
                for args in all_args:
                    pipe.execute_command(*args)  # pyright: ignore[reportUnknownMemberType]
                return pipe.execute()

        return self._patiently(f"{len(all_args)} reads", call) if all_args else []

    def _execute(self, *args: Argument) -> Any:
        return cast(Any, self._client.execute_command(*args))  # pyright: ignore[reportUnknownMemberType]

    def _patiently(self, what: str, call: Callable[[], T], wait_out: tuple[type[Exception], ...] = ()) -> T:
        started = time.monotonic()
        pause = _FIRST_PAUSE_S
        while True:
            try:
                return call()
            except (AuthenticationError, AuthorizationError) as error:
                raise StreamUnavailable(f"{self.where} refuses the password or user: {error}") from None
            except (ConnectionError, TimeoutError) as error:
                why = error
            except OutOfMemoryError as error:
                raise StreamFull(f"{self.where} is out of memory: {error}") from error
            except ResponseError as error:
                why = _translated(error, self.where)
                if _is_demoted(error):
                    # Another is the master now: new connections look its name up anew. Those in use hear it themselves.
                    self._client.connection_pool.disconnect(inuse_connections=False)
                elif not (
                    isinstance(error, ClusterDownError)
                    or _says(error, "BUSY", "NOREPLICAS")
                    or isinstance(why, wait_out)
                ):
                    raise why from error
            waited = time.monotonic() - started
            if waited + pause > self._patience_s:
                raise StreamLost(waited_for=what, who=f"{self.where} ({why})", seconds=waited) from why
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


def _is_demoted(error: ResponseError) -> bool:
    # Who was blocked in a read when it happened is told so.
    return isinstance(error, ReadOnlyError) or _says(error, "READONLY", "UNBLOCKED")


def _says(error: ResponseError, *codes: str) -> bool:
    """Before the code stands, in a pipeline, the command; from within a script of Redis 6, where it was called."""
    return re.search(rf"(^|: -?)({'|'.join(codes)}) ", str(error)) is not None


def _translated(error: ResponseError, where: str) -> Exception:
    text = str(error)
    if text.startswith("LEDGER "):
        return LedgerError(text.removeprefix("LEDGER "))
    if text.startswith("LOST "):
        return LedgerLost(f"{where}: {text.removeprefix('LOST ')}")
    if text.startswith("FORGETTING "):
        return LedgerForgetting(text.removeprefix("FORGETTING "))
    if _says(error, "MISCONF") or "OOM command not allowed" in text:
        return StreamFull(f"{where} refuses writes: {text}")
    return error
