"""What every request passes: its id, its key, its counter, its line in the log; and where what nobody caught ends.

Invariants: every route but /livez needs a key where there is one. What an exception says never reaches a log or an
answer, as it may quote what was scored.
"""

import logging
import re
import secrets
import time
from collections.abc import Collection
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reward_server.keys import Allowance, KeyRing
from reward_server.logs import request_id, where
from reward_server.metrics import Metrics
from reward_server.problems import Refusal

log = logging.getLogger(__name__)
access = logging.getLogger("reward_server.access")

REQUEST_ID = b"x-request-id"
_GOOD_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class Gate:
    """ASGI middleware. `scope["state"]` gets `allowance` (whose key it is), `arrived` (seconds, monotonic) and takes
    `items` (how many the request has) and `code` (of a refusal) for the log."""

    def __init__(
        self, app: ASGIApp, keys: KeyRing, metrics: Metrics, routes: Collection[str], *, tells_id: bool
    ) -> None:
        """`tells_id`: answers carry the request's id, which a proxy in front may do in our place."""
        self._app = app
        self._keys = keys
        self._metrics = metrics
        self._routes = frozenset(routes)
        self._tells_id = tells_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        given = [value for name, value in headers if name == REQUEST_ID]
        ours = given[0] if len(given) == 1 and _GOOD_ID.fullmatch(given[0]) else secrets.token_hex(8).encode()
        # A reset is of no use: the context belongs to this request's task, and what it started may outlive this call.
        request_id.set(ours.decode())
        state: dict[str, Any] = scope.setdefault("state", {})
        state["arrived"] = time.monotonic()
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._tells_id:
                    message["headers"] = [*message.get("headers", ()), (REQUEST_ID, ours)]
            await send(message)

        allowance = self._keys.holder([value for name, value in headers if name == b"authorization"])
        try:
            await self._answer(scope, receive, counted, allowance)
        except Exception as error:
            log.error("%s failed: %s", self._route(scope), where(error))
            if status:  # half an answer is on its way: the transport cuts it off, so that nobody takes it for a whole
                raise Unanswered from None
            refusal = Refusal(500, "internal", f"the server failed: {type(error).__name__}")
            await refusal.response()(scope, receive, counted)
        finally:
            self._note(scope, status, allowance)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, allowance: Allowance | None) -> None:
        scope["state"]["allowance"] = allowance
        if allowance is not None or scope["path"] == "/livez":
            await self._app(scope, receive, send)
            return
        refusal = Refusal(
            401, "unauthorized", "a key is needed, as bearer token", headers={"WWW-Authenticate": "Bearer"}
        )
        await refusal.response()(scope, receive, send)

    def _route(self, scope: Scope) -> str:
        return scope["path"] if scope["path"] in self._routes else "other"

    def _note(self, scope: Scope, status: int, allowance: Allowance | None) -> None:
        route = self._route(scope)
        self._metrics.request(route, status)
        if route in ("/livez", "/readyz", "/metrics") and status == 200:
            return
        seconds = time.monotonic() - scope["state"]["arrived"]
        fields: dict[str, Any] = {"method": scope["method"], "route": route, "status": status}
        if allowance is not None and allowance.name:
            fields["key"] = allowance.name
        fields.update((name, scope["state"][name]) for name in ("items", "code") if name in scope["state"])
        access.info("%s %s", route, status, extra={"fields": {**fields, "seconds": round(seconds, 6)}})


class Unanswered(Exception):  # noqa: N818
    """Breaks off an answer that had begun; has no words of its own."""
