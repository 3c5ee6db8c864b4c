"""The OpenAPI document: the routes read their bodies for themselves, so that what they take and answer is said here.

`docs/openapi/reward_server.json` is this document, written by `make docs`; a test fails where the two differ.
"""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from reward_server.adapters import FORMATS
from reward_server.answering import DEADLINE, LONGEST_DEADLINE_MS
from reward_server.idempotency import HEADER as IDEMPOTENCY_KEY
from reward_server.idempotency import LONGEST_KEY
from reward_server.interventions import Intervention, InterventionsAnswer
from reward_server.schema import ErrorResponse, RewardRequest, RewardResponse

NATIVE = "/v1/rewards"
REFUSALS = (401, 408, 413, 415, 422, 429, 500, 504)
ADAPTERS_REFUSALS = (401, 413, 415, 422, 500, 503, 504)
RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}}}
SECURITY: list[dict[str, list[str]]] = [{"bearer": []}, {"basic": []}]


def document(app: FastAPI, *, keys: bool) -> dict[str, Any]:
    """The document of an app; `keys`: its routes ask for one."""
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas: dict[str, Any] = found.setdefault("components", {}).setdefault("schemas", {})
    _describe(
        found["paths"][NATIVE]["post"], schemas, "", RewardRequest, RewardResponse, REFUSALS,
        "Scores items with the recipe's sources. Failures are per item, with status 200.",
    )  # fmt: skip
    for form in FORMATS:
        for path in form.paths:
            operation = found["paths"][path]["post"]
            operation["operationId"] = "adapter" + path.replace("/", "_")
            prefix = form.request.__module__.rsplit(".", 1)[1] + "."
            _describe(operation, schemas, prefix, form.request, form.answer, ADAPTERS_REFUSALS, form.summary)
            operation["parameters"].append(
                _parameter("sources", "query", {"type": "string"}, "Sources to ask, with commas; absent: all.")
            )
    _describe(
        found["paths"]["/v1/interventions"]["post"], schemas, "", Intervention, InterventionsAnswer,
        (401, 403, 404, 408, 409, 413, 422, 500), "Adds a principle that every item is judged by from now on.",
    )  # fmt: skip
    found["paths"]["/v1/interventions"]["post"].pop("parameters")  # it is not scoring
    refused = _reference(ErrorResponse, schemas, "", "serialization")
    ready = found["paths"]["/readyz"]["get"]["responses"]
    ready["503"] = _answer(HTTPStatus.SERVICE_UNAVAILABLE, refused)
    found["paths"]["/metrics"]["get"]["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    for path, methods in found["paths"].items():
        for operation in methods.values():
            if keys and path != "/livez":
                operation["security"] = SECURITY
                operation["responses"]["401"] = _answer(HTTPStatus.UNAUTHORIZED, refused)
    if keys:
        found["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "basic": {"type": "http", "scheme": "basic", "description": "The password is the key."},
        }
    return found


def _describe(
    operation: dict[str, Any],
    schemas: dict[str, Any],
    prefix: str,
    request: Any,
    answer: Any,
    refusals: tuple[int, ...],
    summary: str,
) -> None:
    operation["summary"] = summary
    operation["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": _reference(request, schemas, prefix, "validation")}},
    }
    refused = _reference(ErrorResponse, schemas, "", "serialization")
    operation["responses"] = {
        "200": _answer(HTTPStatus.OK, _reference(answer, schemas, prefix, "serialization")),
        **{str(status): _answer(HTTPStatus(status), refused) for status in refusals},
    }
    operation["parameters"] = [
        _parameter(
            DEADLINE.title(), "header", {"type": "integer", "minimum": 1, "maximum": LONGEST_DEADLINE_MS},
            "Milliseconds from the request's arrival after which it is refused with 504.",
        ),
        _parameter(
            IDEMPOTENCY_KEY.title(), "header", {"type": "string", "minLength": 1, "maxLength": LONGEST_KEY},
            "The same key with the same body gets the same answer, computed once.",
        ),
    ]  # fmt: skip


def _answer(status: HTTPStatus, schema: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": status.phrase, "content": {"application/json": {"schema": schema}}}
    return {**answer, "headers": RETRY_AFTER} if status in (429, 503) else answer


def _parameter(name: str, place: str, schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"name": name, "in": place, "required": False, "schema": schema, "description": description}


def _reference(model: Any, schemas: dict[str, Any], prefix: str, mode: Any) -> dict[str, Any]:
    """The schema of a type, its parts moved to `schemas` under names that begin with `prefix`."""
    schema = TypeAdapter(model).json_schema(mode=mode, ref_template=f"#/components/schemas/{prefix}{{model}}")
    for name, part in schema.pop("$defs", {}).items():
        schemas[prefix + name] = part
    if "properties" not in schema:
        return schema
    schemas[prefix + model.__name__] = schema
    return {"$ref": f"#/components/schemas/{prefix}{model.__name__}"}
