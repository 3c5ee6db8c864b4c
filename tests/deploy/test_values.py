"""values.schema.json: what it refuses, Helm refuses, with the place and the name of what is wrong."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "attune"

WRONG = {
    "a misspelt key": ("image.tga=1.0", "at '/image': additional properties 'tga' not allowed"),
    "an unknown section": ("worker.replicas=2", "additional properties 'worker' not allowed"),
    "an unknown kind": ("kind=RayJbo", "at '/kind': value must be one of 'RayJob', 'RayCluster'"),
    "a text for a number": ("job.backoffLimit=three", "at '/job/backoffLimit': got string, want integer"),
    "a negative number": ("head.cpu=-1", "at '/head/cpu'"),
    "a percentage": ("podDisruptionBudget.workers=50%", "at '/podDisruptionBudget/workers': got string, want integer"),
    "a negative size": ("storage.size=-3Gi", "at '/storage/size': '-3Gi' does not match"),
    "a size without sense": ("head.memory=lots", "at '/head/memory': 'lots' does not match"),
    "a password in clear": ("redis.password=hunter2", "at '/redis': additional properties 'password' not allowed"),
    "a password in the URL": ("redis.mode=external,redis.url=redis://a:b@c", "at '/redis/url': 'redis://a:b@c'"),
    "a token in clear": ("extraEnv[0].name=HF_TOKEN,extraEnv[0].value=hf_x", "at '/extraEnv/0': missing property"),
    "a token in clear, in one word": (
        "extraEnv[0].name=MYTOKEN,extraEnv[0].value=x",
        "at '/extraEnv/0': missing property",
    ),
    "a key of a judge": ("extraEnv[0].name=JUDGE_KEY,extraEnv[0].value=x", "at '/extraEnv/0': missing property"),
    "a secret with an end": ("extraEnv[0].name=SECRET_BASE,extraEnv[0].value=x", "at '/extraEnv/0': missing property"),
    "a password as override": ("overrides[0]=stream.password=x", "at '/overrides/0'"),
    "an override for the shell": ("overrides[0]=run.name=$(id)", "at '/overrides/0': 'run.name=$(id)' does not match"),
    "an external Redis without URL": ("redis.mode=external", "at '/redis/url': minLength"),
    "a RayService without sources": ("rewardServer.kind=RayService", "at '/rewardServer/section': missing property"),
    "a Ray without token authentication": ("ray.version=2.40.0", "at '/ray/version': '2.40.0' does not match"),
    "a digest that is none": ("image.digest=latest", "at '/image/digest': 'latest' does not match"),
    "no grace at all": ("stop.graceSeconds=0", "at '/stop/graceSeconds': minimum: got 0, want 10"),
    "root": ("security.runAsUser=0", "at '/security/runAsUser': minimum: got 0, want 1"),
    "an open mode of access": ("storage.accessModes[0]=ReadOnlyMany", "at '/storage/accessModes/0'"),
}


@pytest.mark.parametrize(("setting", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_value_is_refused_with_its_name(checker: ModuleType, setting: str, said: str) -> None:
    with pytest.raises(checker.ToolFailed) as refused:
        checker.render(options=("--set", setting))
    assert "values don't meet the specifications of the schema" in str(refused.value)
    assert said in str(refused.value)


def test_a_name_that_kuberay_cannot_take_is_refused(checker: ModuleType) -> None:
    with pytest.raises(checker.ToolFailed, match='the name "1st": KubeRay wants'):
        checker.render(options=("--set", "fullnameOverride=1st"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("run.resume=/data/runs/a/checkpoints/step_4", 'run.resume is "/data/runs/a/checkpoints/step_4": every retry'),
        ("run.resume=never", "set job.backoffLimit to 0"),
        ("recipe.path=", "recipe: path, inline and configMap.name are all empty"),
    ],
)
def test_values_that_do_not_go_together_are_refused(checker: ModuleType, options: str, said: str) -> None:
    with pytest.raises(checker.ToolFailed, match=said):
        checker.render(options=("--set", options))
    assert checker.render(options=("--set", "run.resume=never,job.backoffLimit=0"))


def test_a_variable_is_no_secret_for_beginning_like_one(checker: ModuleType) -> None:
    given = "extraEnv[0].name=TOKENIZERS_PARALLELISM,extraEnv[0].value=off"
    assert "TOKENIZERS_PARALLELISM" in checker.render(options=("--set", given))


def test_schema_and_values_have_the_same_keys() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    known = {path for path in _known(schema, schema) if path != ("global",)}
    assert known == set(_given(values, schema, schema))


def _resolved(node: Any, schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in node:
        return schema["definitions"][node["$ref"].rpartition("/")[2]]
    return next((_resolved(each, schema) for each in node.get("anyOf", []) if "$ref" in each), node)


def _known(node: Any, schema: dict[str, Any]) -> Any:
    for name, below in _resolved(node, schema).get("properties", {}).items():
        yield (name,)
        yield from ((name, *path) for path in _known(below, schema))


def _given(values: Any, node: Any, schema: dict[str, Any]) -> Any:
    """Keys of the values, as deep as the schema names any."""
    named = _resolved(node, schema).get("properties", {})
    for name, below in values.items() if isinstance(values, dict) and named else ():
        yield (name,)
        yield from ((name, *path) for path in _given(below, named.get(name, {}), schema))


def test_what_no_schema_knows_is_a_problem(checker: ModuleType) -> None:
    unknown = {"apiVersion": "example.org/v1", "kind": "Thing", "metadata": {"name": "x"}}
    assert checker.manifest_problems(unknown) == ["Thing x: no schema of example.org/v1 Thing"]
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"selektor": {}}}
    assert [problem for problem in checker.manifest_problems(service) if "'selektor' was unexpected" in problem]
    ray = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": "x"},
        "spec": {"backoffLimit": "3", "x": 1},
    }
    said = "; ".join(checker.manifest_problems(ray))
    assert "spec.backoffLimit: '3' is not of type 'integer'" in said
    assert "'x' was unexpected" in said


def test_a_key_twice_is_refused(checker: ModuleType) -> None:
    with pytest.raises(yaml.YAMLError, match="a key twice"):
        list(checker.manifests("spec: {a: 1, a: 2}"))


@pytest.mark.slow
def test_the_whole_check_passes() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/check_chart.py"], cwd=ROOT, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert "default-values.yaml" in done.stdout
