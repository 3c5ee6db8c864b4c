"""status.json: what each part does now, for who watches; worth nothing to the run."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.pulse import Pulse
from cluster.run_dir import RunDir
from cluster.status import StatusFile, parts_of


@dataclass
class Actor:
    name: str
    pulse: Pulse


@dataclass
class Kind:
    name: str


@dataclass
class Kept:
    kind: str
    part: Kind
    now: Actor | None


@dataclass
class Crew:
    """What a supervisor holds, as far as it is looked at."""

    kept: list[Kept] = field(default_factory=list)
    learners: list[Actor] = field(default_factory=list)
    others: list[Actor] = field(default_factory=list)


def actor(name: str, *answers: tuple[int, bool]) -> Actor:
    pulse = Pulse(handle=None, moved=0.0)
    for place, answer in enumerate(answers):
        pulse.asked = 10.0 * place
        pulse.heard(answer, float(place))
    return Actor(name, pulse)


def crew() -> Any:
    return Crew(
        kept=[
            Kept("rollout", Kind("rollout"), actor("rollout-0", (1, True), (1, True))),
            Kept("rollout", Kind("rollout"), actor("rollout-1")),
            Kept("rollout", Kind("rollout"), None),
            Kept("scoring_worker", Kind("scoring"), actor("scoring-0", (4, False))),
        ],
        learners=[actor("learner-0", (0, False))],
    )


def test_every_part_has_its_state() -> None:
    parts = parts_of(crew(), "training", 10.0)
    states = [(part["name"], part["state"]) for part in parts]
    assert states == [
        ("rollout-0", "working"), ("rollout-1", "starting"), ("rollout", "gone"), ("scoring-0", "waiting"),
        ("learner-0", "working"),
    ]  # fmt: skip
    assert parts[0]["still_s"] == 10.0
    assert parts_of(crew(), "waiting for the batch: 3 scored", 10.0)[-1]["state"] == "waiting"


def read(run: RunDir) -> dict[str, Any]:
    return json.loads(run.status.read_text())


def test_a_phase_is_told_at_once_and_its_numbers_are_not_a_new_one(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.steps_done = 7
    status = StatusFile(run, 20)
    status.phase("waiting for the batch: 1 scored")
    first = read(run)
    assert (first["phase"], first["steps_done"], first["total_steps"]) == ("waiting for the batch: 1 scored", 7, 20)
    status.phase("waiting for the batch: 2 scored")
    assert read(run) == first, "twice in a second nothing is written"
    status.phase("training")
    assert read(run)["phase"] == "training"
    status.beat(crew())
    status.end("finished")
    assert (read(run)["phase"], read(run)["parts"]) == ("finished", [])


def test_where_it_cannot_be_written_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunDir(tmp_path / "gone")
    status = StatusFile(run, 20)
    for phase in ("training", "publishing weights", "training"):
        status.phase(phase)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert not run.path.exists()


def test_events_say_at_which_step_they_were(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.event("early")
    run.steps_done = 3
    run.event("rollout_died", actor="rollout-0")
    rows = [json.loads(line) for line in run.events.read_text().splitlines()]
    assert "at_step" not in rows[0]
    assert rows[1]["at_step"] == 3
