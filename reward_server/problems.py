"""Refusals: everything that is not an answer, as one JSON form, `ErrorResponse`. Never quotes what was sent."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json
from starlette.responses import Response

from reward_server.schema import ErrorResponse, FieldProblem, Problem

MOST_FIELDS = 20
"""Fields that one refusal names."""
MOST_ERRORS = 1000
"""Errors of a body that are looked at, in order to name their fields. A wrong list has one; only unknown fields have
more, one each: as Python objects, those of one body would take seconds and gigabytes."""

Path = tuple[str | int, ...]


class Refusal(Exception):  # noqa: N818 - not an error of the server
    """An answer that is not 2xx. `detail` names the fields that are wrong."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        detail: Sequence[FieldProblem] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorResponse(error=Problem(code=code, message=message), detail=tuple(detail))
        self.headers = dict(headers or {})

    def response(self) -> Response:
        return Response(
            self.body.model_dump_json(), status_code=self.status, media_type="application/json", headers=self.headers
        )


def path_text(path: Path) -> str:
    """`items[0].attention.mass[3]`; the body itself is `body`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".") or "body"


def field_problem(path: Path, message: str, kind: str) -> FieldProblem:
    path = tuple(step[:80] if isinstance(step, str) else step for step in path[:10])
    return FieldProblem(loc=("body", *path), path=path_text(path), msg=message, type=kind)


def invalid(problems: Sequence[FieldProblem]) -> Refusal:
    """422, with the path of every field that is wrong."""
    first = problems[0]
    return Refusal(422, "invalid_request", f"{first.path}: {first.msg}", problems)


def header_refusal(name: str, message: str, kind: str) -> Refusal:
    """422, for a header that is wrong."""
    problem = FieldProblem(loc=("header", name), path=f"header.{name}", msg=message, type=kind)
    return Refusal(422, "invalid_request", f"header {name}: {message}", [problem])


def too_large(path: Path, message: str) -> Refusal:
    """413, with the path of the field that is too large."""
    problem = field_problem(path, message, "too_long")
    return Refusal(413, "too_large", f"{problem.path}: {message}", [problem])


def refusal_of(error: ValidationError, body: bytes) -> Refusal:
    """The refusal of a body that did not validate."""
    if error.error_count() > MOST_ERRORS:
        return invalid([field_problem((), f"{error.error_count()} fields are wrong", "value_error")])
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    if errors[0]["type"] == "json_invalid":
        return invalid([field_problem((), errors[0]["msg"], "json_invalid")])
    value = from_json(body, allow_inf_nan=True)
    found: dict[Path, FieldProblem] = {}
    for problem in errors:
        path = request_path(problem["loc"], value)
        if path not in found:
            found[path] = field_problem(path, problem["msg"], problem["type"])
        if len(found) == MOST_FIELDS:
            break
    return invalid(list(found.values()))


def request_path(loc: Sequence[str | int], value: Any) -> Path:
    """A validator's location as a path in the request: the tags of union branches, `<so>`, are left out.

    A step that is not in the request is kept where it names a missing field.
    """
    path: list[str | int] = []
    for i, step in enumerate(loc):
        inside, next_value = _step_into(value, step)
        if inside:
            path.append(step)
            value = next_value
        elif isinstance(step, str) and step.startswith("<") and step.endswith(">"):
            continue
        else:
            if isinstance(value, dict) and i == len(loc) - 1:
                path.append(step)
            break
    return tuple(path)


def _step_into(value: Any, step: str | int) -> tuple[bool, Any]:
    try:
        return True, value[step]
    except (KeyError, IndexError, TypeError):
        return False, None
