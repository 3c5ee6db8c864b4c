"""The commands of docs/ray-jobs.md on a cluster with token authentication: submit, stop, submit again, finished."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.ray_dashboard import authentication_mode
from learner.commit import latest_committed

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "ray-jobs.md").read_text(encoding="utf-8"), re.DOTALL)
PATIENCE_S = 900.0
"""For a busy machine; on a quiet one the whole takes a minute and a half."""

TRIES = 4


def block(word: str) -> str:
    """The one block of the page that has this word in it, its continued lines joined."""
    found = [text for text in BLOCKS if word in text]
    assert len(found) == 1, word
    return found[0].replace("\\\n", " ")


def until(what: str, condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.2)
    raise TimeoutError(what)


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Cluster:
    """A cluster that was started by the page's commands, at places of its own; runs the page's other commands."""

    def __init__(self, home: Path, recipe: Path, policy: Path, run: Path) -> None:
        self.head, self.dashboard, agent = free_ports(3)
        # Reports the driver's exit code, which Ray keeps of failed jobs alone; all else is as the page says.
        wrapper = home / "reporting"
        wrapper.write_text('#!/bin/sh\ntrap : TERM\n"$@"\ncode=$?\necho "exit code $code"\nexit $code\n')
        wrapper.chmod(0o700)
        self.temporary = tempfile.mkdtemp(prefix="rj", dir="/tmp")  # sockets have short paths
        self._instead = {
            "RAY_ADDRESS=auto": f"RAY_ADDRESS=127.0.0.1:{self.head}",  # other clusters of the machine are there too
            ":8265": f":{self.dashboard}",
            "recipes/cagsr-qa.yaml": str(recipe),
            "/shared/models/policy": str(policy),
            "/shared/runs/cagsr": str(run),
            "python -m cluster": f"{wrapper} python -m cluster",
            "ray start --head": f"ray start --head --block --port {self.head} --dashboard-port {self.dashboard} "
            f"--dashboard-agent-listen-port {agent} --temp-dir {self.temporary} --num-cpus 4 "
            f"--object-store-memory {80 * 2**20}",
        }
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.environment = {
            **kept,
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }
        self.log = (home / "cluster.log").open("w+")
        self._start()

    def _start(self) -> None:
        """Ray gives its raylet 30 s to come up, whatever the machine has to do: a few tries."""
        for _ in range(TRIES):
            self._server = subprocess.Popen(
                ["/bin/bash", "-ec", self.command("ray start")],
                env=self.environment,
                stdout=self.log,
                stderr=self.log,
            )
            until("ray start", lambda: self._server.poll() is not None or "Ray runtime started" in self._printed())
            if self._server.poll() is None:
                break
        assert authentication_mode(f"127.0.0.1:{self.dashboard}") == "token", self._printed()

    def _printed(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text(encoding="utf-8")

    def command(self, word: str) -> str:
        text = block(word)
        for old, new in self._instead.items():
            text = text.replace(old, new)
        return text

    def run(self, word: str) -> tuple[int, str]:
        done = subprocess.run(
            ["/bin/bash", "-c", self.command(word)],
            cwd=ROOT,
            env={**self.environment, "RAY_AUTH_MODE": "token"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_S,
        )
        return done.returncode, done.stdout

    def stop(self) -> None:
        family = psutil.Process(self._server.pid).children(recursive=True)
        self._server.terminate()
        for process in psutil.wait_procs([*family, psutil.Process(self._server.pid)], timeout=30)[1]:
            process.kill()
        self._server.wait(30)
        shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture
def cluster(recipe: Callable[..., Path], tiny_decoder: Path, tmp_path: Path) -> Iterator[Cluster]:
    path = recipe(run={"epochs": 4}, cluster={"start_s": 600, "batch_s": 600})
    (tmp_path / "home").mkdir()
    started = Cluster(tmp_path / "home", path, tiny_decoder, tmp_path / "run")
    try:
        yield started
    finally:
        started.stop()


@pytest.mark.slow  # a cluster with a dashboard, five commands of Ray's and two starts of a run
@pytest.mark.timeout(3600)
def test_a_job_is_stopped_with_a_commit_and_the_next_attempt_finishes_it(cluster: Cluster, tmp_path: Path) -> None:
    run = tmp_path / "run"
    token = tmp_path / "home" / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o077 == 0
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://127.0.0.1:{cluster.dashboard}/api/jobs/", timeout=30)
    assert refused.value.code == 401

    code, said = cluster.run("attune doctor")
    assert code == 0, said
    assert "authentication: token" in said
    assert "RAY_JOB_STOP_WAIT_TIME_S at 30 or more" in said  # this cluster's own is Ray's 3 s

    code, said = cluster.run("ray job submit")
    assert code == 0, said
    assert "Job 'cagsr-1' submitted" in said
    lines = run / "metrics.jsonl"
    until("five steps", lambda: lines.exists() and len(lines.read_text().splitlines()) >= 5)
    began = time.monotonic()
    code, said = cluster.run("ray job stop")
    assert code == 0, said
    assert "was stopped" in said
    assert time.monotonic() - began < 60 + 60  # the grace of deploy/ray/runtime-env.yaml, and the command itself

    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[-1] == "stopped"
    assert not {"short_grace", "redis_restarted", "ended"} & set(kinds)
    assert events[-1]["committed"] > 0
    latest = latest_committed(run)
    assert latest.commit is not None
    assert latest.problems == ()
    code, said = cluster.run("ray job logs")
    assert "exit code 4" in said, said
    assert not list(Path("/dev/shm").glob(f"attune-{events[0]['run_id']}*"))

    code, said = cluster.run("deploy/ray/submit.py")
    assert code == 0, said
    assert "submitted: cagsr-2" in said
    assert "exit code 0" in said
    assert "cagsr-2: SUCCEEDED" in said
    commit = latest_committed(run).commit
    assert commit is not None
    groups = [group for step in commit.manifest["steps"].values() for group in step]
    prompts = json.loads((run / "salience.json").read_text(encoding="utf-8"))["n"]
    assert len(groups) == len(set(groups)) == 4 * prompts - len(commit.manifest["failed"])
    assert commit.manifest["incarnation"] == 2


def test_the_page_has_each_command_once() -> None:
    for word in (
        "ray start",
        "attune doctor",
        "ray job submit",
        "ray job stop",
        "ray job logs",
        "deploy/ray/submit.py",
    ):
        assert block(word)
