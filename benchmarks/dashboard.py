"""The run page on a large run, and what it costs a run to be watched.

A run of 50,000 steps and 100,000 samples (two a step) is written as the driver writes it. Measured on it, in Chromium
and over HTTP, by the server's own process:

open_cold_s       from the page's address to the first curve drawn, where no index is there yet (a preview of the curve)
open_s            the same with the index there, in a server that was started anew
index_s           until every sample is in the index; index_cpu_s, what the server's processor took for it
memory_mib        largest resident memory of the server through all of it
*_ms_p50, _p95    search, filter, histogram, curves, a page deep down: answers of the server, none asked before;
                  *_cpu_ms, what the server's processor took for one, however busy the machine was

Then a small training run. A server and ten clients follow it, and are stopped (SIGSTOP) and let go on again every few
steps: `step_ratio` is the time of a step while they follow over that while they stand still, the median over such pairs
of neighbours, between `step_ratio_low` and `step_ratio_high` in half of them; its limit is 1. A client asks what a page
asks (the summary, the curves of the first view, the events, then the stream, and the events again where there are new
ones) and draws nothing: the people who watch have browsers on machines of their own. `server_cpu_share` and
`clients_cpu_share` are shares of one core that both took. `step_ratio_pages` is the time of a step with ten pages in
Chromium on the machine of the run, whose cores they share, over that before they were opened.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
import psutil

from benchmarks.common import finish, parse_options

NAME = "dashboard"
WATCHING = 10
"""Pages, or clients."""
CURVES = 13
"""That the first view of the page draws."""
TOKENS = 32
"""Of a response of the large run."""
POOL = 256
MOST_STEPS = 4000
WAIT_S = 900.0
"""Longest wait for an index, or for a training run."""
METRICS = tuple(f"{prefix}/{name}" for prefix in ("reward", "policy", "time", "length", "value", "drift") for name in
                ("mean", "std", "low", "high", "share", "rate", "sum", "last"))  # fmt: skip
WORDS = [f"{first}{second}" for first in "bcdfghklmnprst" for second in ("alor", "emi", "istan", "ovel", "ura", "ynth")]


@dataclass(frozen=True)
class Size:
    steps: int
    samples: int
    asked: int
    """Answers that are timed, of each kind."""
    window: int
    """Steps while clients follow, and while they stand still."""
    pairs: int


FULL = Size(steps=50_000, samples=2, asked=40, window=10, pairs=24)
QUICK = Size(steps=2_000, samples=2, asked=10, window=4, pairs=4)


def write_run(path: Path, size: Size) -> int:
    """A run directory of that size; returns the bytes of its files."""
    chance = random.Random(0)
    (path / "samples").mkdir(parents=True)
    (path / "config.yaml").write_text("run: {name: large}\nreward: {sources: {attention: {kind: attention}}}\n")
    (path / "events.jsonl").write_text(
        json.dumps({"time": 0.0, "event": "start", "run_id": "large", "incarnation": 1, "step": 0}) + "\n"
    )
    written = 0
    tails = [_tail(chance) for _ in range(POOL)]
    noise = [json.dumps({name: chance.gauss(0, 0.2) for name in METRICS[8:]})[1:] for _ in range(POOL)]
    with (path / "metrics.jsonl").open("w") as metrics:
        for step in range(size.steps):
            trend = {name: chance.gauss(step / size.steps, 0.2) for name in METRICS[:8]}
            written += metrics.write(json.dumps({"step": step, **trend})[:-1] + ", " + chance.choice(noise) + "\n")
            lines = "".join(_head(step, k, chance) + chance.choice(tails) for k in range(size.samples))
            (path / "samples" / f"step_{step:06d}.jsonl").write_text(lines)
            written += len(lines)
    return written


def _head(step: int, k: int, chance: random.Random) -> str:
    """The beginning of a sample's line: what differs from one to the next."""
    value = chance.gauss(0, 1)
    score = {"status": "ok", "value": value, "detail": {"coverage": 0.3, "focus": -0.8}, "error": None}
    fields = {
        "step": step, "schema_version": 1, "sample_id": f"0:{step:08x}:{k}", "group_id": f"0:{step:08x}",
        "prompt_id": f"{step:08x}", "attempt": 1, "policy_versions": [[1, step, TOKENS]],
        "prompt": f"<user>{' '.join(chance.choices(WORDS, k=20))}<assistant>",
        "response": " ".join(chance.choices(WORDS, k=TOKENS)), "finish_reason": chance.choice(["stop", "length"]),
        "scores": {"attention": score}, "reward": score, "flags": [], "created_at": 0.0, "kl_reference": value / 10,
        "advantage": value,
    }  # fmt: skip
    return json.dumps(fields)[:-1] + ", "


def _tail(chance: random.Random) -> str:
    """The rest of it: arrays, of which some hundred are enough."""
    numbers = [round(chance.random(), 6) for _ in range(TOKENS)]
    attention = {"layers": [1], "content": list(range(2, 22)), "salient": [4, 5], "salient_weights": [1.0, 1.0],
                 "mass": numbers, "salient_mass": numbers, "neg_entropy_sum": numbers, "peak": numbers,
                 "map_ref": None}  # fmt: skip
    fields = {"prompt_ids": list(range(24)), "response_ids": [chance.randrange(4096) for _ in numbers],
              "logprobs": numbers, "kl_tokens": numbers, "attention": attention}  # fmt: skip
    return json.dumps(fields)[1:] + "\n"


@contextmanager
def serving(run: Path, cache: Path) -> Iterator[tuple[str, str, psutil.Process]]:
    """A server of its own process: (origin, token, process)."""
    started = subprocess.Popen(
        [sys.executable, "-m", "cluster", "dashboard", str(run), "--port", "0"],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "XDG_CACHE_HOME": str(cache)},
    )  # fmt: skip
    try:
        assert started.stdout is not None
        found = re.search(r"(http://\S+)/#token=(\S+)", started.stdout.readline())
        if found is None:
            raise RuntimeError("the dashboard printed no address")
        yield found[1], found[2], psutil.Process(started.pid)
    finally:
        started.terminate()
        started.wait(timeout=30)


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium")
    if found is None:
        raise RuntimeError("Chromium is missing: scripts/system_packages.sh chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def first_curve(browser: Any, origin: str, token: str) -> float:
    """Seconds from the address to the first curve with points on its canvas."""
    context = browser.new_context()
    page = context.new_page()
    began = time.perf_counter()
    page.goto(f"{origin}/#token={token}")
    page.locator('.plot:not([data-points="0"])[data-points] canvas').first.wait_for(timeout=120_000)
    took = time.perf_counter() - began
    context.close()
    return took


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def peak_mib(process: psutil.Process) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def indexed(client: httpx.Client) -> float:
    """Seconds until the index holds every sample."""
    began = time.perf_counter()
    while time.perf_counter() - began < WAIT_S:
        if client.get("/api/run", params={"run": "large"}).raise_for_status().json()["progress"].get("done"):
            return time.perf_counter() - began
        time.sleep(0.5)
    raise RuntimeError(f"the index was not done within {WAIT_S:.0f} s")


def answers(client: httpx.Client, process: psutil.Process, size: Size) -> dict[str, float]:
    """Milliseconds of answers, and of the server's processor that one took; no question is asked twice."""
    chance = random.Random(1)

    def low() -> int:
        return chance.randrange(size.steps // 2)

    questions: dict[str, Any] = {
        "search": lambda: ("samples", {"text": " ".join(chance.sample(WORDS, 2))}),
        "filter": lambda: ("samples", {"source": "", "low": chance.gauss(0, 1), "finish": "stop", "sort": "-reward"}),
        "histogram": lambda: ("histogram", {"source": "attention", "low": low()}),
        "curves": lambda: ("curves", {"name": chance.sample(METRICS, 10), "low": low(), "points": 400}),
        "deep_page": lambda: ("samples", {"offset": chance.randrange(min(20_000, size.steps)), "sort": "advantage"}),
    }
    found: dict[str, float] = {}
    for name, question in questions.items():
        times: list[float] = []
        used = cpu_s(process)
        for _ in range(size.asked):
            path, params = question()
            began = time.perf_counter()
            client.get(f"/api/{path}", params={"run": "large", **params}).raise_for_status()
            times.append(1000 * (time.perf_counter() - began))
        found[f"{name}_cpu_ms"] = 1000 * (cpu_s(process) - used) / size.asked
        found[f"{name}_ms_p50"] = median(times)
        found[f"{name}_ms_p95"] = quantiles(times, n=20)[-1]
    return found


def measure_page(size: Size, root: Path) -> dict[str, float]:
    """Of the large run: opening, index, memory, answers."""
    written = write_run(root / "large", size)
    cache = root / "cache"
    with chromium() as browser:
        browser.new_context().close()  # the browser's own first start is not the page's
        with serving(root / "large", cache) as (origin, token, process):
            cold = first_curve(browser, origin, token)
            client = httpx.Client(base_url=origin, headers={"authorization": f"Bearer {token}"}, timeout=120)
            index, used = cold + indexed(client), cpu_s(process)
            memory = peak_mib(process)
        with serving(root / "large", cache) as (origin, token, process):
            warm = [first_curve(browser, origin, token) for _ in range(3)]
            client = httpx.Client(base_url=origin, headers={"authorization": f"Bearer {token}"}, timeout=120)
            found = answers(client, process, size)
            memory = max(memory, peak_mib(process))
    return {
        "steps": size.steps, "samples": size.steps * size.samples, "run_mib": written / 2**20, "open_cold_s": cold,
        "open_s": median(warm), "open_first_s": warm[0], "index_s": index, "index_cpu_s": used,
        "memory_mib": memory, **found,
    }  # fmt: skip


class Watching(threading.Thread):
    """Has a run followed by clients and left alone in turn, then by pages; notes which steps were which."""

    def __init__(self, run: Path, cache: Path, size: Size, skip: int) -> None:
        super().__init__(daemon=True)
        self.run_path, self.cache, self.size, self.skip = run, cache, size, skip
        self.pairs: list[tuple[range, range]] = []
        """Steps while clients followed, and the next ones without."""
        self.pages: tuple[range, range] | None = None
        """Steps with pages, and those before they were opened."""
        self.server_cpu = self.clients_cpu = 0.0
        self.problem: Exception | None = None

    def steps(self) -> int:
        metrics = self.run_path / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def until(self, steps: int) -> None:
        end = time.monotonic() + WAIT_S
        while self.steps() < steps:
            if time.monotonic() > end:
                raise RuntimeError(f"the run did not come to step {steps} within {WAIT_S:.0f} s")
            time.sleep(0.05)

    def next_steps(self, count: int) -> range:
        """Waits for `count` whole steps from now."""
        begin = self.steps() + 1
        self.until(begin + count)
        return range(begin, begin + count)

    def run(self) -> None:
        try:
            self.until(self.skip)
            with self.watched("clients") as (server, watchers):
                self.take_turns(server, watchers)
            alone = self.next_steps(3 * self.size.window)
            with self.watched("pages"):
                self.pages = self.next_steps(3 * self.size.window), alone
        except Exception as error:
            self.problem = error
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # the run ends cleanly, by its own rule

    def take_turns(self, *followers: psutil.Process) -> None:
        used, took = [0.0, 0.0], 0.0
        for _ in range(self.size.pairs):
            before, clock = [cpu_s(process) for process in followers], time.monotonic()
            followed = self.next_steps(self.size.window)
            took += time.monotonic() - clock
            used = [u + cpu_s(process) - b for u, process, b in zip(used, followers, before, strict=True)]
            for process in followers:
                process.suspend()
            try:
                self.pairs.append((followed, self.next_steps(self.size.window)))
            finally:
                for process in followers:
                    process.resume()
        self.server_cpu, self.clients_cpu = used[0] / took, used[1] / took

    @contextmanager
    def watched(self, kind: str) -> Iterator[tuple[psutil.Process, psutil.Process]]:
        with serving(self.run_path, self.cache) as (origin, token, process):
            watchers = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.dashboard", "--watch", kind, origin, token],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            try:
                assert watchers.stdout is not None
                if "watching" not in watchers.stdout.readline():
                    raise RuntimeError(f"the {kind} did not open")
                yield process, psutil.Process(watchers.pid)
            finally:
                watchers.communicate(input="end\n", timeout=60)


def until_told() -> None:
    sys.stdout.write("watching\n")
    sys.stdout.flush()
    sys.stdin.readline()


def pages(origin: str, token: str) -> None:
    """Ten pages on a run, each in a browser profile of its own, until standard input has a line."""
    with chromium() as browser:
        for _ in range(WATCHING):
            page = browser.new_context().new_page()
            page.goto(f"{origin}/#token={token}")
            page.locator("#how").wait_for(timeout=120_000)
        until_told()


def clients(origin: str, token: str) -> None:
    """Ten clients that ask what ten pages ask, until standard input has a line."""
    opened = threading.Barrier(WATCHING + 1, timeout=120)
    for _ in range(WATCHING):
        threading.Thread(target=follow, args=(origin, token, opened), daemon=True).start()
    opened.wait()
    until_told()


def follow(origin: str, token: str, opened: threading.Barrier) -> None:
    """What a page asks of the server for as long as it is open."""
    client = httpx.Client(base_url=origin, headers={"authorization": f"Bearer {token}"}, timeout=120)

    def ask(path: str, **params: Any) -> Any:
        return client.get(f"/api/{path}", params=params).raise_for_status().json()

    run = ask("runs")["runs"][0]["name"]
    metrics = ask("run", run=run)["metrics"][:CURVES]
    ask("curves", run=run, name=metrics, points=600)
    ask("events", run=run, level="", most=2000)
    with client.stream("GET", "/api/stream", params={"run": run}) as stream:
        opened.wait()
        asked = time.monotonic()
        for line in stream.iter_lines():
            if line == "event: events" and time.monotonic() - asked > 1:
                asked = time.monotonic()
                ask("events", run=run, level="", most=2000)


def measure_run(size: Size, root: Path) -> dict[str, float]:
    """Of a small training run: what it costs to be watched."""
    from rich.console import Console

    from benchmarks import pipeline
    from cluster.driver import train
    from cluster.files import read_jsonl
    from cluster.ray_runtime import ray_cluster
    from cluster.recipe import apply_overrides, resolve

    skip = 3
    # More than are needed: how many pass while ten pages open is not known. The watcher ends the run.
    scale = pipeline.Size(steps=MOST_STEPS, runs=(1,), groups_per_step=4, max_tokens=24, prompts=MOST_STEPS)
    pipeline.build_policy(True, scale, root / "policy")
    config = resolve(
        apply_overrides(pipeline.recipe(scale, root / "policy", 1).model_dump(mode="json"), ["run.max_staleness=1"]),
        NAME,
    )
    watching = Watching(root / "run", root / "cache-run", size, skip)
    watching.start()
    with ray_cluster(config.cluster):
        train(config, root / "run", resume="never", console=Console(stderr=True))
    watching.join(timeout=60)
    if watching.problem is not None:
        raise watching.problem
    rows = {int(row["step"]): row for row in read_jsonl(root / "run" / "metrics.jsonl")}

    def step_s(steps: range) -> float:
        return median(rows[step]["time/step_s"] for step in steps)

    assert watching.pages is not None
    with_pages, before = map(step_s, watching.pages)
    ratios = [step_s(followed) / step_s(alone) for followed, alone in watching.pairs]
    low, ratio, high = quantiles(ratios, n=4)
    return {
        "step_s_alone": median(step_s(alone) for _, alone in watching.pairs),
        "pairs": len(ratios), "steps_of_each": sum(len(followed) for followed, _ in watching.pairs),
        "step_ratio": ratio, "step_ratio_low": low, "step_ratio_high": high,
        "server_cpu_share": watching.server_cpu, "clients_cpu_share": watching.clients_cpu,
        "step_s_pages": with_pages, "step_ratio_pages": with_pages / before,
    }  # fmt: skip


def loaded() -> Mapping[str, float]:
    """How busy the machine was with other things: its figures are worth as much as it was quiet."""
    return {"load_average_1min": os.getloadavg()[0]}


def main() -> None:
    if "--watch" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--watch", nargs=3)
        kind, origin, token = parser.parse_args().watch
        {"clients": clients, "pages": pages}[kind](origin, token)
        return
    options = parse_options(NAME, "The run page on a large run, and what it costs a run to be watched.")
    size = QUICK if options.quick else FULL
    before = loaded()
    with tempfile.TemporaryDirectory(prefix="attune-dashboard-") as root:
        results = {**before, **measure_page(size, Path(root)), **measure_run(size, Path(root))}
    finish(NAME, options, results)


if __name__ == "__main__":
    main()
