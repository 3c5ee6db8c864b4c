"""The capture that stays on the device, driven by hand: chunks, drafts, preemption, and steps replayed as they were
recorded, as CUDA graphs are."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def outcomes() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("device_capture_program.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_steps_by_hand_as_they_were_recorded_and_on_two_ranks() -> None:
    """Rows are those of the tokens kept: not of a rejected draft, nor of what is computed again after a preemption."""
    outcome = outcomes()
    for found in outcome.values():
        assert found["errors"]["statistics"] <= 1e-5
        assert found["errors"]["dense"] <= 1e-5
        assert found["dense"] == ["a"]
        assert found["preempted"] == 1
        assert len(found["refused"]) == 2
    assert outcome["by hand"]["bits"] == outcome["replayed"]["bits"]
