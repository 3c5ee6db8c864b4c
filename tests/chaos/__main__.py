"""A small run on the CPU whose parts are killed at random moments: `python -m tests.chaos --kills 100 --seed 1`.

Rollout actors, scoring workers, the reward server, model actors, learner ranks, Redis and the driver get SIGKILL, more
often at the dangerous moments: between an optimizer step and its commit, in mid-checkpoint, while weights are written,
and while what was killed comes up again. The moments are seen from outside, by the files that appear; some last for
milliseconds, so the victim is halted at once and killed if the moment is still there. When the driver has died it is
started again with `--resume auto`, as a service manager would: every other time after all that it left is gone, which
is timed. The last line is a JSON object; exit 0 where nothing was lost, trained twice, or left behind, no witness
disagrees with the manifest, and nothing ended that was not killed.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.account import GONE_S, left_behind, prompts_of, times_of
from tests.chaos.scene import ENGINES, write_recipe
from tests.chaos.watch import Watch, is_alive, wait_until

# Kind and moment of a death, and how often it stands in the deck.
DECK = {
    ("learner", "step"): 3,
    ("learner", "checkpoint"): 3,
    ("learner", "transfer"): 2,
    ("driver", "step"): 1,
    ("driver", "checkpoint"): 1,
    ("driver", "transfer"): 1,
    ("redis", "step"): 1,
    ("redis", "any"): 1,
    ("rollout", "transfer"): 1,
    ("rollout", "any"): 2,
    ("scoring_worker", "any"): 2,
    ("reward_server", "any"): 2,
    ("model", "any"): 2,
    ("learner", "start"): 1,
    ("driver", "start"): 1,
    ("rollout", "start"): 1,
    ("reward_server", "start"): 1,
}
PROGRESS_S = 300.0
"""Longest that a run may take to get on after a death."""
GIVE_UP_AFTER = 5
"""Ends of the driver that nobody asked for."""
WRONG = (
    "lost", "unknown", "trained_twice", "disagreements", "orphans", "shared_memory", "outlived", "ended_by_itself",
)  # fmt: skip
"""What has to be nothing in the end."""
MOMENT_S = 60.0
"""Longest that a moment is waited for."""
COMING_UP_S = 8.0
"""What is killed again as it comes up is killed within so many seconds."""


class Chaos:
    def __init__(self, directory: Path, kills: int, seed: int, engine: str, say: Callable[[str], None]) -> None:
        self.run = directory / "run"
        self.log = (directory / "driver.log").open("a", encoding="utf-8")
        self.recipe = write_recipe(directory, 24 + 12 * kills, seed, engine)
        self.random = random.Random(seed)
        self.watch = Watch(self.run)
        self.kills = kills
        self.say = say
        self.deaths: list[dict[str, Any]] = []
        self.starts = 0
        self.unasked: list[int] = []
        self.gone_s: list[float] = []
        """Seconds from a death of the driver until all that it had started, and its weights, were gone."""
        self.outlived = 0
        """Processes and shared memory of killed drivers that were there a minute later."""
        self.driver: subprocess.Popen[bytes] | None = None
        self.killed: set[int] = set()
        """Numbers of the drivers that were killed."""
        self._deck: list[tuple[str, str]] = []

    # The driver

    def start(self) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        self.driver = subprocess.Popen(
            [sys.executable, "-m", "cluster", "train", str(self.recipe), "--run-dir", str(self.run)],
            env=environment,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.watch.driver = psutil.Process(self.driver.pid)
        self.starts += 1

    def ended(self) -> bool:
        """Whether the run is done; a driver that died is started again."""
        assert self.driver is not None
        code = self.driver.poll()
        if code is None:
            return False
        if code == 0:
            return True
        if self.driver.pid in self.killed:
            if len(self.killed) % 2:
                self.wait_for_janitor()
        else:
            self.unasked.append(code)
            self.say(f"the driver ended by itself with {code}")
            if len(self.unasked) >= GIVE_UP_AFTER:
                raise RuntimeError(f"the driver ended by itself {len(self.unasked)} times; its log says why")
        self.start()
        return False

    def wait_for_janitor(self) -> None:
        """Until nothing is left of a driver that was killed; what is left after a minute is counted."""
        began = time.monotonic()
        wait_until(lambda: not self.watch.alive() and not self.watch.published(), GONE_S, 0.1)
        self.gone_s.append(round(time.monotonic() - began, 1))
        self.outlived += len(self.watch.alive()) + len(self.watch.published())

    # Deaths

    def next_card(self) -> tuple[str, str]:
        if not self._deck:
            self._deck = [card for card, count in DECK.items() for _ in range(count)]
            self.random.shuffle(self._deck)
        return self._deck.pop()

    def kill(self, kind: str, moment: str) -> None:
        """Kills one of the kind at the moment, and waits until the run gets on; nothing where it ends before."""
        time.sleep(self.random.uniform(0.0, 1.5))
        pause = self.random.uniform(0.0, COMING_UP_S)
        before = self.strike(kind, "any" if moment == "start" else moment)
        if moment == "start" and before is not None and len(self.deaths) < self.kills:
            end = time.monotonic() + pause
            wait_until(lambda: self.ended() or time.monotonic() >= end, COMING_UP_S)
            before = self.strike(kind, "any", "start") or before
        if before is None:
            return
        at = time.monotonic()
        got_on = wait_until(lambda: self.got_on(kind, before), PROGRESS_S, 0.1)
        death = self.deaths[-1]
        death["progress_s"] = round(time.monotonic() - at, 2) if got_on else None
        self.say(f"kill {len(self.deaths)}/{self.kills}: {death}")
        if not got_on:
            raise RuntimeError(f"no progress within {PROGRESS_S:.0f} s of the death of {kind}")

    def strike(self, kind: str, moment: str, said: str | None = None) -> set[tuple[int, int]] | None:
        """Kills one of the kind as soon as the moment is there; the steps recorded until then, None where none died."""
        moments = {
            "step": self.watch.between_step_and_commit,
            "checkpoint": self.watch.in_mid_checkpoint,
            "transfer": self.watch.in_mid_transfer,
        }
        there = moments.get(moment, lambda: True)
        if not wait_until(lambda: self.ended() or bool(self.watch.processes()[kind]), PROGRESS_S, 0.2):
            raise RuntimeError(f"no {kind} came up in {PROGRESS_S:.0f} s")
        give_up = time.monotonic() + MOMENT_S
        while not self.driver_gone():
            victims = [process for process in self.watch.processes()[kind] if is_alive(process)]
            if not victims:
                time.sleep(0.05)
                continue
            wait_until(lambda: there() or self.driver_gone(), MOMENT_S)
            victim = self.random.choice(victims)
            try:
                victim.suspend()  # the moment may be over before more is known of it
                met, late = there(), time.monotonic() >= give_up
                if not (met or late):
                    victim.resume()
                    continue
                before = self.watch.steps()
                victim.kill()
            except psutil.NoSuchProcess:
                continue
            if kind == "driver":
                self.killed.add(victim.pid)
            self.deaths.append(
                {"kind": kind, "moment": said or (moment if met else "any"), "at_step": len(before), "progress_s": None}
            )
            return before
        return None

    def driver_gone(self) -> bool:
        return self.driver is None or self.driver.poll() is not None

    def got_on(self, kind: str, before: set[tuple[int, int]]) -> bool:
        """Whether steps were recorded that need the part that died: the first under a new incarnation, or the second
        from now (the first one's batch may have been complete)."""
        if self.ended():
            return True
        self.watch.look()
        latest = max(before, default=(0, -1))
        after = {step for step in self.watch.steps() if step > latest}
        return any(step[0] > latest[0] for step in after) or (len(after) >= 2 and kind not in ("learner", "driver"))

    def go(self) -> dict[str, Any]:
        began = time.monotonic()
        self.start()
        wait_until(lambda: len(self.watch.steps()) > 0 or self.ended(), PROGRESS_S, 0.1)
        while len(self.deaths) < self.kills and not self.ended():
            self.kill(*self.next_card())
        self.say(f"{len(self.deaths)} kills; the run goes on to its end")
        while not self.ended():
            self.watch.processes()
            time.sleep(0.5)
        return {
            "kills": len(self.deaths),
            **prompts_of(self.run),
            **left_behind(self.watch),
            "driver_starts": self.starts,
            "ended_by_itself": self.unasked,
            "incarnations": sum(1 for event in self.watch.events() if event["event"] == "start"),
            "seconds": round(time.monotonic() - began),
            "to_progress": times_of(self.deaths),
            "at_moments": {
                moment: sum(1 for death in self.deaths if death["moment"] == moment)
                for moment in ("step", "checkpoint", "transfer", "start", "any")
            },
            "outlived": self.outlived,
            "driver_left_nothing_after_s": self.gone_s,
        }

    def stop(self) -> None:
        """Ends what is left of a run that was given up: its driver, and what the driver's janitor does not."""
        if self.driver is not None and self.driver.poll() is None:
            self.driver.kill()
            wait_until(lambda: not self.watch.alive(), GONE_S, 0.5)
        for process in self.watch.alive():
            process.kill()
        self.log.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=ENGINES, default=ENGINES[0], help="what the rollout actor generates with")
    parser.add_argument("--directory", type=Path, help="where the run is written; a temporary one where it is absent")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="attune-chaos-") as temporary:
        directory = arguments.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        chaos = Chaos(
            directory, arguments.kills, arguments.seed, arguments.engine, lambda text: print(text, flush=True)
        )
        try:
            found = {"seed": arguments.seed, "engine": arguments.engine, **chaos.go()}
        finally:
            chaos.stop()
    print(json.dumps(found))
    whole = not any(found[key] for key in WRONG)
    return 0 if whole and found["kills"] >= arguments.kills else 1


if __name__ == "__main__":
    sys.exit(main())
