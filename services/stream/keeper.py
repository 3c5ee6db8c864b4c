"""Keeps the embedded Redis of a run up: starts it again when it dies, ends it first where it lives and does not answer.

From a thread of its own, since the driver may be waiting for just this server. The pause before a start doubles with
every death; more than `restarts` deaths within WINDOW_S are no accident, and the server stays down: whoever waits for
it then has its deadline, and `check` says why. A log that cannot be loaded is set aside and the server starts empty:
the ledger is a projection of the manifest and of what the driver knows, and is made again from them.
"""

import logging
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol, Self

import redis
from redis.exceptions import BusyLoadingError, RedisError

from services.errors import UserError
from services.stream.connect import connect
from services.stream.embedded import EmbeddedRedis
from services.stream.errors import StreamUnavailable

log = logging.getLogger(__name__)

WINDOW_S = 600.0
DEAF_S = 15.0
"""Seconds without an answer after which a server that lives is killed: below the patience of its clients."""

_LOOK_S, _ASK_S, _ANSWER_S = 0.05, 1.0, 2.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 10.0


class Told(Protocol):
    """Where it is written what happened: the run's events."""

    def __call__(self, kind: str, **fields: Any) -> None: ...


class KeptRedis:
    """An embedded server that is there for the length of a block, whatever kills it."""

    def __init__(self, server: EmbeddedRedis, *, restarts: int, told: Told, deaf_s: float = DEAF_S) -> None:
        self.server = server
        self._restarts = restarts
        self._told = told
        self._deaf_s = deaf_s
        self._deaths: list[float] = []
        self._end = threading.Event()
        self._failed: Exception | None = None
        self._client: redis.Redis | None = None
        self._thread = threading.Thread(target=self._keep, name="redis-keeper", daemon=True)

    def __enter__(self) -> Self:
        self._start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        if self._client is not None:
            self._client.close()
        self.server.stop()

    def check(self) -> None:
        """Raises StreamUnavailable where the server is down for good, or nobody keeps it up any more."""
        if self._failed is not None:
            raise StreamUnavailable(str(self._failed)) from self._failed

    def _keep(self) -> None:
        try:
            self._watch()
        except Exception as error:  # too many deaths, a full disk, a server that does not end: `check` says it
            self._failed = error
            log.error("%r is no longer kept up: %s", self.server, error)
            with suppress(OSError):  # the disk may be what is full
                self._told("redis_given_up", error=str(error))

    def _watch(self) -> None:
        asked = heard = time.monotonic()
        while not self._end.wait(_LOOK_S):
            if not self.server.alive():
                if not self._start_again("it died"):
                    return
                asked = heard = time.monotonic()
            elif time.monotonic() - asked >= _ASK_S:
                asked = time.monotonic()
                if self._answers():
                    heard = time.monotonic()
                elif time.monotonic() - heard >= self._deaf_s:
                    self.server.kill()
                    if not self._start_again(f"it did not answer for {self._deaf_s:g} s and was killed"):
                        return
                    asked = heard = time.monotonic()

    def _answers(self) -> bool:
        try:
            if self._client is None:
                self._client = connect(self.server.url, _ANSWER_S, socket_timeout_s=_ANSWER_S)
            self._client.execute_command("PING")  # pyright: ignore[reportUnknownMemberType]
        except BusyLoadingError:
            return True
        except (RedisError, StreamUnavailable):
            return not self.server.alive()  # its death is another matter
        return True

    def _start_again(self, why: str) -> bool:
        """False where the block ends meanwhile. Raises what keeps the server from starting."""
        now = time.monotonic()
        self._deaths = [death for death in self._deaths if now - death < WINDOW_S] + [now]
        if len(self._deaths) > self._restarts:
            raise UserError(
                f"the run's Redis died {len(self._deaths)} times within {WINDOW_S:.0f} s, the last time because {why}; "
                f"stream.restarts allows {self._restarts}. Its log is {self.server.directory / 'redis.log'}"
            )
        pause = min(_FIRST_PAUSE_S * 2 ** (len(self._deaths) - 1), _LONGEST_PAUSE_S)
        log.warning("%r: %s; started again in %g s", self.server, why, pause)
        if self._end.wait(pause):
            return False
        self._start()
        self._told("redis_restarted", why=why, deaths=len(self._deaths), seconds=round(time.monotonic() - now, 3))
        return True

    def _start(self) -> None:
        try:
            self.server.start()
        except UserError as error:
            damaged = self.server.set_log_aside()
            if damaged is None:
                raise
            log.error("%s; it is set aside as %s and the server starts empty", error, damaged)
            self._told("redis_log_damaged", error=str(error), kept_as=str(damaged))
            self.server.start()
