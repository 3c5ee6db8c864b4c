"""A checkpoint is committed whole or not at all, and damage is noticed."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from learner.commit import (
    NoSpace,
    Written,
    begin_checkpoint,
    check_space,
    check_written,
    clear_unfinished,
    commit_checkpoint,
    is_full_disk,
    latest_committed,
    latest_manifest,
    needed_bytes,
    prune_checkpoints,
    read_commit,
    set_aside_after,
    written,
)
from services.errors import UserError


def commit(run: Path, step: int, content: str = "weights") -> Path:
    partial = begin_checkpoint(run, step)
    (partial / "engine").mkdir()
    (partial / "engine" / "part.pt").write_text(content)
    (partial / "learner.json").write_text("{}")
    (partial / "empty").touch()
    return commit_checkpoint(partial, {"steps": {"0": ["0:a", "0:b"]}, "step": step})


def ill(path: Path) -> None:
    """Reading it fails with the kernel's own EIO, as on a disk that is going."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


def test_what_was_committed_is_read_back(tmp_path: Path) -> None:
    path = commit(tmp_path, 10)
    assert path == tmp_path / "checkpoints" / "step_10"
    assert not (tmp_path / "checkpoints" / "step_10.partial").exists()
    found = latest_committed(tmp_path)
    assert found.problems == ()
    assert found.commit is not None
    assert (found.commit.step, found.commit.path) == (10, path)
    assert found.commit.manifest["steps"] == {"0": ["0:a", "0:b"]}
    assert set(found.commit.manifest["files"]) == {"engine/part.pt", "learner.json", "empty"}


def test_the_newest_counts_by_number(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        commit(tmp_path, step)
    found = latest_committed(tmp_path).commit
    assert found is not None
    assert found.step == 100


@pytest.mark.parametrize(
    "harm",
    [
        "flipped",
        "shorter",
        "unreadable",
        "file_gone",
        "marker_gone",
        "marker_flipped",
        "marker_unreadable",
        "manifest_gone",
        "manifest_changed",
        "manifest_unreadable",
    ],
)
def test_a_damaged_one_is_named_and_passed_over(harm: str, tmp_path: Path) -> None:
    commit(tmp_path, 1)
    newest = commit(tmp_path, 2)
    part, manifest, marker = newest / "engine" / "part.pt", newest / "manifest.json", newest / "COMMITTED"
    match harm:
        case "flipped":
            part.write_text("Weights")
        case "shorter":
            part.write_text("w")
        case "file_gone":
            part.unlink()
        case "unreadable":
            ill(newest / "empty")
        case "marker_gone":
            marker.unlink()
        case "marker_flipped":
            marker.write_bytes(b"\xff" + marker.read_bytes()[1:])
        case "marker_unreadable":
            ill(marker)
        case "manifest_unreadable":
            ill(manifest)
        case "manifest_gone":
            manifest.unlink()
        case _:
            manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "steps": {}}))
    found = latest_committed(tmp_path)
    assert found.commit is not None
    assert found.commit.step == 1
    (problem,) = found.problems
    assert "step_2" in problem
    with pytest.raises(UserError, match="step_2"):
        read_commit(newest)
    found_manifest, problems = latest_manifest(tmp_path)
    assert found_manifest is not None
    assert [*problems] == ([problem] if "manifest" in harm or "marker" in harm else [])


def test_damage_everywhere_is_no_beginning(tmp_path: Path) -> None:
    for step in (1, 2):
        (commit(tmp_path, step) / "COMMITTED").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"step_2 is damaged.*step_1 is damaged.*move .*/checkpoints away"):
        latest_committed(tmp_path)
    assert latest_manifest(tmp_path)[0] is None
    (tmp_path / "checkpoints").rename(tmp_path / "away")
    assert latest_committed(tmp_path).commit is None


def test_an_unfinished_one_is_no_checkpoint(tmp_path: Path) -> None:
    (begin_checkpoint(tmp_path, 3) / "learner.json").write_text("{}")
    assert latest_committed(tmp_path).commit is None
    assert list(begin_checkpoint(tmp_path, 3).iterdir()) == []


def test_nothing_there_is_nothing_found(tmp_path: Path) -> None:
    assert latest_committed(tmp_path).commit is None
    with pytest.raises(UserError, match="not a checkpoint"):
        read_commit(tmp_path / "checkpoints" / "step_1")


def test_a_step_that_is_committed_is_not_written_over(tmp_path: Path) -> None:
    path = commit(tmp_path, 5, "old")
    with pytest.raises(OSError, match="not empty"):
        commit(tmp_path, 5, "new")
    assert (read_commit(path).path / "engine" / "part.pt").read_text() == "old"


def test_what_a_removal_left_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A reader on a network file system keeps a directory from being removed; so does a kill in the middle of it."""
    for step in (2, 4, 6):
        commit(tmp_path, step)

    def refuse(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    with monkeypatch.context() as busy:
        busy.setattr(shutil, "rmtree", refuse)
        assert prune_checkpoints(tmp_path, 1) == []
    assert "step_2" in caplog.text
    assert not (tmp_path / "checkpoints" / "step_2" / "COMMITTED").exists()
    commit(tmp_path, 8)
    assert [path.name for path in prune_checkpoints(tmp_path, 2, best=4)] == ["step_2", "step_4"]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_6", "step_8"}


def test_what_is_no_commit_does_not_count_as_one_that_is_kept(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    commit(tmp_path, 2)
    (commit(tmp_path, 3) / "COMMITTED").unlink()
    assert prune_checkpoints(tmp_path, 2) == []  # it is newer than all of them: not a removal cut short, but damage
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_what_a_killed_run_was_writing_is_removed(tmp_path: Path) -> None:
    commit(tmp_path, 1)
    for step in (1, 2):
        (begin_checkpoint(tmp_path, step) / "engine").mkdir()
    for name in ("step_2.aside", "step_1.for_2_ranks"):  # the latter was being read by other ranks than wrote it
        (tmp_path / "checkpoints" / name).mkdir()
    clear_unfinished(tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_1", "step_2.aside"}
    clear_unfinished(tmp_path / "elsewhere")


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 30):
        commit(tmp_path, step)
    begin_checkpoint(tmp_path, 40)
    assert [path.name for path in prune_checkpoints(tmp_path, 2)] == ["step_2"]
    assert prune_checkpoints(tmp_path, 0) == []
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_4", "step_30", "step_40.partial"}


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        commit(tmp_path, step)
    prune_checkpoints(tmp_path, 1, best=4)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_4", "step_8"}
    prune_checkpoints(tmp_path, 1, best=7)  # evaluated where no commit was written
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_8"}


def test_a_run_that_goes_on_from_an_earlier_commit_sets_later_ones_aside(tmp_path: Path) -> None:
    """Else the commits that follow would be pruned for older ones of higher numbers, and resumed past."""
    for step in (10, 20, 30):
        commit(tmp_path, step, f"of {step}")
    (tmp_path / "checkpoints" / "step_30" / "COMMITTED").unlink()
    assert [path.name for path in set_aside_after(tmp_path, 10)] == ["step_30.aside", "step_20.aside"]
    commit(tmp_path, 11)
    prune_checkpoints(tmp_path, 1)
    found = latest_committed(tmp_path)
    assert found.commit is not None
    assert found.commit.step == 11
    # Nothing that was there is lost, however often it comes to that.
    assert (tmp_path / "checkpoints" / "step_30.aside" / "engine" / "part.pt").read_text() == "of 30"
    commit(tmp_path, 30, "again")
    assert [path.name for path in set_aside_after(tmp_path, 11)] == ["step_30.aside-2"]
    assert set_aside_after(tmp_path / "elsewhere", 0) == []


def test_a_full_disk_leaves_the_old_commit_and_says_how_much_is_missing(tmp_path: Path) -> None:
    commit(tmp_path, 1, "x" * 5000)
    partial = begin_checkpoint(tmp_path, 2)
    (partial / "learner.json").write_text("{}")
    (partial / "manifest.json").symlink_to("/dev/full")  # the kernel's own answer: no space left
    with pytest.raises(OSError, match="No space left") as error:
        commit_checkpoint(partial, {"steps": {}})
    assert is_full_disk(error.value)
    found = latest_committed(tmp_path)
    assert found.commit is not None
    assert (found.commit.step, found.problems) == (1, ())
    # The next one takes what the newest did.
    assert 5000 < needed_bytes(tmp_path, 100) < 10000
    assert needed_bytes(tmp_path, 2**20) == 2**20
    check_space(tmp_path, 5000)
    with pytest.raises(NoSpace, match=r"takes 1048576.00 GiB, .* are left, .* are missing; the commits"):
        check_space(tmp_path, 2**50)


def test_a_file_that_is_shorter_here_than_a_rank_wrote_it_is_no_part_of_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learner.commit.SEEN_S", 0.0)
    partial = begin_checkpoint(tmp_path, 1)
    (partial / "engine").mkdir()
    part = partial / "engine" / "part.pt"
    part.write_text("weights")
    wrote = [("learner-0", Written("there", {})), ("learner-1", written(partial))]
    check_written(partial, wrote)
    part.write_text("weights and more")  # another rank's, seen by learner-1 before it was done
    check_written(partial, wrote)
    part.write_text("weigh")
    with pytest.raises(UserError, match=r"learner-1 on .* wrote 7 bytes of engine/part\.pt, .* it has 5 bytes there"):
        check_written(partial, wrote)


def test_what_another_machine_wrote_may_be_seen_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system may show a listing from before."""
    monkeypatch.setattr("learner.commit.LOOK_EVERY_S", 0.01)
    partial = begin_checkpoint(tmp_path, 1)
    appears = threading.Timer(0.3, lambda: (partial / "part.pt").write_text("weights"))
    appears.start()
    check_written(partial, [("learner-0", Written("there", {"part.pt": 7}))])
    assert (partial / "part.pt").read_text() == "weights"
    appears.join()


def test_only_a_partial_directory_is_committed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"step_N\.partial"):
        commit_checkpoint(tmp_path, {})
    with pytest.raises(ValueError, match="files"):
        commit_checkpoint(begin_checkpoint(tmp_path, 1), {"files": {}})
