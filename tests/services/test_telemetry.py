"""Trackers: what fails is switched off and said, the others go on; one that is not installed is the user's to mend."""

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from services.errors import UserError
from services.telemetry import TRACKERS, Telemetry

CONFIG = {"run": {"name": "mine"}}

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
def init(project, name, dir, config):
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


def test_a_figure_that_a_tracker_does_not_take_ends_that_tracker_only(tmp_path: Path) -> None:
    watch = telemetry(tmp_path, "tensorboard")
    watch.write(0, {"a": 1.0})
    watch.write(1, {"a": object()})  # type: ignore[dict-item]
    watch.write(2, {"a": 3.0})
    watch.close()
    assert scalars(tmp_path) == {"a": [(0, 1.0)]}
