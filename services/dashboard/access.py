"""Who may read the page: its own address and port, a token on everything but the empty shell, and what a browser is
told about it.

The token stands in the fragment of the printed address, which no browser sends to anybody, so it is in no log and no
referrer; the page keeps it for its own origin and sends it as a bearer token. There is no cookie: 127.0.0.1's would go
to every port of this machine. `Host` is checked, so that a foreign name that resolves to this machine reads nothing.
"""

import hmac
import json
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
API = "/api/"


class Access:
    """ASGI middleware around the app. `hosts` are names (with or without a port) that the page is reached under."""

    def __init__(self, app: ASGIApp, *, token: str, hosts: Sequence[str]) -> None:
        self._app = app
        self._token = token.encode()
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        problem = self._problem(scope["method"], scope["path"], headers)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                out = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    out[name] = value
                out["cache-control"] = "no-store" if scope["path"].startswith(API) else "no-cache"
            await send(message)

        if problem is None:
            await self._app(scope, receive, guarded)
            return
        status, code, text = problem
        body = json.dumps({"error": {"code": code, "message": text}}).encode()
        more = [(b"www-authenticate", b"Bearer")] if status == 401 else []
        start = {"type": "http.response.start", "status": status}
        await guarded({**start, "headers": [(b"content-type", b"application/json"), *more]})
        await send({"type": "http.response.body", "body": body})

    def _problem(self, method: str, path: str, headers: Headers) -> tuple[int, str, str] | None:
        host = headers.get("host", "").lower()
        if host not in self._hosts and host_name(host) not in self._hosts:
            return 421, "wrong_host", "this address is not one that the page is served under (--allow-host)"
        if method not in ("GET", "HEAD"):
            return 405, "read_only", "the page only reads"
        if path.startswith(API) and not self._known(headers.get("authorization", "")):
            return 401, "unauthorized", "the token is missing or wrong; open the address that the dashboard printed"
        return None

    def _known(self, authorization: str) -> bool:
        scheme, _, given = authorization.partition(" ")
        # Compared whatever it is: the time taken says nothing of the token.
        same = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._token)
        return same and scheme.lower() == "bearer"


def host_name(host: str) -> str:
    """The name of a Host header, without its port: "[::1]:80" is "[::1]"."""
    return host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
