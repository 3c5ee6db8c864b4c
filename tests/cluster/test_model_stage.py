"""Waiting for the ranks of a stage: by progress, and for the first error."""

import time
from pathlib import Path
from typing import Any

import pytest

from cluster.model_stage import answers, refuse_existing
from services.errors import Deadline, UserError


def test_a_ranks_error_ends_the_wait_and_progress_prolongs_it(ray_session: str) -> None:
    del ray_session
    import ray

    @ray.remote(num_cpus=0.1)
    def after(seconds: float, said: str = "") -> float:
        time.sleep(seconds)
        if said:
            raise UserError(said)
        return seconds

    def wait(*calls: Any, seconds: float, progress: Any = lambda: None) -> list[Any]:
        names = [f"rank {i}" for i in range(len(calls))]
        return answers(ray, calls, names, seconds=seconds, what="it", progress=progress)

    began = time.monotonic()
    with pytest.raises(UserError, match=r"^learner\.x: no$"):
        wait(after.remote(60.0), after.remote(0.0, "learner.x: no"), seconds=50)
    assert time.monotonic() - began < 40
    with pytest.raises(Deadline, match="rank 0"):
        wait(after.remote(60.0), after.remote(0.0), seconds=2)
    assert wait(after.remote(4.0), after.remote(0.0), seconds=2, progress=time.monotonic) == [4.0, 0.0]


def test_a_model_is_written_to_an_empty_place_alone(tmp_path: Path) -> None:
    refuse_existing(tmp_path / "new")
    refuse_existing(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, allowed is a directory"):
        refuse_existing(tmp_path / "file")
    with pytest.raises(UserError, match="not empty; choose another"):
        refuse_existing(tmp_path)
