"""The command line's own answers: what is used wrongly gets one message and exit code 2, and no traceback."""

import json
from pathlib import Path

import pytest

from cluster.cli import run_command


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train"], "recipe"),
        (["train", "recipe.yaml", "--no-such-option"], "--no-such-option"),
        (["evaluate", "recipe.yaml", "--split", "everything"], "everything"),
        (["quickstart", "--steps", "0"], "--steps"),
        (["no-such-command"], "no-such-command"),
        (["train", "no-such-recipe.yaml"], "no-such-recipe.yaml"),
        (["quickstart", "--family", "prefix"], "prefix"),
    ],
)
def test_wrong_usage_is_named(arguments: list[str], named: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(arguments) == 2
    said = capfd.readouterr().err
    assert named in said
    assert "Traceback" not in said


def test_help_lists_the_commands(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--help"]) == 0
    said = capfd.readouterr().out
    assert all(command in said for command in ("train", "quickstart", "sft", "export", "evaluate", "reward-server"))


def test_the_schema_describes_every_section(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "schema.json"
    assert run_command(["schema", "--out", str(file)]) == 0
    assert run_command(["schema"]) == 0
    schema = json.loads(file.read_text())
    assert schema == json.loads(capfd.readouterr().out)
    assert {"run", "data", "policy", "learner", "sft", "cluster"} <= set(schema["properties"])


def test_an_interrupt_ends_a_command_with_a_word(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cluster.export.read_commit", interrupted)
    assert run_command(["export", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "interrupted" in capfd.readouterr().err
