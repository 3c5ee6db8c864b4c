"""The pods' preStop hook, on a Ray head with token authentication and its dashboard."""

import json
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
from cluster.drain import drain
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
def test_the_head_stops_the_job_and_all_wait_for_its_last_commit(head: Head, tmp_path: Path) -> None:
    left = submit(head, tmp_path)
    with pytest.raises(Deadline, match="the end of Ray jobs: raysubmit_"):
        drain(head.address, head.token, seconds=2, stop=False)
    with pytest.raises(UserError, match="does not take RAY_AUTH_TOKEN"):
        drain(head.address, "wrong", seconds=30, stop=True)
    assert not left.exists()

    port = head.address.rpartition(":")[2]
    waits = f"import sys; from cluster import drain; drain.PORT = {port}; sys.argv = ['drain', *sys.argv[1:]]; "
    command = [sys.executable, "-c", waits + "sys.exit(drain.main())", "--seconds", "60"]
    env = head.env | {"PYTHONPATH": str(ROOT), "FQ_RAY_IP": "127.0.0.1"}
    worker = subprocess.Popen([*command, "--wait"], env=env)
    time.sleep(2)
    assert worker.poll() is None
    assert subprocess.run(command, env=env, check=False, timeout=90).returncode == 0
    assert left.read_text() == "a last commit"
    assert worker.wait(30) == 0
    jobs = hook._call(f"{head.address}/api/jobs/", head.token, method="GET")
    assert {job["status"] for job in jobs} == {"STOPPED"}, json.dumps(jobs)


def test_a_head_that_is_gone_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook, "PAUSE_S", 0.01)
    (port,) = free_ports(1)
    began = time.monotonic()
    drain(f"http://127.0.0.1:{port}", None, seconds=60, stop=False)
    assert time.monotonic() - began < 30
