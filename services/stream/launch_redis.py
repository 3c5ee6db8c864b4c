"""Becomes the redis-server: run as a program, in a fresh interpreter, by `services.stream.embedded`.

    python -I -S launch_redis.py PARENT_PID LOCK_FILE WAIT_S SERVER CONFIG

A program of its own rather than a function between fork and exec: a forked copy of a process with threads may not run
Python safely. It imports nothing of ours. What it sets up survives the exec:

- the lock on the directory (flock on an inherited descriptor): held exactly as long as a server lives, so that two
  servers never write one directory, whatever became of the processes that started them;
- the signal by which the kernel kills the server when the thread that started it ends (PR_SET_PDEATHSIG);
- that it is deaf to SIGTERM and SIGINT. Who stops a run may signal all that descends from it at once (`ray job stop`
  does), and the run needs its Redis for its last commit: it ends the server itself, by SHUTDOWN.

Exit 75: another server holds the directory. Exit 76: the parent was gone already.
"""

import ctypes
import fcntl
import os
import signal
import sys
import time
from typing import NoReturn

LOCKED, ORPHANED = 75, 76
_PR_SET_PDEATHSIG = 1


def become_the_server(parent: int, lock_file: str, wait_s: float, server: str, config: str) -> NoReturn:
    libc = ctypes.CDLL(None, use_errno=True)
    # SIGKILL: nothing that the server is doing can put it off. A reply whose write the log lacks, the driver sees.
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it died before the line above
        sys.exit(ORPHANED)
    lock = os.open(lock_file, os.O_RDWR | os.O_CREAT, 0o600)
    give_up = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= give_up:
                sys.exit(LOCKED)
            time.sleep(0.05)
    os.ftruncate(lock, 0)
    os.write(lock, f"{os.getpid()} {parent}\n".encode())
    os.set_inheritable(lock, True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    os.execv(server, [server, config])  # noqa: S606 - the point of this program


if __name__ == "__main__":
    become_the_server(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4], sys.argv[5])
