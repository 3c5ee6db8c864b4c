"""What a killed driver started is ended, and its directory goes; what ends by itself is left alone."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from cluster.janitor import family

SLEEP = "import time; time.sleep(300)"
CHILD = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', '{SLEEP}']).pid, flush=True); {SLEEP}"
DRIVER = textwrap.dedent("""
    import subprocess, sys, time
    from pathlib import Path
    from cluster.janitor import with_janitor
    directory, how, child = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    with with_janitor(directory):
        directory.mkdir()
        (directory / "weights").write_text("x")
        started = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, start_new_session=True)
        print(started.pid, int(started.stdout.readline()), flush=True)
        time.sleep(300 if how == "killed" else 3)
""")


def driven(directory: Path, how: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(directory), how, CHILD], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert driver.stdout is not None
    return driver, [psutil.Process(int(pid)) for pid in driver.stdout.readline().split()]


def test_what_a_killed_driver_started_is_gone_within_a_minute(tmp_path: Path) -> None:
    directory = tmp_path / "shared"
    driver, started = driven(directory, "killed")
    time.sleep(2.5)  # the janitor looks every two seconds
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive
    end = time.monotonic() + 10
    while directory.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not directory.exists()


def test_a_name_that_is_cut_in_the_middle_of_a_letter_is_read() -> None:
    """The kernel keeps 15 bytes of it; anybody's process may have one."""
    rename = "import ctypes; ctypes.CDLL(None).prctl(15, 'öööööööööö'.encode()); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", rename], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as named:
        assert named.stdout is not None
        assert named.stdin is not None
        named.stdout.readline()
        with pytest.raises(UnicodeDecodeError):
            Path(f"/proc/{named.pid}/stat").read_text(encoding="utf-8")
        assert family()[named.pid][0] == os.getpid()
        named.stdin.close()


def test_who_ends_a_driver_with_all_that_descends_from_it_does_not_end_the_janitor(tmp_path: Path) -> None:
    """So a Ray job is stopped whose driver takes longer than its grace."""
    directory = tmp_path / "shared"
    driver, started = driven(directory, "killed")
    time.sleep(2.5)
    for process in [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]:
        process.kill()
    driver.wait()
    end = time.monotonic() + 30
    while directory.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not directory.exists()
    assert not psutil.wait_procs(started, timeout=10)[1]


@pytest.mark.slow
def test_what_a_driver_leaves_on_purpose_is_left(tmp_path: Path) -> None:
    driver, started = driven(tmp_path / "shared", "ended")
    assert driver.wait(30) == 0
    time.sleep(1)
    assert all(process.is_running() for process in started)
    for process in started:
        process.kill()
