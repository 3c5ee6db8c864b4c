#!/usr/bin/env python3
"""`make check-chart`: the container file, and the chart as Helm renders it, without a cluster.

The container file passes hadolint. For every values file in deploy/helm/attune/ci/ Helm itself lints and renders the
chart, and what comes out passes the schemas of Kubernetes (the oldest and the newest supported version) and of KubeRay
and the Prometheus Operator, with fields that they do not know refused. Of the packaged chart the same comes out.
"""

import functools
import gzip
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".tools"
CHART = ROOT / "deploy" / "helm" / "attune"
CASES = sorted((CHART / "ci").glob("*-values.yaml"))
CONTAINERFILE = ROOT / "deploy" / "Containerfile"
DEFINITIONS = "_definitions.json"


def main() -> None:
    problems = container_file_problems()
    with tempfile.TemporaryDirectory() as folder:
        run("helm", "package", str(CHART), "--destination", folder)
        (packaged,) = Path(folder).iterdir()
        for case in CASES:
            run("helm", "lint", "--strict", "--quiet", str(CHART), "--values", str(case))
            rendered = render(values=case)
            if render(packaged, values=case) != rendered:
                problems.append(f"{case.name}: the packaged chart renders something else")
            found = [problem for manifest in manifests(rendered) for problem in manifest_problems(manifest)]
            problems += [f"{case.name}: {problem}" for problem in found]
            print(f"check-chart: {case.name}: {len(list(manifests(rendered)))} objects, {len(found)} problems")
    sys.exit("\n".join(problems) or None)


class ToolFailed(Exception):  # noqa: N818 - reads as what it says where it is raised
    """A program that ended with another status than 0. What it said is the message."""


def run(tool: str, *arguments: str) -> str:
    """Standard output of a program of .tools/. Raises ToolFailed."""
    done = subprocess.run([str(TOOLS / tool), *arguments], capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise ToolFailed(f"{tool} {' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return done.stdout


def container_file_problems() -> list[str]:
    try:
        run("hadolint", "--config", str(ROOT / "deploy" / "hadolint.yaml"), str(CONTAINERFILE))
    except ToolFailed as failed:
        return [str(failed)]
    return []


def render(chart: Path = CHART, *, values: Path | None = None, options: tuple[str, ...] = ()) -> str:
    """What Helm makes of the chart. Raises ToolFailed, with the schema's refusals, for instance."""
    given = ("--values", str(values)) if values else ()
    return run("helm", "template", "run", str(chart), "--namespace", "attune", *given, *options)


class _OneOfEachKey(yaml.CSafeLoader):
    """Refuses a mapping that has a key twice, where YAML readers take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(set(keys)) < len(keys):
            raise yaml.constructor.ConstructorError(None, None, f"a key twice among {keys}", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def manifests(rendered: str) -> Iterator[dict[str, Any]]:
    return (manifest for manifest in yaml.load_all(rendered, Loader=_OneOfEachKey) if manifest)


def manifest_problems(manifest: Mapping[str, Any]) -> list[str]:
    """What a manifest has that its schemas do not allow; a kind without a schema is a problem too."""
    name = f"{manifest['kind']} {manifest['metadata']['name']}"
    custom = custom_validator(manifest["apiVersion"], manifest["kind"])
    validators = {manifest["apiVersion"]: custom} if custom else kubernetes_validators(manifest)
    if not validators:
        return [f"{name}: no schema of {manifest['apiVersion']} {manifest['kind']}"]
    return [
        f"{name} ({version}): {'.'.join(map(str, error.absolute_path))}: {error.message}"
        for version, validator in validators.items()
        for error in validator.iter_errors(manifest)
    ]


def kubernetes_validators(manifest: Mapping[str, Any]) -> dict[str, Draft202012Validator]:
    group, _, version = manifest["apiVersion"].rpartition("/")
    parts = [manifest["kind"].lower(), *([group.partition(".")[0]] if group else []), version]
    found = {folder.name: folder / f"{'-'.join(parts)}.json" for folder in sorted((TOOLS / "kubernetes").iterdir())}
    return {name: kubernetes_validator(path) for name, path in found.items() if path.exists()}


@functools.cache
def kubernetes_validator(path: Path) -> Draft202012Validator:
    return Draft202012Validator(json.loads(path.read_bytes()), registry=definitions(path.parent))


@functools.cache
def definitions(folder: Path) -> Registry[Any]:
    contents = json.loads((folder / DEFINITIONS).read_bytes())
    resource = Resource.from_contents(contents, default_specification=DRAFT202012)
    return Registry().with_resource(DEFINITIONS, resource).crawl()


@functools.cache
def custom_validator(api_version: str, kind: str) -> Draft202012Validator | None:
    path = ROOT / "deploy" / "schemas" / f"{api_version.partition('/')[0]}_{kind}.json.gz"
    if not path.exists():
        return None
    return Draft202012Validator(closed(json.loads(gzip.decompress(path.read_bytes()))))


def closed(schema: Any) -> Any:
    """A CustomResourceDefinition's schema that refuses unknown fields, which the API server would drop in silence."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    strict = {key: closed(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        strict["properties"] = {name: closed(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            strict.setdefault("additionalProperties", False)
    return strict


if __name__ == "__main__":
    main()
