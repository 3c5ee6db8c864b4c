"""Writes docs/http-api.md from docs/openapi/reward_server.json, for readers; `--check` compares it."""

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

from written import ROOT, write_or_check

DOCUMENT = ROOT / "docs" / "openapi" / "reward_server.json"
PAGE = ROOT / "docs" / "http-api.md"

HEAD = """# HTTP API

Written from the reward server's OpenAPI document by `make docs`; [reward-server.md](reward-server.md) explains the
service, [reward-clients.md](reward-clients.md) has clients. The document is in the repository
(`docs/openapi/reward_server.json`) and served as `/openapi.json`. Where the
server has a token or keys, every request but `GET /livez` carries one: `Authorization: Bearer TOKEN`.
"""

LIMITS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {}",
    "maxItems": "at most {}",
    "pattern": "`{}`",
}


def name_of(reference: str) -> str:
    return reference.rsplit("/", 1)[-1]


def link(name: str) -> str:
    """A link to a record's section, by the anchor that GitHub and the site give to its heading."""
    return f"[{name}](#{re.sub('[^a-z0-9_-]', '', name.lower())})"


def type_of(schema: dict[str, Any]) -> str:
    """What a value may be, in words; a schema of its own as a link to its section."""
    if "$ref" in schema:
        return link(name_of(schema["$ref"]))
    for joined in ("anyOf", "oneOf", "allOf"):
        if joined in schema:
            return " or ".join(dict.fromkeys(type_of(one) for one in schema[joined]))
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    limits = [text.format(schema[key]) for key, text in LIMITS.items() if key in schema]
    if schema.get("type") == "array":
        what = f"list of {type_of(schema.get('items', {}))}"
    elif schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        what = f"object: name to {type_of(schema['additionalProperties'])}"
    else:
        what = str(schema.get("type", "any"))
    return f"{what}, {', '.join(limits)}" if limits else what


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def fields(schema: dict[str, Any]) -> Iterator[str]:
    """The table of an object's fields."""
    required = set(schema.get("required", ()))
    yield "| field | type | default | |"
    yield "|---|---|---|---|"
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in required else f"`{json.dumps(field['default'])}`" if "default" in field else ""
        yield f"| `{name}` | {cell(type_of(field))} | {default} | {cell(field.get('description', ''))} |"


def operation(method: str, path: str, found: dict[str, Any]) -> Iterator[str]:
    yield f"### {method.upper()} {path}"
    yield ""
    said = [found.get("description") or "", "" if found.get("description") else found.get("summary") or ""]
    yield from (text for text in said if text)
    yield ""
    body = found.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    if body is not None:
        yield f"Request: {type_of(body)}."
        yield ""
    for parameter in found.get("parameters", ()):
        kind = type_of(parameter.get("schema", {}))
        yield f"- {parameter['in']} `{parameter['name']}` ({kind}): {cell(parameter.get('description', ''))}"
    if found.get("parameters"):
        yield ""
    yield "| status | answer |"
    yield "|---|---|"
    for status, answer in found["responses"].items():
        schemas = [content.get("schema", {}) for content in answer.get("content", {}).values()]
        kinds = ", ".join(type_of(schema) for schema in schemas if schema)
        yield f"| {status} {answer['description']} | {cell(kinds)} |"
    yield ""


def text() -> str:
    document = json.loads(DOCUMENT.read_text(encoding="utf-8"))
    lines = [HEAD, "## Routes", ""]
    for path, methods in document["paths"].items():
        for method, found in methods.items():
            lines += operation(method, path, found)
    lines += ["## Records", "", "Fields that are not named here are refused where the record is part of a request.", ""]
    for name, schema in sorted(document["components"]["schemas"].items(), key=lambda one: one[0].lower()):
        lines += [f"### {name}", ""]
        if schema.get("description"):
            lines += [schema["description"].strip(), ""]
        lines += [*fields(schema)] if schema.get("properties") else [type_of(schema)]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(write_or_check({PAGE: text()}, __doc__))
