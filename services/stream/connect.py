"""From an address to a Redis client whose every call has a timeout.

The client itself never retries: `services.stream.calls` does, with a bound in seconds rather than in attempts.
"""

import logging
import time
from typing import Any, cast
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, BusyLoadingError, RedisError
from redis.retry import Retry

from services.stream.errors import StreamUnavailable

MINIMUM_VERSION = (6, 2)

log = logging.getLogger(__name__)


def address_of(url: str) -> str:
    """host:port of an address, without any secret."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or 6379}"


def connect(url: str, deadline_s: float = 10.0, *, socket_timeout_s: float = 5.0) -> redis.Redis:
    """A client (thread-safe, bytes in and out) of a Redis that answers, is new enough and lets us in.

    Waits up to `deadline_s` for a server that is still starting, or loading its data. Raises StreamUnavailable.
    """
    where = address_of(url)
    client = redis.Redis.from_url(  # pyright: ignore[reportUnknownMemberType]
        url,
        protocol=2,
        decode_responses=False,
        socket_timeout=socket_timeout_s,
        socket_connect_timeout=min(socket_timeout_s, deadline_s),
        socket_keepalive=True,
        health_check_interval=0,
        retry=Retry(NoBackoff(), 0),
    )
    give_up = time.monotonic() + deadline_s
    while True:
        try:
            info = cast(dict[str, Any], client.execute_command("INFO"))  # pyright: ignore[reportUnknownMemberType]
            if not int(info.get("loading", 0)):
                break
            raise BusyLoadingError("it still loads its data")  # INFO it answers all the same, and little else
        except (AuthenticationError, AuthorizationError) as error:
            client.close()
            raise StreamUnavailable(f"Redis at {where} refuses the password or user: {error}") from None
        except RedisError as error:
            refused = _refusal(error)
            if refused or time.monotonic() >= give_up:
                client.close()
                what = refused or f"no answer within {deadline_s:g} s ({type(error).__name__}: {error})"
                raise StreamUnavailable(f"Redis at {where} cannot be used: {what}") from None
            time.sleep(0.05)
    _check(info, where)
    return client


def _refusal(error: RedisError) -> str | None:
    """The message of an answer that waiting will not change, or None."""
    text = str(error)
    return text if text.startswith(("NOAUTH", "WRONGPASS", "NOPERM", "ERR ", "Authentication required")) else None


def _check(info: dict[str, Any], where: str) -> None:
    version = str(info["redis_version"])
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_VERSION:
        raise StreamUnavailable(f"Redis at {where} is version {version}; 6.2 or later is needed")
    if info.get("redis_mode") == "cluster":
        raise StreamUnavailable(
            f"Redis at {where} is a node of a Redis Cluster; a run needs a Redis alone, with replicas or without"
        )
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if int(info.get("maxmemory", 0)) and policy != "noeviction":
        log.warning("Redis at %s evicts keys when it is full (%s): set maxmemory-policy noeviction", where, policy)
