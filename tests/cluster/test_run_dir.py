"""The run directory: one driver at a time, torn lines, cutting back to a commit, dense maps in files."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from cluster import files
from cluster.files import BLOCK, read_jsonl, write_atomically
from cluster.run_dir import RunDir
from services.errors import UserError
from services.records import Attention, Group, PolicyVersion, Prompt, Sample


def sample_of(group_id: str, index: int, rows: tuple[tuple[float, ...], ...] | None = None) -> Sample:
    ones = (1.0, 1.0)
    return Sample(
        sample_id=f"{group_id}:{index}",
        group_id=group_id,
        prompt_id=group_id.partition(":")[2],
        attempt=1,
        policy_versions=((1, 0, 2),),
        prompt="Größe?",
        prompt_ids=(5, 6, 7),
        response="ja",
        response_ids=(1, 2),
        finish_reason="stop",
        logprobs=(-0.5, -0.25),
        attention=Attention(
            layers=(0,),
            content=(0, 1, 2),
            salient=(1,),
            salient_weights=(1.0,),
            mass=ones,
            salient_mass=ones,
            neg_entropy_sum=ones,
            peak=ones,
            map=rows,
        ),
        created_at=0.0,
    )


def group_of(group_id: str, *samples: Sample) -> Group:
    return Group(
        group_id=group_id,
        attempt=1,
        epoch=0,
        order=0,
        version=PolicyVersion(1, 0),
        prompt=Prompt(prompt_id=group_id.partition(":")[2], source="tests", text="Größe?"),
        eos_ids=(2,),
        samples=samples,
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "runs" / "one")
    run.path.mkdir(parents=True)
    return run


# ---- the lock

HOLD = """
import sys
from pathlib import Path
from cluster.run_dir import RunDir
run = RunDir(Path(sys.argv[1]))
run.lock()
print("held", flush=True)
sys.stdin.read()
"""


def test_one_driver_at_a_time_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError) as caught:
            RunDir(path).lock()
        assert f"in use by process {other.pid} on {os.uname().nodename}" in str(caught.value)
        assert str(path) in str(caught.value)
        other.kill()
    run = RunDir(path)
    run.lock()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} "):
        RunDir(path).lock()
    run.unlock()
    run.unlock()
    RunDir(path).lock()


def test_another_drivers_end_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = RunDir(tmp_path)
    first.lock()
    began = time.monotonic()
    with pytest.raises(UserError, match="in use by"):
        RunDir(tmp_path).lock(wait_s=1.0)
    assert time.monotonic() - began >= 1.0
    threading.Timer(1.0, first.unlock).start()
    RunDir(tmp_path).lock(wait_s=60.0)
    assert "waiting 60 s for its end" in caplog.text


def test_a_directory_that_cannot_be_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory"):
        RunDir(tmp_path / "file" / "run").lock()


# ---- events


def test_events_are_lines_and_the_last_start_counts(run: RunDir) -> None:
    assert run.last_incarnation() == 0
    assert run.run_id() is None
    run.event("redis_started", port=1)
    run.event("start", incarnation=1, run_id="abc")
    run.event("group_failed", group_id="0:p", reason="zu lang – 97 Zeichen")
    run.event("start", incarnation=2, run_id="another")
    run.event("ended", error="x")
    assert run.last_incarnation() == 2
    assert run.run_id() == "abc"
    events = list(read_jsonl(run.events))
    assert [event["event"] for event in events] == ["redis_started", "start", "group_failed", "start", "ended"]
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    assert "–" in run.events.read_text(encoding="utf-8")


@pytest.mark.parametrize("cut", [1, 7, 30])
def test_an_event_cut_short_costs_no_other(run: RunDir, cut: int) -> None:
    run.event("start", incarnation=1, run_id="abc")
    run.event("start", incarnation=2, run_id="abc")
    os.truncate(run.events, run.events.stat().st_size - cut)
    assert run.last_incarnation() == 1
    run.lock()  # as the next start does
    run.event("start", incarnation=2, run_id="abc")
    run.event("committed", step=1)
    assert [event["event"] for event in read_jsonl(run.events)] == ["start", "start", "committed"]
    run.unlock()


FULL = """
import resource, sys
from pathlib import Path
from cluster.run_dir import RunDir
run = RunDir(Path(sys.argv[1]))
write = run.event if sys.argv[2] == "events" else lambda kind, **fields: run.write_metrics(len(kind), fields)
file = run.events if sys.argv[2] == "events" else run.metrics
write("a", note="before")
size = file.stat().st_size
# The kernel writes what there is room for, and then refuses, as on a full disk.
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))
try:
    write("bb", note="Größe" * 2000)
except OSError as error:
    print(error.strerror, file.stat().st_size == size)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
write("ccc", note="after")
"""


@pytest.mark.parametrize("name", ["events", "metrics"])
def test_a_line_that_a_full_disk_cuts_short_takes_no_other_with_it(run: RunDir, name: str) -> None:
    command = [sys.executable, "-c", FULL, str(run.path), name]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "File too large True\n"
    assert [row["note"] for row in read_jsonl(run.path / f"{name}.jsonl")] == ["before", "after"]


def test_an_event_that_fails_does_not_cut_off_another_threads(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that failed is taken back to where it began: nobody may have written after that meanwhile."""
    failing, proceed = threading.Event(), threading.Event()
    fsync = os.fsync

    def broken(descriptor: int) -> None:
        if threading.current_thread().name != "failing":
            return fsync(descriptor)
        failing.set()
        proceed.wait(10)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def fail() -> None:
        with pytest.raises(OSError, match="Input/output error"):
            run.event("lost")

    monkeypatch.setattr(os, "fsync", broken)
    threads = [threading.Thread(target=fail, name="failing"), threading.Thread(target=run.event, args=("kept",))]
    threads[0].start()
    assert failing.wait(10)
    threads[1].start()
    threads[1].join(0.5)
    proceed.set()
    for thread in threads:
        thread.join(10)
    assert [event["event"] for event in read_jsonl(run.events)] == ["kept"]


# ---- metrics, samples and what a resume leaves of them


def filled(run: RunDir, steps: int) -> None:
    for step in range(steps):
        run.write_metrics(step, {"reward/mean": step / 7, "a": step, "incarnation": 1})
        rows = ((0.25, 0.5, 0.25), (0.0, 1.0, 0.0))
        groups = [group_of(f"0:p{step}", sample_of(f"0:p{step}", 0, rows), sample_of(f"0:p{step}", 1))]
        run.write_samples(step, groups, {f"0:p{step}:1": {"advantage": 0.5}})


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_metrics_have_the_step_first_and_then_sorted_keys(run: RunDir) -> None:
    filled(run, 2)
    assert run.metrics.read_text().splitlines()[1] == '{"step": 1, "a": 1, "incarnation": 1, "reward/mean": %r}' % (
        1 / 7
    )


def test_samples_are_shards_with_maps_beside_them(run: RunDir) -> None:
    filled(run, 1)
    first, second = read_jsonl(run.samples / "step_000000.jsonl")
    assert (first["step"], first["sample_id"]) == (0, "0:p0:0")
    assert "advantage" not in first
    assert second["advantage"] == 0.5
    assert first["prompt"] == "Größe?"
    assert first["attention"]["map"] is None
    assert second["attention"]["map_ref"] is None
    stored = load_file(run.path / first["attention"]["map_ref"])["map"]
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, [[0.25, 0.5, 0.25], [0.0, 1.0, 0.0]])
    # Without the keys that the log adds, a row is a sample again.
    Sample.model_validate({key: value for key, value in first.items() if key != "step"})


def test_samples_are_on_the_disk_before_the_step_can_be_committed(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: dict[str, int] = {}

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced[path.relative_to(run.path).as_posix()] = path.stat().st_size

    monkeypatch.setattr(os, "fsync", fsync)
    filled(run, 1)
    for name in (
        "samples/step_000000.jsonl",
        "samples",
        "samples/maps",
        "samples/maps/step_000000",
        "samples/maps/step_000000/0_p0_0.safetensors",
    ):
        assert synced[name] == (run.path / name).stat().st_size


@pytest.mark.parametrize("steps", [0, 1, 3, 5, 9])
def test_cutting_back_leaves_the_steps_of_the_commit(run: RunDir, steps: int) -> None:
    filled(run, 5)
    before = run.metrics.read_text().splitlines(keepends=True)
    run.cut_back(steps)
    left = min(steps, 5)
    assert run.metrics.read_text() == "".join(before[:left])
    assert names(run.samples) == sorted(["maps", *(f"step_{step:06d}.jsonl" for step in range(left))])
    assert names(run.maps) == [f"step_{step:06d}" for step in range(left)]


def test_cutting_back_takes_a_torn_last_line_with_it(run: RunDir) -> None:
    filled(run, 3)
    os.truncate(run.metrics, run.metrics.stat().st_size - 4)
    run.cut_back(3)
    assert [row["step"] for row in read_jsonl(run.metrics)] == [0, 1]
    run.write_metrics(2, {"a": 2})
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [0, 1, 2]


def test_cutting_back_touches_nothing_where_nothing_is_to_be_cut(run: RunDir) -> None:
    filled(run, 3)
    before = run.metrics.stat()
    run.cut_back(3)
    after = run.metrics.stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_size) == (before.st_ino, before.st_mtime_ns, before.st_size)


def test_cutting_back_reads_the_end_alone(run: RunDir) -> None:
    """A run of weeks goes back to its last commit: what is long committed is not looked at."""
    run.metrics.write_bytes(b"no line of ours\n" + b"x" * 3 * BLOCK + b"\n")
    filled(run, 3)
    before = run.metrics.read_bytes()
    run.cut_back(1)
    assert run.metrics.read_bytes() == before[: before.index(b'{"step": 1')]


@pytest.mark.parametrize("torn", [0, 1, 50])
def test_lines_are_cut_wherever_the_blocks_that_are_read_end(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, torn: int
) -> None:
    for block in range(1, 150, 7):
        run.metrics.unlink(missing_ok=True)
        for step in range(6):
            run.write_metrics(step, {"note": "x" * (11 * step % 61)})
        lines = run.metrics.read_bytes().splitlines(keepends=True)
        os.truncate(run.metrics, run.metrics.stat().st_size - torn)
        monkeypatch.setattr(files, "BLOCK", block)
        run.cut_back(5)
        assert run.metrics.read_bytes() == b"".join(lines[:5]), block
        run.cut_back(2)
        assert run.metrics.read_bytes() == b"".join(lines[:2]), block
        run.cut_back(0)
        assert run.metrics.read_bytes() == b"", block


def test_cutting_back_an_empty_directory_makes_nothing(run: RunDir) -> None:
    run.cut_back(0)
    assert list(run.path.iterdir()) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
