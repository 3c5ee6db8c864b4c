"""Three steps through one tracker, as a run would: `python tracker_program.py TRACKER DIRECTORY SECONDS`. Prints what
the tracker's own library reads back, and how long writing and closing took."""

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

from services.histogram import histogram
from services.telemetry import Telemetry


def read_back(tracker: str, directory: Path) -> Any:
    if tracker == "mlflow":
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=(directory / "mlflow").resolve().as_uri())
        experiment = client.get_experiment_by_name("attune")
        assert experiment is not None
        (run,) = client.search_runs([experiment.experiment_id])
        history = client.get_metric_history(run.info.run_id, "reward/mean")
        return {"status": run.info.status, "steps": {str(each.step): each.value for each in history}}
    if tracker == "wandb":
        return None  # its file is whole when this process has ended
    import sqlite3

    steps: dict[str, Any] = {}
    for file in sorted(directory.rglob("*.db")):
        rows = sqlite3.connect(file).execute("select step, metrics from metrics").fetchall()
        steps |= {str(step): json.loads(metrics)["reward/mean"] for step, metrics in rows}
    return {"steps": steps}


def main() -> None:
    tracker, directory, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    directory.mkdir(parents=True, exist_ok=True)
    telemetry = Telemetry([tracker], directory, "mine", {"run": {"name": "mine"}})
    began = time.monotonic()
    for step in range(3):
        each = histogram([0.25, 0.5], (0.0, 0.3, 1.0))
        assert each is not None
        telemetry.write(step, {"reward/mean": step / 2, "kl/reference": 0.0}, {"reward/histogram": each})
    written = time.monotonic()
    telemetry.close(seconds)
    closed = time.monotonic()
    found = read_back(tracker, directory) if len(sys.argv) == 4 else None
    print(json.dumps({"write_s": written - began, "close_s": closed - written, "found": found}))


if __name__ == "__main__":
    main()
