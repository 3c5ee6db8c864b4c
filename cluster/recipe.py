"""Recipes: YAML files, `key=value` overrides, and errors that name the key, the value and what is allowed."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from cluster.config import Config
from cluster.files import write_atomically
from reward_server.config import RewardSection
from services.errors import UserError


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe and applies `key=value` overrides, in order; values are YAML.

    Raises:
        UserError: the file is not there or no YAML mapping, a key is unknown, a value is not allowed.
    """
    return resolve(apply_overrides(read_yaml(path), overrides), str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"recipe {path}: there is no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path}: cannot be read: {error}") from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path}: not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path}: must be a mapping of sections ({', '.join(Config.model_fields)})")
    return tree


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of the tree with `a.b=value` set for each override."""
    result: dict[str, Any] = _plain(tree)
    for override in overrides:
        key, separator, raw = override.partition("=")
        if not separator or not key.strip():
            raise UserError(f"override {override!r}: must be KEY=VALUE, for example learner.lr=2e-5")
        try:
            value = yaml.safe_load(raw) if raw else None
        except yaml.YAMLError as error:
            raise UserError(f"override {key}: value {raw!r} is not YAML: {error}") from error
        *parents, leaf = key.strip().split(".")
        node = result
        for depth, parent in enumerate(parents):
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise UserError(
                    f"override {key}: {'.'.join(parents[: depth + 1])} is no section, it has the value {child!r}"
                )
            node = child
        node[leaf] = _plain(value)
    return result


def _plain(value: Any) -> Any:
    """A copy in JSON's types: YAML reads a date where its text is meant."""
    return json.loads(json.dumps(value, default=str))


def resolve(tree: Mapping[str, Any], origin: str) -> Config:
    """The configuration of a tree of plain values; `origin` names it in errors."""
    unknown = _unknown_keys(Config, tree, ())
    if unknown:
        raise UserError(f"{origin}: " + "; ".join(unknown))
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: " + "; ".join(_describe(item, tree) for item in error.errors())) from error


def save_resolved(config: Config, path: Path) -> None:
    """Replaces the file as a whole: a resumed run is compared with what stands there."""
    write_atomically(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def json_schema() -> dict[str, Any]:
    """The recipe's JSON schema, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def _unknown_keys(model: type[BaseModel], tree: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    problems: list[str] = []
    for key, value in tree.items():
        here = (*path, str(key))
        if key not in model.model_fields:
            near = difflib.get_close_matches(str(key), list(model.model_fields), n=1, cutoff=0.5)
            hint = (
                f"did you mean {'.'.join((*path, near[0]))!r}?" if near else f"allowed: {', '.join(model.model_fields)}"
            )
            problems.append(f"unknown key {'.'.join(here)!r}: {hint}")
            continue
        annotation = model.model_fields[key].annotation
        sections = _sections_in(annotation)
        if get_origin(annotation) is dict and isinstance(value, Mapping):
            for name, entry in value.items():
                of_kind = [section for section in sections if _is_of_kind(section, entry)]
                if of_kind:
                    problems.extend(_unknown_keys(of_kind[0], entry, (*here, str(name))))
        elif len(sections) == 1 and isinstance(value, Mapping):
            problems.extend(_unknown_keys(sections[0], value, here))
    return problems


def _is_of_kind(section: type[BaseModel], entry: Any) -> bool:
    """Whether an entry of a mapping of sections, which are told apart by their `kind`, is this one."""
    kind = section.model_fields.get("kind")
    return isinstance(entry, Mapping) and kind is not None and entry.get("kind") == kind.default


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]


def _describe(item: Any, tree: Mapping[str, Any]) -> str:
    key = ".".join(_path_of(item["loc"], tree))
    if item["type"] == "missing":
        return f"{key}: is required"
    value = item["input"]
    shown = "" if isinstance(value, Mapping) else f"value {value!r}: "
    return f"{key}: {shown}{item['msg']}" if key else f"{item['msg']}"


def _path_of(location: Sequence[int | str], tree: Mapping[str, Any]) -> Iterator[str]:
    """The keys of an error's location: pydantic puts the kind of an entry between them, which is no key."""
    node: Any = tree
    for place, part in enumerate(location):
        if isinstance(node, Mapping) and part not in node and part == node.get("kind") and place > 0:
            continue
        yield str(part)
        node = node.get(part) if isinstance(node, Mapping) else None


def load_reward_section(path: Path, overrides: Sequence[str] = ()) -> RewardSection:
    """The `reward` section of a recipe, which may be all that the recipe holds: the scoring service needs nothing else.

    Raises:
        UserError: as `load_recipe`.
    """
    tree = apply_overrides(read_yaml(path), overrides)
    unknown = _unknown_keys(Config, tree, ())
    if unknown:
        raise UserError(f"{path}: " + "; ".join(unknown))
    try:
        return RewardSection.model_validate(tree.get("reward") or {})
    except ValidationError as error:
        described = "; ".join(_describe({**item, "loc": ("reward", *item["loc"])}, tree) for item in error.errors())
        raise UserError(f"{path}: {described}") from error
