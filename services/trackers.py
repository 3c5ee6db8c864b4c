"""The trackers that a recipe may name (`run.trackers`): each an opener that is called in a thread of its own.

The package is looked for at once, so that a missing one ends the run before it starts; whatever may wait for a network
is left to the opener.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from services.errors import UserError
from services.histogram import Histogram

MLFLOW_BATCH = 1000
"""Figures that MLflow takes in one request."""


WANDB_INIT_S = 30
"""Seconds for W&B's server to take the run: the end of the process waits for it too."""


class Sink(Protocol):
    def write(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None: ...

    def close(self) -> None: ...


class TensorBoardSink:
    def __init__(self, writer: Any, config: Mapping[str, Any]) -> None:
        self._writer = writer
        writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```")

    def write(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        for key, each in histograms.items():
            # The last bucket has no bound of its own: it ends at the largest value.
            limits = [*each.bounds, max(each.high, each.bounds[-1] + 1e-12)]
            self._writer.add_histogram_raw(
                key, each.low, each.high, each.count, each.total, each.squares, limits, list(each.counts), step
            )
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    def __init__(self, wandb: Any, run_dir: Path, name: str, config: Mapping[str, Any]) -> None:
        self._wandb = wandb
        # It would redirect this process's output otherwise, which is the run's.
        quiet = wandb.Settings(console="off", silent=True, init_timeout=WANDB_INIT_S)
        self._run = wandb.init(project="attune", name=name, dir=str(run_dir), config=dict(config), settings=quiet)

    def write(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        drawn = {key: self._wandb.Histogram(np_histogram=_edges(each)) for key, each in histograms.items()}
        self._run.log({**metrics, **drawn}, step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    """By MLflow's client: its fluent interface asks the server again when the process ends, and waits for it."""

    def __init__(self, mlflow: Any, run_dir: Path, name: str, config: Mapping[str, Any]) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = (run_dir / "mlflow").resolve().as_uri()
            # Files are what mlflow-skinny can write without a database; from 3 on it wants to be told so.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        self._metric = mlflow.entities.Metric
        known = self._client.get_experiment_by_name("attune")
        experiment = self._client.create_experiment("attune") if known is None else known.experiment_id
        self._run_id: str = self._client.create_run(experiment, run_name=name).info.run_id
        self._client.log_dict(self._run_id, dict(config), "config.json")

    def write(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        """Histograms are left out: MLflow has none."""
        del histograms
        now = int(time.time() * 1000)
        figures = [self._metric(key, float(value), now, step) for key, value in metrics.items()]
        for start in range(0, len(figures), MLFLOW_BATCH):
            self._client.log_batch(self._run_id, metrics=figures[start : start + MLFLOW_BATCH])

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


class TrackioSink:
    def __init__(self, trackio: Any, name: str, config: Mapping[str, Any]) -> None:
        self._trackio = trackio
        trackio.init(project="attune", name=name, config=dict(config))

    def write(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram]) -> None:
        """Histograms are left out: what trackio draws them from is every single value."""
        del histograms
        self._trackio.log(dict(metrics), step=step)

    def close(self) -> None:
        self._trackio.finish()


Opener = Callable[[], Sink]


def _tensorboard(run_dir: Path, _name: str, config: Mapping[str, Any]) -> Opener:
    try:
        module: Any = importlib.import_module("torch.utils.tensorboard.writer")
    except ImportError as error:
        raise UserError(f"run.trackers names 'tensorboard', which is not installed: {error}") from error
    return lambda: TensorBoardSink(module.SummaryWriter(log_dir=str(run_dir / "tensorboard")), config)


def _wandb(run_dir: Path, name: str, config: Mapping[str, Any]) -> Opener:
    wandb = _import("wandb")
    return lambda: WandbSink(wandb, run_dir, name, config)


def _mlflow(run_dir: Path, name: str, config: Mapping[str, Any]) -> Opener:
    mlflow = _import("mlflow")
    return lambda: MlflowSink(mlflow, run_dir, name, config)


def _trackio(_run_dir: Path, name: str, config: Mapping[str, Any]) -> Opener:
    trackio = _import("trackio")
    return lambda: TrackioSink(trackio, name, config)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"run.trackers names {name!r}, which is not installed: pip install 'attune[{name}]'") from error


def _edges(each: Histogram) -> tuple[list[int], list[float]]:
    """Counts, and the edges of as many buckets: the outermost end at the smallest and the largest value."""
    low = min(each.low, each.bounds[0])
    return list(each.counts), [low - sys.float_info.epsilon, *each.bounds, max(each.high, each.bounds[-1] + 1e-12)]


OPENERS: dict[str, Callable[[Path, str, Mapping[str, Any]], Opener]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
