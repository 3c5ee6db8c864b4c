"""The hook that Kubernetes runs in a Ray pod before it ends the pod: the job stops with a last commit, and the pods
that the commit needs stay until then. `python -m cluster.drain --seconds N [--wait]`, in a KubeRay pod.

Kubernetes ends all pods of a cluster at once. The head asks the jobs' drivers to end and waits for them; the others
(`--wait`) wait until the head has no job left, or is gone. It imports little, as it must start at once.
"""

import argparse
import json
import os
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.error import HTTPError

import psutil

from cluster.ray_job import JOB
from services.errors import Deadline, UserError

PORT, GCS_PORT = 8265, 6379
PAUSE_S = 1.0
GONE = 3
"""Calls in a row without an answer after which the head counts as gone."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.drain", description="Waits for the end of Ray jobs.")
    parser.add_argument("--seconds", type=float, required=True, help="Deadline of the whole.")
    parser.add_argument("--wait", action="store_true", help="Stop nothing: wait for the head of FQ_RAY_IP to do it.")
    asked = parser.parse_args()
    hosts = partial(head_addresses, os.environ["FQ_RAY_IP"]) if asked.wait else this_machine
    try:
        drain(hosts, os.environ.get("RAY_AUTH_TOKEN"), seconds=asked.seconds, stop=not asked.wait)
    except (Deadline, UserError) as error:
        sys.stderr.write(f"drain: {error}\n")
        return 1
    return 0


def this_machine() -> list[str]:
    return ["127.0.0.1"]


def head_addresses(name: str) -> list[str]:
    """Where the head is: what its name says, and where this pod's raylet has its connection.

    Kubernetes takes the head's service away with the cluster, while its pod is still waiting for the last commit.
    """
    found: set[str] = set()
    with suppress(OSError):  # the name is gone
        found |= {str(info[4][0]) for info in socket.getaddrinfo(name, PORT, type=socket.SOCK_STREAM)}
    for process in psutil.process_iter(["name"]):
        if process.info["name"] == "raylet":
            try:
                peers = [connection.raddr for connection in process.net_connections("tcp") if connection.raddr]
            except psutil.Error:
                continue
            found |= {_plain(peer.ip) for peer in peers if peer.port == GCS_PORT}
    return sorted(found)


def _plain(address: str) -> str:
    """An IPv4 address that a socket of both families writes as ::ffff:a.b.c.d."""
    return address.removeprefix("::ffff:") if "." in address else address


def drain(hosts: Callable[[], Sequence[str]], token: str | None, *, seconds: float, stop: bool) -> None:
    """Returns once the dashboard on one of the `hosts` has no submitted job under way, or none of them answers.

    Raises:
        Deadline: jobs are still under way after `seconds`.
        UserError: the dashboard refuses the token.
    """
    ends, silent = time.monotonic() + seconds, 0
    stopped: set[str] = set()
    running: list[str] = []
    while time.monotonic() < ends:
        for address in map(_url, hosts()):
            try:
                jobs = jobs_under_way(address, token)
                for job in jobs if stop else ():
                    if job["submission_id"] not in stopped:
                        _stop(job, address, token)
                        stopped.add(job["submission_id"])
            except OSError as error:  # no connection, no answer in time, or a status that is no success
                if isinstance(error, HTTPError) and error.code in (401, 403):
                    raise UserError(f"{address} does not take RAY_AUTH_TOKEN (status {error.code})") from error
                continue
            running, silent = [job["submission_id"] for job in jobs], 0
            if not running:
                return
            break
        else:
            silent += 1
            if silent == GONE:
                return
        time.sleep(PAUSE_S)
    raise Deadline(waited_for="the end of Ray jobs", who=", ".join(running) or "the head", seconds=seconds)


def jobs_under_way(address: str, token: str | None) -> list[Mapping[str, Any]]:
    """The submitted jobs that have not ended."""
    jobs: list[Mapping[str, Any]] = _call(f"{address}/api/jobs/", token, method="GET")
    return [job for job in jobs if job["submission_id"] and job["status"] in ("PENDING", "RUNNING")]


def _stop(job: Mapping[str, Any], address: str, token: str | None) -> None:
    """Asks the job's driver to end, or Ray where there is none here yet.

    A job that Ray stopped counts as one that is complete, which KubeRay would not start again on another head; a driver
    that was asked to end says by its exit code that it has not finished.
    """
    driver = job.get("driver_info") or {}
    try:
        process = psutil.Process(int(driver["pid"]))
        if job["submission_id"] in process.environ().get(JOB, ""):  # not a driver of another machine with that number
            process.terminate()
            return
    except (KeyError, ValueError, psutil.Error):
        pass
    _call(f"{address}/api/jobs/{job['submission_id']}/stop", token, method="POST")


def _url(host: str) -> str:
    return f"http://[{host}]:{PORT}" if ":" in host else f"http://{host}:{PORT}"


def _call(url: str, token: str | None, *, method: str) -> Any:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, method=method, headers=headers)  # noqa: S310 - http, by construction
    with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
        return json.load(answer)


if __name__ == "__main__":
    sys.exit(main())
