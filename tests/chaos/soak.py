"""Hours of small steps, undisturbed: `python -m tests.chaos.soak --hours 2`. Does anything grow?

Resident memory and open files of each of the run's processes, and the memory and keys of its Redis, every `EVERY_S`.
The first quarter is not counted: caches and allocators fill. Growth is the Theil-Sen slope (the median of the slopes
of all pairs: a few spikes do not move it), times the counted time, in percent of the median; flat is within
`FLAT_PERCENT` or within `FLAT_MB` (allocators hand memory out in arenas, and a process of 30 MB moves by more than a
percent with each). Of the keys of Redis, those that stay must be flat; those that expire (each request's, for a minute)
follow the steps a second, which are the machine's, so that what must be flat is their number for each step of a minute.
The last line is a JSON object; exit 0 where all is flat.
"""

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml
from redis import Redis

from services.stream.embedded import address_in
from tests.chaos.scene import ENGINES, write_recipe
from tests.chaos.watch import Watch, last_row, wait_until

EVERY_S = 10.0
FLAT_PERCENT, FLAT_MB, FLAT_FILES = 2.0, 4.0, 2.0
PAIRS = 20_000
MINUTE_S = 60.0
EXPIRING, STEPS = "redis_keys that expire", "steps"
EPOCH = 400
"""Prompts. The ledger holds two or three epochs: with long ones it would still be filling after the first quarter."""
START_S, STOP_S = 300.0, 120.0

Series = dict[str, list[tuple[float, float]]]
"""Name to (seconds since the first look, value)."""


def growth(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(median, growth over the time of the points), by Theil-Sen over all pairs, or PAIRS of them drawn at random."""
    values = [value for _, value in points]
    count = len(points)
    draw = random.Random(0)
    pairs = (
        [(i, j) for i in range(count) for j in range(i + 1, count)]
        if count * (count - 1) // 2 <= PAIRS
        else [(draw.randrange(count), draw.randrange(count)) for _ in range(PAIRS)]
    )
    slopes = [
        (points[j][1] - points[i][1]) / (points[j][0] - points[i][0]) for i, j in pairs if points[i][0] != points[j][0]
    ]
    slope = statistics.median(slopes) if slopes else 0.0
    return statistics.median(values), slope * (points[-1][0] - points[0][0])


def name_of(process: psutil.Process) -> str:
    """What a process is, without its number: an actor's class, a program."""
    words = process.cmdline()
    if words and words[0].startswith("ray::"):
        return words[0].removeprefix("ray::").split(".")[0].split("(")[0]
    scripts = [Path(word).name for word in words[1:] if word.endswith(".py") or word.startswith("services.")]
    modules = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "-m"]
    return next(iter(modules + scripts), process.name())


def look(watch: Watch, at: float, series: Series, redis: "Redis | None") -> None:
    """One sample of everything. Processes that end while they are looked at are left out."""
    watch.processes()
    for process in watch.alive():
        try:
            name = f"{name_of(process)} {process.pid}"
            memory, files = process.memory_info().rss / 2**20, process.num_fds()
        except psutil.Error:
            continue
        series.setdefault(f"rss_mb {name}", []).append((at, memory))
        series.setdefault(f"files {name}", []).append((at, float(files)))
    if redis is not None:
        info: Any = redis.info("memory")
        series.setdefault("redis_mb used_memory", []).append((at, info["used_memory"] / 2**20))
        space: Any = redis.info("keyspace")
        keys, expire = (float(sum(one[field] for one in space.values())) for field in ("keys", "expires"))
        series.setdefault("redis_keys that stay", []).append((at, keys - expire))
        series.setdefault(EXPIRING, []).append((at, expire))
    newest = last_row(watch.run / "metrics.jsonl", lambda _: True)
    series.setdefault(STEPS, []).append((at, 0.0 if newest is None else newest["step"] + 1.0))


def per_step(
    expiring: Sequence[tuple[float, float]], steps: Sequence[tuple[float, float]]
) -> list[tuple[float, float]]:
    """Expiring keys for each step of the minute before, from the first whole minute on."""
    found: list[tuple[float, float]] = []
    for i, (at, keys) in enumerate(expiring):
        before = [count for then, count in steps[:i] if then <= at - MINUTE_S]
        if before and steps[i][1] > before[-1]:
            found.append((at, keys / (steps[i][1] - before[-1])))
    return found


def judged(series: Series, seconds: float) -> dict[str, dict[str, Any]]:
    """Each series that was there for the whole counted time: median, growth, and whether that is flat."""
    found: dict[str, dict[str, Any]] = {}
    rated = {f"{EXPIRING}, a step": per_step(series.get(EXPIRING, []), series[STEPS])}
    for name, points in sorted({**series, **rated}.items()):
        if name in (EXPIRING, STEPS):
            continue
        counted = [point for point in points if point[0] >= seconds / 4]
        if len(counted) < 3 or counted[0][0] > seconds / 2 or counted[-1][0] < seconds - 3 * EVERY_S:
            continue
        median, grown = growth(counted)
        spare = FLAT_MB if "_mb" in name else 0.0 if name in rated else FLAT_FILES
        allowed = max(spare, median * FLAT_PERCENT / 100)
        found[name] = {
            "median": round(median, 2),
            "growth": round(grown, 2),
            "percent": round(100 * grown / median, 2) if median else 0.0,
            "worst": round(max(value for _, value in counted), 2),
            "flat": grown <= allowed,
        }
    return found


def soak(directory: Path, hours: float, seed: int, engine: str) -> dict[str, Any]:
    recipe = write_recipe(directory, EPOCH, seed, engine)
    tree = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    tree["run"]["epochs"] = 1000  # ended by a signal, not by its prompts
    tree["checkpoint"]["every"] = 10
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    run = directory / "run"
    watch, series = Watch(run), Series()
    with (directory / "driver.log").open("a", encoding="utf-8") as output:
        command = [sys.executable, "-m", "cluster", "train", str(recipe), "--run-dir", str(run)]
        driver = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        watch.driver = psutil.Process(driver.pid)
        try:
            if not wait_until(lambda: bool(watch.steps()) or driver.poll() is not None, START_S, 0.5):
                raise RuntimeError(f"no step in {START_S:.0f} s; see {directory}/driver.log")
            url = address_in(run / "redis")
            redis = None if url is None else Redis.from_url(url)
            began = time.monotonic()
            while (at := time.monotonic() - began) < hours * 3600 and driver.poll() is None:
                look(watch, at, series, redis)
                time.sleep(EVERY_S)
            (directory / "series.json").write_text(json.dumps(series), encoding="utf-8")
            driver.send_signal(signal.SIGTERM)
            code = driver.wait(STOP_S)
        finally:
            if driver.poll() is None:
                driver.kill()
    found = judged(series, at)
    return {
        "hours": round(at / 3600, 3),
        "died": [event["event"] for event in watch.events() if event["event"].endswith("_died")],
        "exit": code,
        "steps": len(watch.steps()),
        "incarnations": sum(1 for event in watch.events() if event["event"] == "start"),
        "not_flat": [name for name, one in found.items() if not one["flat"]],
        "series": found,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak", description=__doc__)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=ENGINES, default=ENGINES[0], help="what the rollout actor generates with")
    parser.add_argument("--directory", type=Path, help="where the run is written; a temporary one where it is absent")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="attune-soak-") as temporary:
        directory = arguments.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        found = soak(directory, arguments.hours, arguments.seed, arguments.engine)
    for name, one in found["series"].items():
        verdict = "" if one["flat"] else "GROWS"
        print(f"{name:48} {one['median']:>10} {one['growth']:>+9} {one['percent']:>+7} %  {verdict}")
    print(json.dumps(found))
    whole = bool(found["series"]) and not found["not_flat"] and not found["died"]
    return 0 if whole and found["exit"] == 4 and found["incarnations"] == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
