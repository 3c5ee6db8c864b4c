"""Ends what a killed driver leaves behind: run as a program, in a session of its own, by `with_janitor`.

    python -I -S janitor.py DRIVER_PID DIRECTORY

A driver that is killed with SIGKILL cleans nothing up: some of the Ray processes that it started live on for minutes,
and the weights that it published stay in memory for good. So a small process, which imports nothing of ours, keeps the
list of what descends from the driver, and reads a pipe that the kernel closes when the driver ends. The driver's own
last word, DONE, says that nothing is to be done.
"""

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

DONE = b"done"
LOOK_S = 2.0
END_S = 20.0

Process = tuple[int, int]
"""Number and start time (ticks): numbers are used again."""


def family() -> dict[int, tuple[int, int]]:
    """Parent and start time of every process that this one may look at."""
    found: dict[int, tuple[int, int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal():
            try:
                # The kernel cuts a process's name after 15 bytes, in the middle of a letter, too.
                fields = Path(entry.path, "stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] not in "ZX":
                found[int(entry.name)] = (int(fields[1]), int(fields[19]))
    return found


def began_at(pid: int) -> int | None:
    """The start time (ticks) of a process; None where there is none."""
    return family().get(pid, (0, None))[1]


def descendants(of: set[int], processes: dict[int, tuple[int, int]]) -> set[Process]:
    """The processes below some others, however deep."""
    below: set[int] = set()
    front = set(of)
    while front:
        front = {pid for pid, (parent, _) in processes.items() if parent in front} - below
        below |= front
    return {(pid, processes[pid][1]) for pid in below}


def watch(driver: int) -> set[Process] | None:
    """What descended from the driver when it was killed; None where it ended by itself.

    What was there before this process began is somebody else's.
    """
    own = os.getpid()
    began = began_at(own)
    assert began is not None
    known: set[Process] = set()
    while True:
        ready, _, _ = select.select([sys.stdin.buffer], [], [], LOOK_S)
        if ready:
            return None if os.read(sys.stdin.fileno(), 64).startswith(DONE) else known
        processes = family()
        alive = {process for process in known if processes.get(process[0], (0, 0))[1] == process[1]}
        found = alive | descendants({driver} | {pid for pid, _ in alive}, processes)
        known = {(pid, start) for pid, start in found if start >= began and pid != own}


def end(known: set[Process]) -> None:
    """Kills those of the processes, and of what they started meanwhile, that are still there."""
    give_up = time.monotonic() + END_S
    while time.monotonic() < give_up:
        processes = family()
        alive = {process for process in known if processes.get(process[0], (0, 0))[1] == process[1]}
        if not alive:
            return
        known = alive | descendants({pid for pid, _ in alive}, processes)
        for pid, _ in known:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:  # gone by itself
                continue
        time.sleep(0.2)


@contextmanager
def with_janitor(directory: Path) -> Iterator[None]:
    """For the block, what this process starts is ended, and `directory` removed, should it be killed."""
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(directory)]
    launcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert launcher.stdin is not None
    launcher.wait(END_S)
    try:
        yield
    finally:
        with suppress(BrokenPipeError):  # it was killed itself
            launcher.stdin.write(DONE)
            launcher.stdin.close()


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if os.fork():  # Ray kills what descends from the driver of a job together with it: the janitor is no child of its
        sys.exit()
    left_behind = watch(int(sys.argv[1]))
    if left_behind is not None:
        end(left_behind)
        shutil.rmtree(sys.argv[2], ignore_errors=True)
