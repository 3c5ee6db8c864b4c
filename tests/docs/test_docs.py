"""The documentation says what is true: links, commands, keys, files and examples are tried."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import typer
import yaml
from fastapi.testclient import TestClient
from pydantic import BaseModel

from cluster.cli import app
from cluster.config import Config
from cluster.recipe import load_recipe, load_reward_section
from reward_server.app import create_app
from reward_server.config import RewardSection

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
REWARD_RECIPES = sorted((ROOT / "recipes" / "reward").glob("*.yaml"))
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pages
def test_links_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


@pages
def test_files_of_the_repository_that_are_named_are_there(page: Path):
    named = re.findall(
        r"\b((?:recipes|docs|requirements|scripts|services|rollout|reward_server)/[\w./-]*\w)", page.read_text()
    )
    assert not [name for name in named if not (ROOT / name).exists()]


@pages
def test_commands_that_are_named_exist(page: Path):
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    named = re.findall(r"(?:^ {4}|`)attune ([a-z][a-z-]+)", page.read_text(), flags=re.MULTILINE)
    assert not [name for name in named if name not in commands]


@pages
def test_keys_that_are_named_exist(page: Path):
    sections = "|".join(Config.model_fields)
    unknown = []
    for path in re.findall(rf"(?<![\w./'-])((?:{sections})(?:\.[a-z_]+)+)\b(?!/)", page.read_text()):
        if path.rsplit(".", 1)[1] in ("jsonl", "yaml", "json", "md", "py", "cli"):
            continue
        if ROOT.joinpath(*path.split(".")[:2]).is_dir():  # a package, not a key
            continue
        if not is_key(Config, path.split(".")):
            unknown.append(path)
    assert not unknown


def is_key(model: type[BaseModel], path: list[str]) -> bool:
    """Whether a path of names is a key; below a mapping, or at `NAME`, anything is."""
    name, *rest = path
    if name not in model.model_fields:
        return False
    annotation = model.model_fields[name].annotation
    inner = next(
        (t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel)), None
    )
    return not rest or inner is None or is_key(inner, rest)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipes_resolve(recipe: Path):
    assert load_recipe(recipe).policy.model


@pytest.mark.parametrize("recipe", REWARD_RECIPES, ids=lambda path: path.name)
def test_reward_recipes_resolve(recipe: Path):
    assert load_reward_section(recipe, []).sources


@pytest.mark.parametrize("script", ["configuration_reference.py", "http_api.py", "metrics_reference.py", "grafana.py"])
def test_what_is_written_from_the_code_is_what_the_code_says(script: str):
    command = [sys.executable, f"scripts/{script}", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_scoring_example_is_scored_and_the_options_example_is_a_section():
    text = (ROOT / "docs" / "reward-server.md").read_text()
    example = re.search(r"-d '(\{.*?\})'", text, flags=re.DOTALL)
    assert example
    client = TestClient(create_app(load_reward_section(ROOT / "recipes" / "reward" / "attention.yaml")))
    answer = client.post("/v1/rewards", json=json.loads(example.group(1)))
    assert answer.status_code == 200
    assert answer.json()["results"][0]["status"] == "ok"
    text = "".join((ROOT / "docs" / page).read_text() for page in ("attention-reward.md", "rewards.md"))
    blocks = re.findall(r"^    reward:\n(?:     .*\n)+", text, re.MULTILINE)
    assert blocks
    for block in blocks:
        RewardSection.model_validate(yaml.safe_load(block)["reward"])


def test_dependencies_have_a_line_each():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    packages = {re.split(r"[\[<>=~ ]", name)[0] for name in named} - {"attune"}
    page = (ROOT / "docs" / "dependencies.md").read_text()
    assert not [package for package in sorted(packages) if not re.search(rf"\b{re.escape(package)}\b", page)]


def test_the_examples_of_other_clients_are_scored():
    text = (ROOT / "docs" / "reward-clients.md").read_text()
    examples = re.findall(r"http://127\.0\.0\.1:8077(/\w+) -H \S+ \S+ -d '(\{.*?\})'", text, flags=re.DOTALL)
    sources = {"words": {"kind": "length", "unit": "words"}, "same": {"kind": "exact_match", "required": False}}
    reward = {"sources": sources, "adapters": {"split_at": "<|assistant|>"}}
    client = TestClient(create_app(RewardSection.model_validate(reward)))
    assert [path for path, _ in examples] == ["/openrlhf", "/classify", "/score", "/rerank", "/predict", "/verify"]
    for path, body in examples:
        answer = client.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 200, (path, answer.text)
