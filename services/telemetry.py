"""The sinks that a step's metrics go to.

Invariant 10: watching never stops the run. A sink that fails is reported once, switched off, and training goes on. The
one exception is `metrics.jsonl`, which is part of the run directory's contract and is written by the driver itself.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from services.errors import UserError

log = logging.getLogger(__name__)

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


class Sink(Protocol):
    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoardSink:
    def __init__(self, run_dir: Path, _name: str, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer: Any = SummaryWriter(log_dir=str(run_dir / "tensorboard"))
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```")  # pyright: ignore[reportUnknownMemberType]

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    def __init__(self, run_dir: Path, name: str, config: Mapping[str, Any]) -> None:
        wandb: Any = _import("wandb")
        self._run: Any = wandb.init(project="attune", name=name, dir=str(run_dir), config=dict(config))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    def __init__(self, run_dir: Path, name: str, config: Mapping[str, Any]) -> None:
        self._mlflow: Any = _import("mlflow")
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            self._mlflow.set_tracking_uri((run_dir / "mlflow").resolve().as_uri())
        self._mlflow.set_experiment("attune")
        self._mlflow.start_run(run_name=name)
        self._mlflow.log_dict(dict(config), "config.json")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(metrics), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class TrackioSink:
    def __init__(self, _run_dir: Path, name: str, config: Mapping[str, Any]) -> None:
        self._trackio: Any = _import("trackio")
        self._trackio.init(project="attune", name=name, config=dict(config))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._trackio.log(dict(metrics), step=step)

    def close(self) -> None:
        self._trackio.finish()


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"run.trackers names {name!r}, which is not installed: pip install 'attune[{name}]'") from error


_SINKS: dict[str, type[TensorBoardSink] | type[WandbSink] | type[MlflowSink] | type[TrackioSink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "mlflow": MlflowSink,
    "trackio": TrackioSink,
}


class Telemetry:
    """Writes a step's metrics to every tracker that still works.

    Raises:
        UserError: at construction, where a tracker that the recipe asks for is not installed.
    """

    def __init__(self, trackers: Sequence[str], run_dir: Path, name: str, config: Mapping[str, Any]) -> None:
        self._sinks: dict[str, Sink] = {}
        for tracker in trackers:
            try:
                self._sinks[tracker] = _SINKS[tracker](run_dir, name, config)
            except UserError:
                raise
            except ImportError as error:
                raise UserError(f"run.trackers names {tracker!r}, which is not installed: {error}") from error
            except Exception as error:  # a tracker's server may be down: invariant 10
                log.warning("tracker %s did not start and is left out of this run: %s", tracker, error)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                sink.write(step, metrics)
            except Exception as error:  # invariant 10
                log.warning("tracker %s failed at step %d and is switched off: %s", name, step, error)
                del self._sinks[name]

    def close(self) -> None:
        for name, sink in self._sinks.items():
            try:
                sink.close()
            except Exception as error:  # invariant 10
                log.warning("tracker %s did not close: %s", name, error)
        self._sinks = {}
