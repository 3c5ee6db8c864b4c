"""`attune doctor` on a Ray cluster: what its nodes have, and what Ray was told that they have."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.machine import look_here


def test_the_nodes_of_a_cluster_say_what_they_have(
    attune: Callable[..., tuple[int, str]],
    recipe: Callable[..., Path],
    ray_session: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_session)
    monkeypatch.setenv("COLUMNS", "200")
    file = tmp_path / "doctor.json"
    code, said = attune("doctor", str(recipe()), "--run-dir", str(tmp_path / "run"), "--json", str(file))
    assert code == 0, said
    figures = json.loads(file.read_text())
    assert figures["joined"]
    [machine] = figures["machines"]
    assert machine["cpus"] == 4  # as Ray was told, whatever the machine has
    assert machine["memory"] == look_here().memory
    assert figures["plan"] == {part: [machine["name"]] for part in figures["plan"]}
    assert "Ray dashboard: there is none" in said
    assert "RAY_JOB_STOP_WAIT_TIME_S at 30 or more" in said

    code, said = attune("doctor", str(recipe()), "cluster.learner_cpus=5")
    assert code == 3
    assert "no node has room for learner 1 of 1, which needs 5 CPU" in said
