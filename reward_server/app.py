"""The scoring service as an ASGI app, without a transport: uvicorn, a Ray actor, Ray Serve and a test client serve the
same one.

Routes: POST /v1/rewards, /v1/interventions and those of the adapters, GET /livez, /readyz, /metrics, /openapi.json.
Every route but /livez needs a key where there is one. Prompts and responses never reach a log, nor the text of a
refusal.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from reward_server.adapters import FORMATS
from reward_server.answering import Answering, Asked, Format, for_adapters
from reward_server.config import RewardSection
from reward_server.gate import Gate
from reward_server.interventions import add_route
from reward_server.keys import KeyRing
from reward_server.metrics import Metrics
from reward_server.openapi import NATIVE, document
from reward_server.problems import MOST_FIELDS, Path, Refusal, field_problem, invalid, refusal_of
from reward_server.runner import ModelRunner
from reward_server.schema import RewardRequest, RewardResponse
from reward_server.scorers.base import Scorer
from reward_server.service import ScoringService

ROUTES = (
    NATIVE, "/v1/interventions", "/livez", "/readyz", "/metrics", "/openapi.json", "/seed_session",
    *(path for form in FORMATS for path in form.paths),
)  # fmt: skip


def create_app(
    section: RewardSection,
    *,
    token: str | None = None,
    scorers: Mapping[str, Scorer] | None = None,
    runners: Mapping[str, ModelRunner] | None = None,
    tells_id: bool = True,
    metrics: Metrics | None = None,
) -> FastAPI:
    """The app of a recipe. Without `token` and `keys_file` no route asks for a key. `scorers` replaces sources' own
    scorers, `runners` their models, by the source's name. `tells_id` false: the proxy in front adds X-Request-Id to
    answers. `metrics` where the caller reads them too. Raises UserError for a keys file that is none."""
    metrics = metrics or Metrics()
    keys = KeyRing(section.keys_file, token)
    service = ScoringService(section, metrics, scorers, runners=runners)
    answering = Answering(section, service, metrics)
    app = FastAPI(
        title="Attune reward server",
        version=service.version,
        description="Scores responses of language models. A failure is never a number.",
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(Gate, keys=keys, metrics=metrics, routes=ROUTES, tells_id=tells_id)

    @app.post(NATIVE)
    async def rewards(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
        return await answering.answer(request, lambda body: read_native(body, section))

    for form in FORMATS:
        for path in form.paths:
            app.post(path)(_adapter(form, answering))

    @app.post("/seed_session")
    async def seed_session() -> dict[str, str]:  # pyright: ignore[reportUnusedFunction]
        """NeMo Gym asks for a session before a rollout; scoring keeps none."""
        return {}

    add_route(app, service.interventions, authenticated=keys.asks)

    @app.get("/livez")
    async def livez() -> dict[str, str]:  # pyright: ignore[reportUnusedFunction]
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:  # pyright: ignore[reportUnusedFunction]
        """Scores a built-in item with every source, and looks at the age of progress."""
        problems = await service.probe()
        if problems:
            raise Refusal(503, "not_ready", "; ".join(f"{name}: {problem}" for name, problem in problems.items()))
        return JSONResponse({"status": "ready", "recipe_revision": service.recipe_revision})

    @app.get("/metrics")
    async def prometheus() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Prometheus' text format."""
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def refused(request: Request, refusal: Exception) -> Response:
        assert isinstance(refusal, Refusal)
        request.scope["state"]["code"] = refusal.body.error.code
        return refusal.response()

    async def http_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        phrase = HTTPStatus(error.status_code).phrase
        code = phrase.lower().replace(" ", "_")
        return Refusal(error.status_code, code, phrase, headers=error.headers).response()

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(HTTPException, http_error)
    app.openapi = lambda: document(app, keys=keys.asks)  # type: ignore[method-assign]
    return app


def _adapter(form: Format[Any], answering: Answering) -> Any:
    async def adapter(request: Request) -> Response:
        try:
            query = dict(request.query_params)
            return await answering.answer(request, lambda body: answering.read_format(form, query, body))
        except Refusal as refusal:
            raise for_adapters(refusal) from None

    return adapter


def read_native(body: bytes, section: RewardSection) -> Asked:
    """The request of the contract in a body. Refuses with 422 what is no request.

    JSON that nests deeper than 200 levels is refused as no JSON.
    """
    try:
        request = RewardRequest.model_validate_json(body)
    except ValidationError as error:
        raise refusal_of(error, body) from None
    unknown = [i for i, name in enumerate(request.sources or ()) if name not in section.sources]
    if unknown:
        allowed = ", ".join(sorted(section.sources))
        told = f"unknown source; there are: {allowed}"
        raise invalid([field_problem(("sources", i), told, "value_error") for i in unknown[:MOST_FIELDS]])
    return Asked(request.items, request.sources, _native_place, _write_native)


def _native_place(index: int, field: Path) -> Path:
    return ("items", index, *field)


def _write_native(answer: RewardResponse) -> bytes:
    return answer.model_dump_json().encode()
