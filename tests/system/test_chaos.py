"""A few kills of `python -m tests.chaos`: a run ends whole, with nothing lost, trained twice or left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_what_is_killed_costs_no_prompt(tmp_path: Path) -> None:
    """Seed 20165: a rollout actor in mid-transfer, Redis between a step and its commit, a learner rank in
    mid-checkpoint. The driver's death is test_resume.py's."""
    command = [sys.executable, "-m", "tests.chaos", "--kills", "3", "--seed", "20165", "--directory", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {death for death, times in found["to_progress"].items() if times["kills"]} == {
        "rollout", "redis", "learner", "all",
    }  # fmt: skip
    assert found["groups"] == 24 + 12 * 3
    assert (found["lost"], found["failed"], found["trained_twice"], found["orphans"]) == (0, 0, 0, 0)
    assert found["disagreements"] == []
    assert found["at_moments"] == {"step": 1, "checkpoint": 1, "transfer": 1, "start": 0, "any": 0}
    assert found["driver_starts"] == 1
