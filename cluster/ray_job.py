"""What a driver that is a Ray job (`ray job submit`) needs to know of its place, and what Ray does to it.

Ray runs the driver in a copy of the working directory that it removes some time after the job; a stop is SIGTERM to
the driver *and to everything below it*, and SIGKILL to the same after RAY_JOB_STOP_WAIT_TIME_S (3 s where nothing is
set). Ray 2.60: `dashboard/modules/job/job_supervisor.py`, which reads that variable from its own environment: that of
the node, or of the job's runtime environment, which stands above it. The driver's is a copy of it.
"""

from collections.abc import Mapping
from pathlib import Path

from services.errors import UserError

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for the driver of a job alone."""

STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
STOP_WAIT_S = 3
"""Ray's own default."""

MARGIN_S = 10.0
"""Beyond `cluster.stop_s`: what a driver takes to end its actors, Redis and processes after the last commit."""

WORKING_DIRS = "working_dir_files"
"""The folder of a node that has the copies of working directories."""


def is_job(environ: Mapping[str, str]) -> bool:
    return JOB in environ


def stop_wait_s(environ: Mapping[str, str]) -> float:
    """Seconds from the SIGTERM of `ray job stop` to its SIGKILL, for a job with this environment."""
    try:
        return int(environ.get(STOP_WAIT, STOP_WAIT_S))
    except ValueError as error:
        raise UserError(
            f"{STOP_WAIT}: {environ[STOP_WAIT]!r} is no whole number of seconds; Ray would not stop the job cleanly"
        ) from error


def short_grace(stop_s: float, environ: Mapping[str, str]) -> str | None:
    """What is wrong with the grace that Ray gives to this job; None where it is long enough for `cluster.stop_s`."""
    given, needed = stop_wait_s(environ), stop_s + MARGIN_S
    if given >= needed:
        return None
    return (
        f"`ray job stop` kills this run {given:g} s after it has asked it to end, and cluster.stop_s is {stop_s:g}: a "
        f"last commit may be cut off, and the one before is gone on from. Submit with {STOP_WAIT} at {needed:.0f} or "
        "more (deploy/ray/runtime-env.yaml), or lower cluster.stop_s"
    )


def check_run_dir(run_dir: Path) -> None:
    """Raises UserError for a run directory in a job's copy of its working directory: Ray removes it with the job."""
    if WORKING_DIRS in run_dir.absolute().parts:
        raise UserError(
            f"--run-dir {run_dir}: lies in the copy of the working directory that Ray makes for the job and removes "
            "afterwards; give an absolute path, on storage that every node of the cluster sees"
        )
