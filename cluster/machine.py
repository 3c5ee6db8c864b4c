"""What a machine has: memory, GPUs, shared memory, cores. Looked at here, or by a task on every node of a cluster."""

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.plan import Node
from cluster.ray_job import STOP_WAIT
from cluster.ray_runtime import wait_all
from services.errors import UserError

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where weights are published by default
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
LOOK_S = 60.0
"""Seconds in which a node of the cluster says what it has: a worker starts there."""


@dataclass(frozen=True)
class Machine:
    """Bytes of memory (what its control group allows), of each GPU, and free ones of shared memory."""

    name: str
    cpus: float
    memory: int
    gpus: tuple[int, ...] = ()
    shared_free: int = 0
    stop_wait: str | None = None
    """RAY_JOB_STOP_WAIT_TIME_S as processes on it see it."""
    gpus_offered: float | None = None
    """What Ray was told; None: as many as there are."""
    memory_offered: int | None = None
    address: str = ""
    """Ray nodes of one address share what their machine has."""

    def node(self) -> Node:
        """As the plan sees it. Without Ray, all memory may be reserved."""
        memory = self.memory if self.memory_offered is None else self.memory_offered
        gpus = len(self.gpus) if self.gpus_offered is None else self.gpus_offered
        return Node(self.name, self.cpus, gpus, memory / 2**30)


def look_here() -> Machine:
    """This machine."""
    import psutil

    total = min([psutil.virtual_memory().total, *filter(None, (_limit(Path(path)) for path in LIMITS))])
    shared = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    cpus = float(len(os.sched_getaffinity(0)))
    return Machine(os.uname().nodename, cpus, total, gpus_here(), shared, os.environ.get(STOP_WAIT))


def _limit(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def gpus_here() -> tuple[int, ...]:
    """Bytes of each NVIDIA GPU, as its driver says; none where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(int(line) * 2**20 for line in said.split() if line.isdecimal())


def look_at_cluster(ray: Any) -> list[Machine]:
    """Every living node of the cluster.

    Raises:
        Deadline: names the nodes that did not answer.
        UserError: attune cannot be run on a node.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    rows: Sequence[Mapping[str, Any]] = [row for row in ray.nodes() if row["Alive"]]
    task = ray.remote(look_here)
    places = [NodeAffinitySchedulingStrategy(row["NodeID"], soft=False) for row in rows]
    references = [task.options(num_cpus=0, max_retries=0, scheduling_strategy=place).remote() for place in places]
    who = [f"{row['NodeManagerHostname']} ({row['NodeManagerAddress']})" for row in rows]
    try:
        found: list[Machine] = wait_all(ray, references, seconds=LOOK_S, what="what the nodes have", who=who)
    except ray.exceptions.RayError as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"a node of the cluster cannot run attune; is it installed there? {said[-1]}") from error
    return [_as_offered(machine, row, place) for place, (machine, row) in enumerate(zip(found, rows, strict=True))]


def _as_offered(machine: Machine, row: Mapping[str, Any], place: int) -> Machine:
    """With what Ray was told that the node has; numbered, for several may be of one machine."""
    resources: Mapping[str, float] = row["Resources"]
    return Machine(
        name=f"{place} {machine.name}",
        cpus=float(resources.get("CPU", 0.0)),
        memory=machine.memory,
        gpus=machine.gpus,
        shared_free=machine.shared_free,
        stop_wait=machine.stop_wait,
        gpus_offered=float(resources.get("GPU", 0.0)),
        memory_offered=int(resources.get("memory", 0.0)),
        address=str(row["NodeManagerAddress"]),
    )
