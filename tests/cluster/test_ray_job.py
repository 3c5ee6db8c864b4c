"""What a driver knows of being a Ray job, what a dashboard says of its token, and how attempts of a run are named."""

import importlib.util
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterSection
from cluster.driver import check_reach, say_short_grace
from cluster.ray_dashboard import authentication_mode, check_dashboard
from cluster.ray_job import JOB, MARGIN_S, STOP_WAIT, check_run_dir, is_job, short_grace, stop_wait_s
from cluster.ray_runtime import ray_cluster, wait_for_head
from cluster.recipe import resolve
from cluster.run_dir import RunDir
from services.errors import UserError

ROOT = Path(__file__).parents[2]


def test_a_grace_too_short_for_a_last_commit_is_said_with_both_numbers() -> None:
    assert stop_wait_s({}) == 3
    said = short_grace(20.0, {})
    assert said is not None
    assert "3 s after" in said
    assert "cluster.stop_s is 20" in said
    assert f"{STOP_WAIT} at 30" in said
    assert short_grace(20.0, {STOP_WAIT: str(int(20 + MARGIN_S))}) is None
    with pytest.raises(UserError, match=f"{STOP_WAIT}: 'long'"):
        stop_wait_s({STOP_WAIT: "long"})


def test_a_job_with_a_short_grace_says_so_in_its_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = resolve({"data": {}, "policy": {}}, "test"), RunDir(tmp_path)
    monkeypatch.delenv(STOP_WAIT, raising=False)
    monkeypatch.delenv(JOB, raising=False)
    say_short_grace(config, run)
    assert not run.events.exists()  # whoever is no job is stopped by somebody else
    monkeypatch.setenv(JOB, "{}")
    say_short_grace(config, run)
    [event] = [json.loads(line) for line in run.events.read_text(encoding="utf-8").splitlines()]
    assert event["event"] == "short_grace"
    assert "cluster.stop_s is 20" in event["why"]


def test_what_is_on_one_machine_alone_is_refused_on_several() -> None:
    alone = {"data": {}, "policy": {}}
    reached = {**alone, "stream": {"url": "redis://10.0.0.1"}}
    one, two = {"10.0.0.1"}, {"10.0.0.1", "10.0.0.2"}
    with pytest.raises(UserError, match=r"stream\.url: is null, and the cluster has 2 machines"):
        check_reach(resolve(alone, "test"), two)
    with pytest.raises(UserError, match=r"cluster\.weights_dir: is null"):
        check_reach(resolve(reached, "test"), two)
    anywhere = {**reached, "cluster": {"weights": "collective"}}
    assert check_reach(resolve(anywhere, "test"), one) is check_reach(resolve(anywhere, "test"), two) is None
    # A machine that joins later is none that the run could use.
    assert check_reach(resolve(alone, "test"), one) == check_reach(resolve(reached, "test"), one) == "10.0.0.1"


def test_the_runtime_environment_gives_the_default_grace() -> None:
    import yaml

    environment = yaml.safe_load((ROOT / "deploy/ray/runtime-env.yaml").read_text(encoding="utf-8"))["env_vars"]
    assert short_grace(ClusterSection().stop_s, environment) is None
    assert all(isinstance(value, str) for value in environment.values())  # Ray takes nothing else


def test_a_run_directory_that_ray_removes_is_refused() -> None:
    copy = Path("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_1/runs/mine")
    with pytest.raises(UserError, match="absolute path"):
        check_run_dir(copy)
    check_run_dir(Path("/shared/runs/mine"))


def test_a_job_without_the_address_of_its_cluster_starts_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv(JOB, "{}")
    assert is_job({JOB: "{}"})
    with pytest.raises(UserError, match="RAY_ADDRESS"), ray_cluster(ClusterSection()):
        pytest.fail("a cluster was started")


def test_a_cluster_that_is_not_there_is_said_before_ray_tries_for_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.ray_runtime.JOIN_S", 1.0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"cluster\.address {address}: no Ray cluster answers there within 1 s"):
            wait_for_head(address)
        taken.listen()
        wait_for_head(address)
    wait_for_head("auto")


@pytest.fixture
def dashboard() -> Iterator[tuple[str, dict[str, Any]]]:
    """A server that answers as Ray's dashboard does, and what it is to answer. Reached by a name that is not known to
    be loopback's."""
    answer: dict[str, Any] = {"status": 200, "body": {"authentication_mode": "token"}}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/api/authentication_mode"
            self.send_response(answer["status"] if found else 500)
            self.end_headers()
            self.wfile.write(json.dumps(answer["body"]).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.1:{server.server_port}", answer
    server.shutdown()


def test_an_open_dashboard_is_refused_unless_it_asks_for_a_token(dashboard: tuple[str, dict[str, Any]]) -> None:
    url, answer = dashboard
    check_dashboard(url)
    answer["body"] = {"authentication_mode": "disabled"}
    with pytest.raises(UserError, match=r"asks for no token.*RAY_AUTH_MODE=token.*cluster\.open_dashboard"):
        check_dashboard(url)
    answer["status"] = 404  # Ray before 2.52: it has no token to ask for
    assert authentication_mode(url) == "disabled"
    answer["status"] = 503
    with pytest.raises(UserError, match="does not say"):
        check_dashboard(url)
    answer["status"] = 404
    check_dashboard(url.replace("127.1:", "127.0.0.1:"))  # only this machine reaches it
    with pytest.raises(UserError, match=r"the Ray dashboard at 127\.1:.* asks for no token"):
        check_dashboard(url.replace("127.1:", "127.0.0.1:"), ["192.0.2.254", "127.1"])  # it listens there, too
    check_dashboard(None)


def submit_program() -> Any:
    spec = importlib.util.spec_from_file_location("submit", ROOT / "deploy/ray/submit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_attempts_of_a_run_are_numbered_and_wait_for_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    next_attempt = submit_program().next_attempt
    assert next_attempt("run", []) == "run-1"
    ended = [("run-1", "STOPPED"), ("run-9", "FAILED"), ("run-10", "SUCCEEDED"), ("other-20", "RUNNING"), ("run", "x")]
    assert next_attempt("run", ended) == "run-11"
    assert next_attempt("a.b", [("axb-3", "RUNNING")]) == "a.b-1"
    with pytest.raises(SystemExit) as refused:
        next_attempt("run", [*ended, ("run-11", "PENDING")])
    assert refused.value.code == 2
    assert "run-11 is PENDING" in capsys.readouterr().err
