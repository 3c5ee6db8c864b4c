"""Runs of the whole service: real Ray, DeepSpeed, Redis and HTTP, a tiny policy, the command line as users call it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from cluster.cli import run_command

Recipe = Callable[..., Path]


@pytest.fixture
def recipe(tmp_path: Path, tiny_decoder: Path, questions_file: Path) -> Recipe:
    """Writes a recipe for the tiny policy; `overrides` are sections laid over it."""

    def write(**overrides: dict[str, object]) -> Path:
        tree: dict[str, dict[str, object]] = {
            "run": {"seed": 3, "epochs": 1, "groups_per_step": 4, "trackers": []},
            "data": {"source": str(questions_file)},
            "salience": {"content": "user"},
            "policy": {"model": str(tiny_decoder)},
            "rollout": {"samples": 2, "max_tokens": 8, "actors": 1, "poll_s": 0.02},
            "reward": {"sources": {"attention": {"kind": "attention", "preset": "comparable"}}},
            "learner": {"lr": 1e-3, "value_lr": 1e-3, "ranks": 1},
            "checkpoint": {"every": 2, "keep": 0},
            "cluster": {"start_s": 120, "batch_s": 60, "step_s": 60},
        }
        for name, section in overrides.items():
            tree[name] = {**tree.get(name, {}), **section}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    return write


@pytest.fixture
def start(ray_session: str) -> Callable[..., subprocess.Popen[str]]:
    """Starts `attune ARGUMENTS` as a process of its own that joins the session's cluster."""

    def run(*arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "RAY_ADDRESS": ray_session}
        return subprocess.Popen(
            [sys.executable, "-m", "cluster", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return run


@pytest.fixture
def attune(ray_session: str, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs `attune ARGUMENTS` to its end in this process; (exit code, what it printed).

    The same function as the command's, with the session's Ray connection: a process of its own would spend most of
    its life importing. Its actors, Redis and HTTP server are processes either way.
    """
    del ray_session

    def run(*arguments: str) -> tuple[int, str]:
        capfd.readouterr()
        code = run_command(list(arguments))
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    return run
