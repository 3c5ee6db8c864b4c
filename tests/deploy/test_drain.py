"""The pods' preStop hook, on a Ray head with token authentication and its dashboard."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from cluster import drain as hook
from cluster.drain import drain, this_machine
from services.errors import Deadline, UserError

ROOT = Path(__file__).resolve().parents[2]


class Head(NamedTuple):
    address: str
    token: str
    env: dict[str, str]


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A Ray head as the chart's: no CPUs, a token, the driver's grace in its environment."""
    token = secrets.token_hex(16)
    gcs, dashboard, agent, client = free_ports(4)
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    env |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": f"127.0.0.1:{gcs}"}
    folder = Path("/tmp") / f"drain-{os.getpid()}"  # Ray's sockets want a short path
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", "--head", "--block", f"--port={gcs}", "--num-cpus=0", "--node-ip-address=127.0.0.1"]
    command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", "--dashboard-host=127.0.0.1"]
    command += [f"--ray-client-server-port={client}", "--object-store-memory=80000000", f"--temp-dir={folder}"]
    log = (tmp_path_factory.mktemp("head") / "log").open("wb")
    process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        ends = time.monotonic() + 90
        while True:
            assert process.poll() is None, Path(log.name).read_text()
            try:
                assert hook.jobs_under_way(address, token) == []
                break
            except OSError:
                assert time.monotonic() < ends, "waited 90 s for Ray's dashboard"
                time.sleep(0.5)
        yield Head(address, token, env)
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def submit(head: Head, folder: Path) -> Path:
    """A job that takes 3 s to end when it is told to, as a run does for its last commit; the file is what it leaves."""
    left, program = folder / "left", folder / "job.py"
    program.write_text(
        "import pathlib, signal, sys, time\n"
        "import ray\n"
        "ray.init()\n"
        f"left = pathlib.Path({str(left)!r})\n"
        "def end(*_):\n"
        "    time.sleep(3)\n"
        "    left.write_text('a last commit')\n"
        "    sys.exit(4)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "left.with_name('runs').touch()\n"
        "time.sleep(600)\n",
        encoding="utf-8",
    )
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "job", "submit", "--no-wait", "--address", head.address, "--", sys.executable, str(program)]
    subprocess.run(command, env=head.env, check=True, capture_output=True, timeout=120)
    ends = time.monotonic() + 90
    while not (folder / "runs").exists():
        assert time.monotonic() < ends, "waited 90 s for the job"
        time.sleep(0.2)
    return left


@pytest.mark.slow
def test_the_head_stops_the_job_and_all_wait_for_its_last_commit(
    head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = submit(head, tmp_path)
    host, port = this_machine, int(head.address.rpartition(":")[2])
    monkeypatch.setattr(hook, "PORT", port)
    with pytest.raises(Deadline, match="the end of Ray jobs: raysubmit_"):
        drain(host, head.token, seconds=2, stop=False)
    with pytest.raises(UserError, match="does not take RAY_AUTH_TOKEN"):
        drain(host, "wrong", seconds=30, stop=True)
    assert not left.exists()

    # As when Kubernetes has removed the head's service, and its pod is still there.
    monkeypatch.setattr(hook, "GCS_PORT", int(head.env["RAY_ADDRESS"].rpartition(":")[2]))
    (job,) = hook.jobs_under_way(head.address, head.token)
    assert hook.head_addresses("nowhere.invalid") == [job["driver_info"]["node_ip_address"]]

    given = f"import sys; from cluster import drain; drain.PORT = {port}; sys.argv[0] = 'drain'; "
    command = [sys.executable, "-c", given + "sys.exit(drain.main())", "--seconds", "60"]
    env = head.env | {"PYTHONPATH": str(ROOT), "FQ_RAY_IP": "127.0.0.1"}
    worker = subprocess.Popen([*command, "--wait"], env=env)
    time.sleep(2)
    assert worker.poll() is None
    assert subprocess.run(command, env=env, check=False, timeout=90).returncode == 0
    assert left.read_text() == "a last commit"
    assert worker.wait(30) == 0
    (job,) = hook._call(f"{head.address}/api/jobs/", head.token, method="GET")
    assert job["status"] == "FAILED", "KubeRay starts it again on another head"
    assert "exit code 4" in job["message"]


@pytest.mark.parametrize("hosts", [["127.0.0.1"], []])
def test_a_head_that_is_gone_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch, hosts: list[str]) -> None:
    monkeypatch.setattr(hook, "PAUSE_S", 0.01)
    monkeypatch.setattr(hook, "PORT", free_ports(1)[0])
    began = time.monotonic()
    drain(lambda: hosts, None, seconds=60, stop=False)
    assert time.monotonic() - began < 30
