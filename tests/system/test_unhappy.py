"""What users get wrong, and what fails around a run: one message that names it, the right exit code, no hanging."""

import http.server
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.cli import run_command

Attune = Callable[..., tuple[int, str]]
Recipe = Callable[..., Path]


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that is refused for its usage or configuration, in this process."""
    assert run_command(list(arguments)) == 2
    captured = capfd.readouterr()
    assert "Traceback" not in captured.out + captured.err
    return captured.err


def test_an_unknown_key_names_the_nearest(capfd: pytest.CaptureFixture[str], recipe: Recipe, tmp_path: Path) -> None:
    path = recipe(learner={"learning_rate_clip": 1}, rollout={"sample": 3})
    message = refused(capfd, "train", str(path), "--run-dir", str(tmp_path / "run"))
    assert "rollout.sample" in message
    assert "'rollout.samples'" in message
    assert "learner.learning_rate_clip" in message
    message = refused(capfd, "train", str(recipe()), "learner.lrr=1", "--run-dir", str(tmp_path / "run"))
    assert "did you mean 'learner.lr'" in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("learner.lr=fast", ("learner.lr", "'fast'")),
        ("rollout.samples=0", ("rollout.samples", "0", "1")),
        ("run.groups_per_step=-3", ("run.groups_per_step", "-3")),
        ("rollout.top_p=0.5", ("truncation", "replay")),
        ("learner.advantage=best", ("learner.advantage", "'best'", "grpo")),
        ("nonsense", ("nonsense", "KEY=VALUE")),
        ("learner.lr.x=1", ("learner.lr", "no section")),
    ],
)
def test_a_value_that_is_not_allowed_is_named(
    capfd: pytest.CaptureFixture[str], recipe: Recipe, tmp_path: Path, override: str, parts: tuple[str, ...]
) -> None:
    message = refused(capfd, "train", str(recipe()), override, "--run-dir", str(tmp_path / "run"))
    for part in parts:
        assert part in message


def test_missing_and_malformed_files_are_named(
    capfd: pytest.CaptureFixture[str], recipe: Recipe, tmp_path: Path
) -> None:
    run = ("--run-dir", str(tmp_path / "run"))
    assert "nowhere.yaml" in refused(capfd, "train", str(tmp_path / "nowhere.yaml"), *run)
    assert "absent.jsonl" in refused(capfd, "train", str(recipe(data={"source": str(tmp_path / "absent.jsonl")})), *run)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a b c"}\n{"prompt": \n', encoding="utf-8")
    assert f"{broken}:2" in refused(capfd, "train", str(recipe(data={"source": str(broken)})), *run)
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"prompt": "a b c"}\n{"prompt": "  "}\n', encoding="utf-8")
    message = refused(capfd, "train", str(recipe(data={"source": str(empty)})), *run)
    assert f"{empty}:2" in message
    assert "empty" in message


def test_a_prompt_longer_than_the_context_ends_the_run_before_it_starts(
    capfd: pytest.CaptureFixture[str], recipe: Recipe, tmp_path: Path
) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "Where is Oslo? " * 60}) + "\n" + '{"prompt": "short"}\n', encoding="utf-8")
    section = {"source": str(long), "validation_fraction": 0.0, "test_fraction": 0.0}
    message = refused(capfd, "train", str(recipe(data=section)), "--run-dir", str(tmp_path / "run"))
    assert "allowed are 88" in message  # a context of 96, less rollout.max_tokens


def test_a_model_that_is_no_language_model(capfd: pytest.CaptureFixture[str], recipe: Recipe, tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    directory = tmp_path / "vision"
    ViTModel(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    ).save_pretrained(directory)
    message = refused(capfd, "train", str(recipe(policy={"model": str(directory)})), "--run-dir", str(tmp_path / "run"))
    assert "policy.model" in message
    assert "language model" in message


def test_an_engine_that_does_not_run_the_family_is_refused_before_the_start(
    capfd: pytest.CaptureFixture[str], recipe: Recipe, tmp_path: Path, tiny_encoder_decoder: Path
) -> None:
    path = recipe(policy={"model": str(tiny_encoder_decoder)}, rollout={"engine": "vllm"})
    message = refused(capfd, "train", str(path), "--run-dir", str(tmp_path / "run"))
    assert "rollout.engine" in message
    assert "'transformers'" in message


def test_a_port_in_use(capfd: pytest.CaptureFixture[str], recipe: Recipe) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refused(capfd, "reward-server", str(recipe()), "--port", str(port))
    assert str(port) in message


def test_redis_gone_before_the_start(capfd: pytest.CaptureFixture[str], recipe: Recipe, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = recipe(stream={"url": f"redis://127.0.0.1:{port}/0", "connect_timeout_s": 1})
    message = refused(capfd, "train", str(path), "--run-dir", str(tmp_path / "run"))
    assert f"127.0.0.1:{port}" in message


def test_a_run_directory_in_use(capfd: pytest.CaptureFixture[str], recipe: Recipe, tmp_path: Path) -> None:
    from cluster.run_dir import RunDir

    first = RunDir(tmp_path / "run")
    first.lock()
    try:
        message = refused(capfd, "train", str(recipe()), "--run-dir", str(tmp_path / "run"))
    finally:
        first.unlock()
    assert str(os.getpid()) in message


def test_a_cluster_that_is_too_small(attune: Attune, recipe: Recipe, tmp_path: Path) -> None:
    path = recipe(cluster={"rollout_cpus": 64, "start_s": 60})
    code, output = attune("train", str(path), "--run-dir", str(tmp_path / "run"))
    assert code == 3, output
    assert "rollout 1 of 1" in output
    assert "64 CPU" in output
    assert "Traceback" not in output


class _Handler(http.server.BaseHTTPRequestHandler):
    behaviour = "500"
    released = threading.Event()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.behaviour == "never":
            self.released.wait(60)
            return
        body = b'{"detail": "broken"}' if self.behaviour == "500" else b"<html>not what you asked for</html>"
        self.send_response(500 if self.behaviour == "500" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def server_that(behaviour: str) -> Iterator[str]:
    handler = type("Handler", (_Handler,), {"behaviour": behaviour, "released": threading.Event()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        handler.released.set()
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "behaviour",
    [pytest.param("500", marks=pytest.mark.slow), pytest.param("garbage", marks=pytest.mark.slow), "never"],
)
def test_a_reward_server_that_does_not_score(attune: Attune, recipe: Recipe, tmp_path: Path, behaviour: str) -> None:
    """The run ends with the server's name; no group was given a number, none was lost."""
    with server_that(behaviour) as url:
        worker = {"url": url, "timeout_s": 0.5, "outage_s": 2.0, "backoff_s": 0.05}
        path = recipe(reward={"sources": {"attention": {"kind": "attention"}}, "worker": worker})
        began = time.monotonic()
        code, output = attune("train", str(path), "--run-dir", str(tmp_path / "run"))
    assert code == 1, output
    assert url in output
    assert "Traceback" not in output
    assert time.monotonic() - began < 120
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def kill_once_it_trains(process: Any, run: Path, actor: str) -> tuple[int, str]:
    """Kills an actor by its class's name once the first step is recorded; (exit code, output)."""
    end = time.monotonic() + 120
    metrics = run / "metrics.jsonl"
    while time.monotonic() < end and not metrics.exists():
        time.sleep(0.05)
    # The session's Ray is a child of this process, and so are its actors.
    found = [child for child in psutil.Process().children(recursive=True) if actor in " ".join(child.cmdline())]
    assert found
    found[0].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    return process.returncode, output


def events_of(run: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow  # in the suite a rollout actor dies in test_chaos.py
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_dead_rollout_actor_is_replaced(
    start: Callable[..., Any], recipe: Recipe, tmp_path: Path, engine: str
) -> None:
    """In the middle of its work: what it had is generated by the one that takes its place."""
    run = tmp_path / "run"
    path = recipe(rollout={"engine": engine, "samples": 4, "max_tokens": 48})
    code, output = kill_once_it_trains(start("train", str(path), "--run-dir", str(run)), run, "RolloutWorker")
    assert code == 0, output
    assert events_of(run).count("rollout_died") == 1
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    prompts = json.loads((run / "salience.json").read_text(encoding="utf-8"))["n"]
    assert summary["ledger"]["committed"] + summary["ledger"].get("failed", 0) == prompts


@pytest.mark.slow  # that the run goes on where the budget is not used up is test_resume.py's
def test_a_learner_rank_that_dies_once_too_often_ends_the_run_with_its_name(
    start: Callable[..., Any], recipe: Recipe, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    path = recipe(learner={"ranks": 2}, checkpoint={"every": 1}, cluster={"restarts": 0})
    began = time.monotonic()
    code, output = kill_once_it_trains(start("train", str(path), "--run-dir", str(run)), run, "LearnerWorker")
    assert code == 1, output
    assert "learner-" in output
    assert "Traceback" not in output
    assert time.monotonic() - began < 150
    left = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert not [line for line in left if "LearnerWorker" in line or "RolloutWorker" in line]
    assert not list(Path("/dev/shm").glob(f"attune-{run_id_of(run)}*"))


def run_id_of(run: Path) -> str:
    first = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()[0]
    return str(json.loads(first)["run_id"])
