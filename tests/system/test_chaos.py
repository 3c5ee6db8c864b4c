"""A few kills of `python -m tests.chaos`: a run ends whole, with nothing lost, trained twice or left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_what_is_killed_costs_no_prompt(tmp_path: Path) -> None:
    """Seed 7: the driver in mid-transfer, a learner rank in mid-checkpoint."""
    command = [sys.executable, "-m", "tests.chaos", "--kills", "2", "--seed", "7", "--directory", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {death for death, times in found["to_progress"].items() if times["kills"]} == {
        "learner", "driver", "all",
    }  # fmt: skip
    assert found["groups"] == 24 + 8 * 2
    assert (found["lost"], found["failed"], found["trained_twice"], found["orphans"]) == (0, 0, 0, 0)
    assert found["driver_starts"] == 2
