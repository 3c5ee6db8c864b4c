"""What `attune doctor` looks at beside memory: versions, Redis, disk, ports, tokens. Each answers with findings."""

import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import disk_usage
from typing import Any, Literal

from cluster.config import Config
from cluster.installed import versions
from cluster.machine import Machine
from cluster.ray_dashboard import authentication_mode, check_dashboard, dashboard_of
from cluster.ray_job import STOP_WAIT, short_grace
from services.errors import UserError
from services.stream.connect import address_of, connect
from services.stream.embedded import redis_executable
from services.stream.errors import StreamUnavailable

Status = Literal["ok", "note", "short", "broken"]
"""short: there is too little of something, the plan does not fit. broken: a run would not start, or not be safe."""

PORTS = {6379: "Ray's head (ray start --head)", 8265: "Ray's dashboard", 8077: "attune reward-server"}


@dataclass(frozen=True)
class Finding:
    """`missing`: bytes that there would have to be more."""

    status: Status
    subject: str
    said: str
    missing: int | None = None

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def size(count: float) -> str:
    """Bytes in words: 12.3 GB, 456 MB, 0.1 MB."""
    if count >= 1e9:
        return f"{count / 1e9:,.1f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e6:.2g} MB"


def enough(subject: str, needed: int, there: int, what: str) -> Finding:
    """Whether there are as many bytes as are needed; says how many are missing."""
    said = f"{what}: {size(needed)} needed, {size(there)} there"
    if needed <= there:
        return Finding("ok", subject, said)
    return Finding("short", subject, f"{said}: {size(needed - there)} missing", needed - there)


def look_at_versions() -> Iterator[Finding]:
    for version in versions():
        name, found = version.package, version.found
        if found is None:
            yield Finding("broken", name, f"is not installed; {version.allowed} is needed: pip install 'attune[cpu]'")
        elif not version.fits:
            yield Finding("broken", name, f"{found} is installed, and attune needs {version.allowed}")
        elif version.locked is not None and found.partition("+")[0] != version.locked:
            yield Finding("note", name, f"{found}; the lock has {version.locked}, which is what was tested")
        else:
            yield Finding("ok", name, f"{found}")


def look_at_redis(config: Config) -> Finding:
    section = config.stream
    if section.url is None:
        try:
            return Finding("ok", "Redis", f"embedded: {redis_executable()}")
        except UserError as error:
            return Finding("broken", "Redis", str(error))
    try:
        client = connect(section.resolved_url(), section.connect_timeout_s, socket_timeout_s=section.socket_timeout_s)
    except (StreamUnavailable, UserError) as error:
        return Finding("broken", "Redis", str(error))
    info: Any = client.info()
    client.close()
    policy, version = str(info.get("maxmemory_policy", "noeviction")), info["redis_version"]
    said = f"{version} at {address_of(section.url)}, maxmemory-policy {policy}"
    if policy != "noeviction":
        limit = int(info.get("maxmemory", 0))
        why = "samples may be evicted" if limit else "with a maxmemory, samples would be evicted"
        return Finding("broken" if limit else "note", "Redis", f"{said}: {why}; set noeviction")
    return Finding("ok", "Redis", said)


def look_at_disk(run_dir: Path, needed: int, what: str) -> Finding:
    """The space of the directory, or of the nearest one above that exists."""
    there = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.is_dir())
    return enough("disk", needed, disk_usage(there).free, f"{what} in {run_dir}")


def look_at_ports() -> Iterator[Finding]:
    """Those that programs take by default. A run itself takes free ones."""
    for port, whose in PORTS.items():
        with socket.socket() as probe:
            probe.settimeout(1.0)
            taken = probe.connect_ex(("127.0.0.1", port)) == 0
        yield Finding("note" if taken else "ok", f"port {port}", f"{whose}: {'in use' if taken else 'free'}")


def look_at_ray(config: Config, ray: Any, machines: Sequence[Machine]) -> Iterator[Finding]:
    """Of a cluster that was joined: who may use it, and how it stops jobs."""
    url = dashboard_of(ray)
    mode = authentication_mode(url) if url else None
    if url is None:
        yield Finding("note", "Ray dashboard", "there is none: jobs cannot be submitted")
    elif mode in (None, "disabled"):
        try:
            if not config.cluster.open_dashboard:
                check_dashboard(url)
            says = "asks for no token: every user of the machine may run code on the cluster"
            yield Finding("note", "Ray dashboard", f"{url} {says}")
        except UserError as error:
            yield Finding("broken", "Ray dashboard", str(error))
    else:
        yield Finding("ok", "Ray dashboard", f"{url}, authentication: {mode}")
    waits = {machine.stop_wait for machine in machines}
    for wait in sorted(waits, key=str):
        short = short_grace(config.cluster.stop_s, {} if wait is None else {STOP_WAIT: wait})
        if short is not None:
            yield Finding("note", "ray job stop", f"unless a job brings its own: {short}")
