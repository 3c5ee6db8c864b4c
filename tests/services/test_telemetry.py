"""Trackers: what fails is switched off and said, the others go on; what hangs holds nothing up; one that is not
installed is the user's to mend."""

import importlib.util
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from services.errors import UserError
from services.histogram import Histogram, histogram, weighted_histogram
from services.telemetry import QUEUED, Telemetry
from services.trackers import OPENERS

CONFIG = {"run": {"name": "mine"}}
PROGRAM = Path(__file__).with_name("tracker_program.py")
TRACKERS = sorted(OPENERS)

# Trackers as packages of their own, which write down how they were called.
WANDB = """
calls = []
class Run:
    def log(self, metrics, step):
        calls.append(("log", step, metrics))
        if FAIL == "log":
            raise ConnectionError("no route to host")
    def finish(self):
        calls.append(("finish",))
        if FAIL == "finish":
            raise ConnectionError("no route to host")
class Settings:
    def __init__(self, **settings): pass
def init(project, name, dir, config, settings):
    calls.append(("init", project, name, config))
    if FAIL == "init":
        raise ConnectionError("no route to host")
    return Run()
"""
TRACKIO = """
calls = []
def init(project, name, config): calls.append(("init", project, name, config))
def log(metrics, step): calls.append(("log", step, metrics))
def finish(): calls.append(("finish",))
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    made: list[str] = []

    def make(name: str, source: str) -> None:
        (tmp_path / "packages").mkdir(exist_ok=True)
        (tmp_path / "packages" / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path / "packages")
        made.append(name)

    yield make
    for name in made:
        sys.modules.pop(name, None)


def telemetry(tmp_path: Path, *trackers: str) -> Telemetry:
    return Telemetry(trackers, tmp_path / "run", "mine", CONFIG)


def scalars(tmp_path: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_needs_nothing_else(tmp_path: Path) -> None:
    watch = telemetry(tmp_path, "tensorboard")
    watch.write(0, {"reward/mean": 0.5, "kl/reference": 0.0})
    watch.write(1, {"reward/mean": 0.75})
    watch.close()
    assert scalars(tmp_path) == {"reward/mean": [(0, 0.5), (1, 0.75)], "kl/reference": [(0, 0.0)]}


def test_no_tracker_is_fine(tmp_path: Path) -> None:
    watch = telemetry(tmp_path)
    watch.write(0, {"a": 1.0})
    watch.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tracker", [name for name in TRACKERS if name != "tensorboard"])
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(tmp_path: Path, tracker: str) -> None:
    if importlib.util.find_spec(tracker) is not None:
        pytest.skip(f"{tracker} is installed here")
    with pytest.raises(UserError) as caught:
        telemetry(tmp_path, tracker)
    assert f"run.trackers names '{tracker}', which is not installed: pip install 'attune[{tracker}]'" in str(
        caught.value
    )


def test_every_extra_that_is_named_exists() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    assert {name for name in TRACKERS if name != "tensorboard"} <= set(project["optional-dependencies"])


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_is_given_the_run_its_metrics_and_its_end(
    tmp_path: Path, package: Callable[[str, str], None], name: str
) -> None:
    package(name, {"wandb": WANDB, "trackio": TRACKIO}[name].replace("FAIL", "None"))
    watch = telemetry(tmp_path, name)
    watch.write(4, {"reward/mean": 0.5})
    watch.close()
    watch.write(5, {"reward/mean": 0.5})
    assert sys.modules[name].calls == [
        ("init", "attune", "mine", CONFIG),
        ("log", 4, {"reward/mean": 0.5}),
        ("finish",),
    ]


def test_a_tracker_that_fails_is_switched_off_and_said_once_while_the_others_go_on(
    tmp_path: Path, package: Callable[[str, str], None], caplog: pytest.LogCaptureFixture
) -> None:
    package("wandb", WANDB.replace("FAIL", "'log'"))
    package("trackio", TRACKIO)
    watch = telemetry(tmp_path, "wandb", "tensorboard", "trackio")
    with caplog.at_level(logging.WARNING, logger="services.telemetry"):
        for step in range(3):
            watch.write(step, {"reward/mean": float(step)})
        watch.close()
    assert [record.getMessage() for record in caplog.records] == [
        "tracker wandb failed at step 0 and is switched off: no route to host"
    ]
    assert [call[0] for call in sys.modules["wandb"].calls] == ["init", "log"]
    assert [call[0] for call in sys.modules["trackio"].calls] == ["init", "log", "log", "log", "finish"]
    assert scalars(tmp_path) == {"reward/mean": [(0, 0.0), (1, 1.0), (2, 2.0)]}


@pytest.mark.parametrize(
    ("where", "said"), [("init", "did not start and is left out of this run"), ("finish", "did not close")]
)
def test_a_tracker_whose_server_is_down_at_either_end_stops_nothing(
    tmp_path: Path, package: Callable[[str, str], None], caplog: pytest.LogCaptureFixture, where: str, said: str
) -> None:
    package("wandb", WANDB.replace("FAIL", repr(where)))
    with caplog.at_level(logging.WARNING, logger="services.telemetry"):
        watch = telemetry(tmp_path, "wandb", "tensorboard")
        watch.write(0, {"a": 1.0})
        watch.close()
    assert [record.getMessage() for record in caplog.records] == [f"tracker wandb {said}: no route to host"]
    assert scalars(tmp_path) == {"a": [(0, 1.0)]}


def test_histograms_go_to_tensorboard_with_their_buckets(tmp_path: Path) -> None:
    each = histogram([-0.5, 0.1, 0.2, 0.2, 3.0], (0.0, 0.2, 1.0))
    assert each is not None
    assert (each.counts, each.count, each.low, each.high) == ((1, 3, 0, 1), 5, -0.5, 3.0)
    watch = telemetry(tmp_path, "tensorboard")
    watch.write(7, {}, {"reward/histogram": each})
    watch.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    (event,) = events.Histograms("reward/histogram")
    assert event.step == 7
    value = event.histogram_value
    assert (value.min, value.max, value.num, value.sum) == (-0.5, 3.0, 5.0, pytest.approx(3.0))
    assert dict(zip(value.bucket_limit, value.bucket, strict=True)) == {0.0: 1.0, 0.2: 3.0, 1.0: 0.0, 3.0: 1.0}


def test_a_histogram_counts_what_is_weighted_and_is_none_of_nothing() -> None:
    each = weighted_histogram([(0, 5), (1, 2), (9, 1), (4, 0)], (0.0, 1.0, 2.0))
    assert each is not None
    assert (each.counts, each.total, each.squares, each.high) == ((5, 2, 0, 1), 11.0, 83.0, 9)
    assert histogram([], (0.0,)) is None


class Stuck:
    """A sink that does not return from its first write until it may; beside it what it wrote."""

    def __init__(self, may: threading.Event, written: list[int]) -> None:
        self.may, self.written = may, written

    def write(self, step: int, _metrics: Mapping[str, float], _histograms: Mapping[str, Histogram]) -> None:
        assert self.may.wait(60)
        self.written.append(step)

    def close(self) -> None:
        self.written.append(-1)


def stuck(tmp_path: Path, open_sink: Callable[[], Any]) -> Telemetry:
    return Telemetry(["tensorboard"], tmp_path / "run", "mine", CONFIG, others={"stuck": open_sink})


def test_a_sink_that_hangs_holds_up_neither_the_run_nor_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    may, written, steps = threading.Event(), list[int](), QUEUED + 10
    watch = stuck(tmp_path, lambda: Stuck(may, written))
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="services.telemetry"):
        for step in range(steps):
            watch.write(step, {"a": float(step)})
            while step == 0 and watch.waiting("stuck"):
                time.sleep(0.001)  # until it has taken the first: what follows is queued
        watch.close(2.0)
    assert time.monotonic() - began < 30
    assert written == []
    assert [record.getMessage() for record in caplog.records if "tracker stuck" in record.getMessage()] == [
        f"tracker stuck is {QUEUED} steps behind: steps from {QUEUED + 1} on are dropped until it catches up",
        f"tracker stuck did not close in time, and is left: {QUEUED + 9} steps were not written",
    ]
    assert len(scalars(tmp_path)["a"]) >= QUEUED
    may.set()


def test_a_sink_that_catches_up_has_what_was_not_dropped_and_is_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    may, written = threading.Event(), list[int]()
    watch = stuck(tmp_path, lambda: Stuck(may, written))
    with caplog.at_level(logging.WARNING, logger="services.telemetry"):
        watch.write(0, {"a": 0.0})
        while watch.waiting("stuck"):
            time.sleep(0.001)
        for step in range(1, QUEUED + 4):
            watch.write(step, {"a": float(step)})
        may.set()
        watch.close(60.0)
    assert written == [*range(QUEUED + 1), -1]
    assert "tracker stuck was too slow: 3 steps were dropped" in [record.getMessage() for record in caplog.records]


def test_a_sink_whose_server_does_not_answer_when_it_is_opened_holds_nothing_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    may, written = threading.Event(), list[int]()

    def open_sink() -> Stuck:
        assert may.wait(60)
        return Stuck(may, written)

    watch = stuck(tmp_path, open_sink)
    with caplog.at_level(logging.WARNING, logger="services.telemetry"):
        watch.write(0, {"a": 1.0})
        watch.close(1.0)
    assert scalars(tmp_path) == {"a": [(0, 1.0)]}
    assert "did not close in time, and is left: 1 steps were not written" in caplog.records[-1].getMessage()
    may.set()


def run_program(tracker: str, directory: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """The program's last line, from a process of its own whose home is in `directory`."""
    pytest.importorskip(tracker, reason=f"{tracker} is an extra that is not installed here")
    root = PROGRAM.parents[2]
    ran = subprocess.run(
        [sys.executable, str(PROGRAM), tracker, str(directory), *arguments],
        env={**os.environ, "HOME": str(directory), "PYTHONPATH": str(root), **environment},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (last,) = (line for line in ran.stdout.splitlines() if line.startswith('{"write_s"'))
    return {"said": ran.stdout, **json.loads(last)}


def test_wandb_keeps_a_run_without_a_network(tmp_path: Path) -> None:
    run_program("wandb", tmp_path, "60", WANDB_MODE="offline")
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"reward/mean" in file.read_bytes()
    assert b"histogram" in file.read_bytes()


@pytest.mark.parametrize("tracker", ["mlflow", "trackio"])
def test_a_tracker_keeps_a_run_on_this_machine(tmp_path: Path, tracker: str) -> None:
    told = run_program(tracker, tmp_path, "60", TRACKIO_DIR=str(tmp_path / "trackio"))
    assert told["found"]["steps"] == {"0": 0.0, "1": 0.5, "2": 1.0}


@pytest.mark.parametrize(
    "tracker",
    ["mlflow", pytest.param("wandb", marks=pytest.mark.slow)],  # its process waits 30 s for its server
)
def test_a_server_that_never_answers_holds_up_neither_the_run_nor_its_end(tmp_path: Path, tracker: str) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as hole:  # takes connections, and says nothing
        url = f"http://127.0.0.1:{hole.getsockname()[1]}"
        began = time.monotonic()
        told = run_program(
            tracker, tmp_path, "1", "blind",
            MLFLOW_TRACKING_URI=url, WANDB_BASE_URL=url, WANDB_API_KEY="0" * 40, WANDB_MODE="online",
        )  # fmt: skip
    assert told["write_s"] < 1.0
    assert told["close_s"] < 10.0
    assert time.monotonic() - began < 120
    assert f"tracker {tracker} did not close in time, and is left: 3 steps were not written" in told["said"]


def test_a_figure_that_a_tracker_does_not_take_ends_that_tracker_only(tmp_path: Path) -> None:
    watch = telemetry(tmp_path, "tensorboard")
    watch.write(0, {"a": 1.0})
    watch.write(1, {"a": object()})  # type: ignore[dict-item]
    watch.write(2, {"a": 3.0})
    watch.close()
    assert scalars(tmp_path) == {"a": [(0, 1.0)]}
