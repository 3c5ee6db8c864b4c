"""Asking another service over HTTP, at an address of the operator, never of a request.

What goes wrong is told apart: no usable answer (time-out, lost connection, 408, 429, 5xx, garbage) is
`upstream_unavailable` (infra), after `retries` further tries, or `source_down` where no connection could be made; a
refusal (other 4xx) is `upstream_failed` (data), as the same item is refused again. 401 and 403 are the operator's to
mend, so infra.
"""

import asyncio
import os
import ssl
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from functools import cache
from typing import Any, TypeVar

import httpx

from reward_server.client import pause_s, retry_after
from reward_server.schema import ErrorCode
from reward_server.scorers.base import ItemFailure
from services.errors import UserError

T = TypeVar("T")
BACKOFF_S = 0.2


def key_of(field: str, key_env: str | None) -> str | None:
    """The key of an environment variable. Raises UserError where it is asked for and not set."""
    if key_env is None:
        return None
    key = os.environ.get(key_env, "").strip()
    if not key:
        raise UserError(f"{field}.key_env: the environment variable {key_env} is not set")
    return key


@cache
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)  # costs milliseconds, so once


def connection(timeout_s: float, key: str | None) -> AbstractAsyncContextManager[httpx.AsyncClient]:
    """Connections of one call of a scorer: a pool that outlived its event loop could not be used."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.AsyncClient(headers=headers, timeout=timeout_s, trust_env=False, verify=_certificates())


async def post(
    http: httpx.AsyncClient,
    url: str,
    body: Mapping[str, Any],
    read: Callable[[Any], T],
    *,
    timeout_s: float,
    retries: int,
) -> T:
    """What `read` makes of the answer's JSON. `read` raises KeyError, IndexError, TypeError or ValueError for garbage.

    Raises ItemFailure, which never quotes what was sent.
    """
    why, code = "", ErrorCode.UPSTREAM_UNAVAILABLE
    for attempt in range(retries + 1):
        asked: float | None = None
        code = ErrorCode.UPSTREAM_UNAVAILABLE
        try:
            # httpx's own time-outs are of each read: a server that sends a byte now and then would never end.
            async with asyncio.timeout(timeout_s):
                response = await http.post(url, json=dict(body))
        except (TimeoutError, httpx.TimeoutException):
            why = f"{url} did not answer within {timeout_s:g} s"
        except httpx.HTTPError as error:
            why = f"{url}: {type(error).__name__}"
            if isinstance(error, httpx.ConnectError):
                code = ErrorCode.SOURCE_DOWN
        else:
            status = response.status_code
            if status == 200:
                try:
                    return read(response.json())
                except (KeyError, IndexError, TypeError, ValueError) as error:
                    why = f"{url} answered what cannot be read: {type(error).__name__}"
            elif 400 <= status < 500 and status not in (401, 403, 408, 429):
                raise ItemFailure(ErrorCode.UPSTREAM_FAILED, f"{url} refused with {status}")
            else:
                why = f"{url} answered {status}"
                asked = retry_after(response)
        if attempt < retries:
            await asyncio.sleep(pause_s(attempt, BACKOFF_S, asked))
    raise ItemFailure(code, why)
