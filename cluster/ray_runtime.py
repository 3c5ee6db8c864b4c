"""Joins the Ray cluster that is there, or starts one on this machine for the length of a run.

A cluster that we start has token authentication on, with a token of its own, and no dashboard. One that is joined must
not have a dashboard that others reach without a token. The driver of a Ray job is given the address of its cluster by
Ray, and never starts one.
"""

import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cluster.config import ClusterSection
from cluster.ray_dashboard import check_dashboard
from cluster.ray_job import is_job
from services.errors import Deadline, UserError

OBJECT_STORE_BYTES = 256 * 2**20
"""Samples go by Redis and weights by files: Ray's object store carries little."""

JOIN_S = 20.0
"""Deadline (s) for the head of a cluster that is joined to take a connection."""


@contextmanager
def ray_cluster(section: ClusterSection) -> Iterator[Any]:
    """The `ray` module, connected. What was connected before stays so afterwards.

    Raises:
        UserError: Ray is not installed, no cluster answers, or its dashboard is open to others.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = section.address or os.environ.get("RAY_ADDRESS")
    if not address and is_job(os.environ):
        raise UserError("this is the driver of a Ray job, and RAY_ADDRESS, which Ray gives to it, is not set")
    if not address:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Ray keeps the last 100,000 calls for its dashboard, 250 MB after two hours of small steps; here is none.
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError("Ray is not installed: pip install 'attune[cpu]' or 'attune[gpu]'") from error
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {
        "logging_level": logging.WARNING,
        "log_to_driver": bool(os.environ.get("ATTUNE_ACTOR_LOGS")),
    }
    try:
        if address:
            wait_for_head(address)
            context = ray.init(address=address, **options)
        else:
            context = ray.init(
                address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **options
            )
    except (ConnectionError, ValueError) as error:
        raise UserError(f"cluster.address {address}: no Ray cluster answers there: {error}") from error
    try:
        if not section.open_dashboard:
            check_dashboard(context.dashboard_url)
        yield ray
    finally:
        ray.shutdown()


def wait_for_head(address: str) -> None:
    """Returns once somebody listens at a cluster's "host:port". Ray itself would try for minutes, and say little.

    Raises:
        UserError: nobody did within JOIN_S.
    """
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdecimal():  # "auto": Ray knows where
        return
    end = time.monotonic() + JOIN_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=JOIN_S).close()
            return
        except OSError as error:
            if time.monotonic() >= end:
                raise UserError(
                    f"cluster.address {address}: no Ray cluster answers there within {JOIN_S:.0f} s: {error}"
                ) from error
        time.sleep(0.5)


def wait_all(ray: Any, references: Sequence[Any], *, seconds: float, what: str, who: Sequence[str]) -> list[Any]:
    """The results of all references.

    Raises:
        Deadline: names those that did not answer in time.
    """
    _, pending = ray.wait(list(references), num_returns=len(references), timeout=seconds)
    if pending:
        late = [name for name, reference in zip(who, references, strict=True) if reference in pending]
        raise Deadline(waited_for=what, who=", ".join(late), seconds=seconds)
    return ray.get(list(references))
