"""The hook that Kubernetes runs in a Ray pod before it ends the pod: the job stops with a last commit, and the pods
that the commit needs stay until then. `python -m cluster.drain --seconds N [--wait]`, in a KubeRay pod.

Kubernetes ends all pods of a cluster at once. The head stops the jobs and waits for their end; the others (`--wait`)
wait until the head has no job left, or is gone. Standard library only, as it must start at once.
"""

import argparse
import json
import os
import sys
import time
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.error import HTTPError

from services.errors import Deadline, UserError

PORT = 8265
PAUSE_S = 1.0
GONE = 3
"""Calls in a row without an answer after which the head counts as gone."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.drain", description="Waits for the end of Ray jobs.")
    parser.add_argument("--seconds", type=float, required=True, help="Deadline of the whole.")
    parser.add_argument("--wait", action="store_true", help="Stop nothing: wait for the head of FQ_RAY_IP to do it.")
    asked = parser.parse_args()
    address = f"http://{os.environ['FQ_RAY_IP'] if asked.wait else '127.0.0.1'}:{PORT}"
    try:
        drain(address, os.environ.get("RAY_AUTH_TOKEN"), seconds=asked.seconds, stop=not asked.wait)
    except (Deadline, UserError) as error:
        sys.stderr.write(f"drain: {error}\n")
        return 1
    return 0


def drain(address: str, token: str | None, *, seconds: float, stop: bool) -> None:
    """Returns once the dashboard at `address` has no submitted job under way, or is gone.

    Raises:
        Deadline: jobs are still under way after `seconds`.
        UserError: the dashboard refuses the token.
    """
    ends, silent = time.monotonic() + seconds, 0
    stopped: set[str] = set()
    running: list[str] = []
    while time.monotonic() < ends:
        try:
            running = jobs_under_way(address, token)
            for job in running if stop else ():
                if job not in stopped:
                    _call(f"{address}/api/jobs/{job}/stop", token, method="POST")
                    stopped.add(job)
            silent = 0
            if not running:
                return
        except OSError as error:  # no connection, no answer in time, or a status that is no success
            if isinstance(error, HTTPError) and error.code in (401, 403):
                raise UserError(f"{address} does not take RAY_AUTH_TOKEN (status {error.code})") from error
            silent += 1
            if silent == GONE:
                return
        time.sleep(PAUSE_S)
    raise Deadline(waited_for="the end of Ray jobs", who=", ".join(running) or address, seconds=seconds)


def jobs_under_way(address: str, token: str | None) -> list[str]:
    """Submission ids of the jobs that have not ended."""
    jobs: list[Mapping[str, Any]] = _call(f"{address}/api/jobs/", token, method="GET")
    return [job["submission_id"] for job in jobs if job["submission_id"] and job["status"] in ("PENDING", "RUNNING")]


def _call(url: str, token: str | None, *, method: str) -> Any:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, method=method, headers=headers)  # noqa: S310 - http, by construction
    with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
        return json.load(answer)


if __name__ == "__main__":
    sys.exit(main())
