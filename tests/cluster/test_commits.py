"""A commit holds what every rank wrote, or is none."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.commits import commit
from cluster.files import read_jsonl
from cluster.history import History, Steps
from cluster.learners import LearnerGroup
from cluster.run_dir import RunDir
from learner.checkpoint import save_checkpoint
from learner.checkpoint_config import CheckpointSection
from learner.commit import Written, latest_committed
from services.errors import UserError


class Rank:
    """`learner.checkpoint` as it is, over an engine that writes one file; `home` is what it sees as the run's disk."""

    def __init__(self, rank: int, home: Path, run: Path) -> None:
        self.name = f"learner-{rank}"
        self.rank = rank
        self._home = home
        self._run = run

    def save(self, directory: str) -> None:
        part = Path(directory) / "engine" / f"rank_{self.rank}.pt"
        part.parent.mkdir(exist_ok=True)
        part.write_text("weights")

    def save_checkpoint(self, directory: str) -> Written:
        seen = self._home / Path(directory).relative_to(self._run)
        return save_checkpoint(cast(Any, self), cast(Any, None), None, seen)


def learners_of(*ranks: Rank) -> LearnerGroup:
    def answers(method: str, directory: str, **_: Any) -> list[Written]:
        assert method == "save_checkpoint"
        return [rank.save_checkpoint(directory) for rank in ranks]

    return cast(LearnerGroup, SimpleNamespace(ranks=ranks, parameters=1, answers=answers))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setattr("learner.commit.SEEN_S", 0.0)
    run = RunDir(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    return run


def commit_of(run: RunDir, ranks: Sequence[Rank]) -> None:
    history = History("abc", 1, steps=Steps({0: ["0:p0"]}))
    batches: Any = SimpleNamespace(note_failures=lambda: None, commit=lambda _: None)
    commit(run, CheckpointSection(), history, learners_of(*ranks), batches)


def test_a_checkpoint_that_all_ranks_wrote_where_the_driver_sees_it_is_committed(run: RunDir) -> None:
    commit_of(run, [Rank(1, run.path, run.path), Rank(2, run.path, run.path)])
    found = latest_committed(run.path).commit
    assert found is not None
    assert set(found.manifest["files"]) == {"engine/rank_1.pt", "engine/rank_2.pt"}


@pytest.mark.parametrize("elsewhere", [(1, 2), (2,)])
def test_ranks_that_write_on_a_disk_of_their_own_make_no_commit(
    run: RunDir, tmp_path: Path, elsewhere: tuple[int, ...]
) -> None:
    """The run directory has the same path on every node, and is another one on each."""
    (tmp_path / "node" / "checkpoints").mkdir(parents=True)
    ranks = [Rank(n, tmp_path / "node" if n in elsewhere else run.path, run.path) for n in (1, 2)]
    with pytest.raises(UserError, match=rf"learner-{elsewhere[0]} on .* wrote 7 bytes of .* it is not there.* share"):
        commit_of(run, ranks)
    assert latest_committed(run.path).commit is None
    assert list(read_jsonl(run.events)) == []


def test_a_rank_that_has_no_such_directory_says_so(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"node/checkpoints is not there on .* storage that all nodes"):
        commit_of(run, [Rank(1, tmp_path / "node", run.path)])
    assert latest_committed(run.path).commit is None
