"""Writes docs/configuration-reference.md, every key of a recipe from its own description; `--check` compares it."""

import sys
from collections.abc import Iterator
from typing import Any

from written import ROOT, write_or_check

from cluster.recipe import json_schema

PAGE = ROOT / "docs" / "configuration-reference.md"
HEAD = """# Every key of a recipe

Written by `make docs` from the descriptions in the code; do not edit. How recipes work:
[configuration.md](configuration.md).
"""


def page() -> str:
    schema = json_schema()
    definitions: dict[str, Any] = schema.get("$defs", {})
    parts = [HEAD]
    for name, field in schema["properties"].items():
        parts.append(f"\n## {name}\n\n{_sentence(field.get('description', ''))}\n")
        rows = list(_rows(_resolve(field, definitions), definitions, name))
        parts.append("\n| key | values | default | what for |\n|---|---|---|---|\n")
        parts.extend(f"| `{key}` | {values} | {default} | {text} |\n" for key, values, default, text in rows)
    return "".join(parts)


def _rows(section: dict[str, Any], definitions: dict[str, Any], path: str) -> Iterator[tuple[str, str, str, str]]:
    required = set(section.get("required", ()))
    for name, field in section.get("properties", {}).items():
        key = f"{path}.{name}"
        inner = _resolve(field, definitions)
        text = _cell(_sentence(field.get("description", inner.get("description", ""))))
        if "properties" in inner:
            yield from _rows(inner, definitions, key)
            continue
        members = _members(field, definitions)
        default = (
            "required" if name in required else "" if members else _value(field.get("default"), "default" in field)
        )
        yield key, _cell(_type(field, definitions)), default, text
        for member in members:
            kind = member["properties"].get("kind", {}).get("const")
            yield from _rows(member, definitions, f"{key}.NAME ({kind})" if kind else f"{key}.NAME")


def _members(field: dict[str, Any], definitions: dict[str, Any]) -> list[dict[str, Any]]:
    """The sections that the values of a mapping may be: `reward.sources` has one for each kind."""
    patterns = field.get("patternProperties")
    values = next(iter(patterns.values())) if patterns else field.get("additionalProperties")
    if not isinstance(values, dict):
        return []
    choices = values.get("oneOf", [values])
    return [inner for choice in choices if "properties" in (inner := _resolve(choice, definitions))]


def _resolve(field: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """What a reference leads to; of a section that may be null, the section."""
    choices = [choice for choice in field.get("anyOf", ()) if choice.get("type") != "null"]
    reference = field.get("$ref") or (choices[0].get("$ref") if len(choices) == 1 else None)
    return definitions[reference.rsplit("/", 1)[1]] if reference else field


def _type(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    field = _resolve(field, definitions)
    if "anyOf" in field:
        return " or ".join(_type(choice, definitions) for choice in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if field.get("type") == "array":
        inner = field.get("items") or (field.get("prefixItems") or [{}])[0]
        return f"list of {_type(inner, definitions)}"
    bounds = [
        f"{sign} {field[key]:g}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in field
    ]
    return " ".join(
        [{"object": "mapping"}.get(field.get("type", ""), field.get("type", "any")), ", ".join(bounds)]
    ).strip()


def _value(value: Any, given: bool) -> str:
    if not given:
        return ""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"`{value}`" if value != [] and value != {} else "none"


def _sentence(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(write_or_check({PAGE: page()}, __doc__))
