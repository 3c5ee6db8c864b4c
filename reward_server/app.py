"""The scoring service as an ASGI app, without a transport: uvicorn, a Ray actor and a test client serve the same one.

Routes: POST /v1/rewards, /v1/interventions, GET /livez, /readyz, /metrics, /openapi.json. Every route but /livez
needs the bearer token where there is one. Prompts and responses never reach a log, nor the text of a refusal.
"""

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reward_server.admission import Admission
from reward_server.config import RewardSection
from reward_server.interventions import add_route
from reward_server.metrics import Metrics
from reward_server.problems import Refusal, field_problem, invalid, refusal_of
from reward_server.schema import ErrorResponse, RewardRequest, RewardResponse
from reward_server.scorers.base import Scorer
from reward_server.service import ScoringService

log = logging.getLogger(__name__)

ROUTES = ("/v1/rewards", "/v1/interventions", "/livez", "/readyz", "/metrics", "/openapi.json")
IN_THREAD_BYTES = 64 * 2**10
"""Bodies above this are parsed in a thread: a large one would hold up the event loop for milliseconds."""


class Gate:
    """Asks for the token on every route but /livez, and counts requests by route and status."""

    def __init__(self, app: ASGIApp, token: str | None, metrics: Metrics) -> None:
        self._app = app
        self._expected = None if token is None else _digest(token.encode())
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in ROUTES else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.request(route, message["status"])
            await send(message)

        if route == "/livez" or self._allowed(scope):
            await self._app(scope, receive, counted)
        else:
            refusal = Refusal(401, "unauthorized", "a bearer token is needed", headers={"WWW-Authenticate": "Bearer"})
            await refusal.response()(scope, receive, counted)

    def _allowed(self, scope: Scope) -> bool:
        if self._expected is None:
            return True
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, token = (given[0] if len(given) == 1 else b"").partition(b" ")
        # Digests have one length: neither the token's length nor a common beginning shows in the time taken.
        same = hmac.compare_digest(_digest(token.strip()), self._expected)
        return same and scheme.lower() == b"bearer"


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def create_app(
    section: RewardSection, *, token: str | None = None, scorers: Mapping[str, Scorer] | None = None
) -> FastAPI:
    """The app of a recipe. `token` None: no route asks for one. `scorers` replaces sources' own scorers, by name."""
    metrics = Metrics()
    service = ScoringService(section, metrics, scorers)
    admission = Admission(section, metrics)
    app = FastAPI(
        title="Attune reward server",
        version=service.version,
        description="Scores responses of language models. A failure is never a number.",
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Gate, token=token, metrics=metrics)
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": HTTPStatus(status).phrase}
        for status in (400, 401, 408, 413, 422, 429)
    }

    @app.post("/v1/rewards", response_model=RewardResponse, responses=refusals)
    async def rewards(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Scores items with the recipe's sources. Failures are per item, with status 200."""
        async with admission.admitted():
            body = await admission.body(request)
            parsed = await (
                asyncio.to_thread(parse, body, section) if len(body) > IN_THREAD_BYTES else _now(body, section)
            )
            async with admission.turn():
                answer = await service.score(parsed.items, parsed.sources)
            return Response(answer.model_dump_json(), media_type="application/json")

    add_route(app, service.interventions, authenticated=token is not None)

    @app.get("/livez")
    async def livez() -> dict[str, str]:  # pyright: ignore[reportUnusedFunction]
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"model": ErrorResponse, "description": "A source does not score."}})
    async def readyz() -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        """Scores a built-in item with every source."""
        problems = await service.probe()
        if problems:
            raise Refusal(503, "not_ready", "; ".join(f"{name}: {problem}" for name, problem in problems.items()))
        return JSONResponse({"status": "ready", "recipe_revision": service.recipe_revision})

    @app.get("/metrics")
    async def prometheus() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Prometheus' text format."""
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def refused(_: Request, refusal: Exception) -> Response:
        assert isinstance(refusal, Refusal)
        return refusal.response()

    async def http_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        phrase = HTTPStatus(error.status_code).phrase
        code = phrase.lower().replace(" ", "_")
        return Refusal(error.status_code, code, phrase, headers=error.headers).response()

    async def failed(_: Request, error: Exception) -> Response:
        return Refusal(500, "internal", f"the server failed: {type(error).__name__}").response()

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, failed)
    app.openapi = lambda: openapi(app, authenticated=token is not None)  # type: ignore[method-assign]
    return app


def parse(body: bytes, section: RewardSection) -> RewardRequest:
    """The request in a body. Refuses with 422 what is no request, with 413 one of too many items.

    JSON that nests deeper than 200 levels is refused as no JSON.
    """
    try:
        request = RewardRequest.model_validate_json(body)
    except ValidationError as error:
        raise refusal_of(error, body) from None
    if len(request.items) > section.max_items:
        message = f"{len(request.items)} items, at most {section.max_items} are allowed"
        raise Refusal(413, "too_large", f"items: {message}", [field_problem(("items",), message, "too_long")])
    unknown = [i for i, name in enumerate(request.sources or ()) if name not in section.sources]
    if unknown:
        allowed = ", ".join(sorted(section.sources))
        raise invalid(
            [field_problem(("sources", i), f"unknown source; there are: {allowed}", "value_error") for i in unknown]
        )
    return request


async def _now(body: bytes, section: RewardSection) -> RewardRequest:
    return parse(body, section)


def openapi(app: FastAPI, *, authenticated: bool) -> dict[str, Any]:
    """The OpenAPI document, with the request's schema, which the route reads for itself, and the token."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    request = RewardRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas = document["components"]["schemas"]
    schemas.update(request.pop("$defs"))
    schemas["RewardRequest"] = request
    document["paths"]["/v1/rewards"]["post"]["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/RewardRequest"}}},
    }
    if authenticated:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, methods in document["paths"].items():
            for operation in methods.values():
                if path != "/livez":
                    operation["security"] = [{"token": []}]
    return document
