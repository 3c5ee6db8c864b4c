"""A model behind Ray actors: the same scores, one that dies is made up for by the other, one that is dead stays so."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from reward_server.config import RewardSection
from reward_server.model_actor import ActorReplica, ModelActor
from reward_server.placement import model_spec, placed_models
from reward_server.replicas import NoReplica, ReplicaLost, ReplicaRunner
from reward_server.runner import ModelFacts, ModelSpec, Output, Row
from reward_server.schema import Item
from reward_server.scorers.build import build_scorers
from services.errors import Deadline, UserError

FACTS = ModelFacts("sequence", "1", None, ("score",))
ITEMS = [Item(id=str(i), prompt="Where is Rome?", response="In Italy. " * (i + 1)) for i in range(8)]


@pytest.mark.slow
def test_replicas_score_like_a_local_model(ray_session: str, scoring_models: Any) -> None:
    import ray

    assert ray_session
    source = {"kind": "preference", "model": str(scoring_models["sequence"])}
    section = RewardSection.model_validate({"sources": {"s": source}})
    spec = ModelSpec(source["model"], None, "sequence", "float32", "auto", "reward.sources.s")
    remote: Any = ray.remote(num_cpus=1)(ModelActor)
    actors = [remote.remote(spec) for _ in range(2)]
    try:
        runner = ReplicaRunner("s", [ActorReplica(actor, ray, load_s=240) for actor in actors], restarts=1)
        there = build_scorers(section, runners={"s": runner})["s"]
        here = build_scorers(section)["s"]
        assert there.revision == here.revision

        def values(scorer: Any) -> list[float]:
            return [one.component.value for one in asyncio.run(scorer.score(ITEMS))]

        expected = values(here)
        assert values(there) == pytest.approx(expected, abs=1e-5)
        ray.kill(actors[0])
        for _ in range(3):
            assert values(there) == pytest.approx(expected, abs=1e-5)
        assert runner.living() == 1
        # A server that is started again finds one that Ray starts no more.
        replicas = [ActorReplica(actor, ray, load_s=240) for actor in actors]
        with pytest.raises(ReplicaLost, match="does not start it again"):
            ReplicaRunner("s", replicas, restarts=1)
        again = ReplicaRunner("s", replicas, restarts=1, needs_all=False)
        assert (again.facts, again.living()) == (runner.facts, 1)
        ray.kill(actors[1])
        with pytest.raises(ReplicaLost, match="a model's actor died"):
            values(there)
        time.sleep(1.5)  # its one try to come back: Ray starts none of these again
        with pytest.raises(ReplicaLost, match="no replica of s lives"):
            values(there)
        absent = remote.remote(ModelSpec("/nowhere", None, "sequence", "float32", "auto", "reward.sources.s"))
        with pytest.raises(UserError, match="no such directory"):
            ReplicaRunner("s", [ActorReplica(absent, ray, load_s=240)], restarts=1)
    finally:
        for actor in actors:
            ray.kill(actor)


class Told(ModelActor):
    """Of the first loads, as many as `ends` has letters end its process (x) or hang (h); then it holds `FACTS`."""

    def __init__(self, began: Path, ends: str) -> None:
        self._began, self._ends, self._loaded = began, ends, False

    @property
    def _model(self) -> Any:
        began = len(self._began.read_text())
        self._began.write_text("." * (began + 1))
        if self._ends[began : began + 1] == "x":
            os._exit(1)
        if self._ends[began : began + 1] == "h":
            time.sleep(600)
        return Held()

    def pid(self) -> int:
        return os.getpid()


class Held:
    facts = FACTS

    def run(self, rows: Sequence[Row]) -> list[Output]:
        return [[[1.0]] for _ in rows]


@pytest.fixture
def told(ray_session: str, tmp_path: Path) -> Iterator[Callable[[str], tuple[Any, Path]]]:
    """Makes the actor whose loads end so, and the file with a dot for each of them."""
    import ray

    assert ray_session
    actors: list[Any] = []

    def make(ends: str) -> tuple[Any, Path]:
        (began := tmp_path / "began").touch()
        actors.append(ray.remote(num_cpus=0, max_restarts=-1)(Told).remote(began, ends))
        return actors[-1], began

    yield make
    for actor in actors:
        ray.kill(actor)


def test_a_model_whose_process_dies_of_loading_it_is_not_loaded_for_ever(told: Any) -> None:
    import ray

    actor, began = told("xx" + "." + "x" * 100)
    replica = ActorReplica(actor, ray, load_s=120)
    assert replica.start() == FACTS
    with pytest.raises(ReplicaLost, match="died 3 times while it loaded"):
        replica.start()
    assert len(began.read_text()) == 6


def test_a_model_that_hangs_while_it_is_loaded_is_loaded_by_another_process(told: Any) -> None:
    import ray

    actor, _ = told("h")
    with pytest.raises(Deadline, match="a model to load"):
        ActorReplica(actor, ray, load_s=10).start()
    assert ActorReplica(actor, ray, load_s=120).start() == FACTS


def test_a_model_that_died_while_nothing_was_asked_is_looked_at_before_it_scores(told: Any) -> None:
    """Another may stand in its directory by now; and it has the time to load that loading has."""
    import ray

    actor, began = told("")
    runner = ReplicaRunner("s", [ActorReplica(actor, ray, load_s=120)], restarts=3)
    rows = [Row((1, 2))]
    assert runner.run(rows) == [[[1.0]]]
    pid = ray.get(actor.pid.remote())
    os.kill(pid, signal.SIGKILL)
    while True:
        try:
            if ray.get(actor.pid.remote(), timeout=60) != pid:
                break
        except ray.exceptions.ActorUnavailableError:
            time.sleep(0.1)
    loads = len(began.read_text())
    with pytest.raises(NoReplica):  # given to nobody: it is held, not counted as what took the model down
        runner.run(rows)
    end = time.monotonic() + 60
    while runner.living() < 1:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert runner.run(rows) == [[[1.0]]]
    assert len(began.read_text()) > loads


@pytest.mark.slow
def test_a_judge_in_vllm_says_what_it_says_in_transformers(ray_session: str, scoring_models: Any) -> None:
    import ray

    assert ray_session
    judge = {"kind": "judge", "model": str(scoring_models["causal"]), "min_mass": 0.0, "max_tokens": 600}
    sources = {"compare": judge, "rate": {**judge, "mode": "rate"}}
    items = [item.model_copy(update={"reference": "In Norway."}) for item in ITEMS]

    def section(**more: Any) -> RewardSection:
        return RewardSection.model_validate({"sources": {name: {**one, **more} for name, one in sources.items()}})

    there = section(engine="vllm", kv_cache_mib=64)
    remote: Any = ray.remote(num_cpus=1)(ModelActor)
    # Both sources ask the same of the same model: one actor answers for both.
    actor = remote.remote(model_spec("compare", placed_models(there)["compare"]))
    try:
        runner = ReplicaRunner("s", [ActorReplica(actor, ray, load_s=240)], restarts=1)
        assert runner.facts.max_tokens == 600
        asked, expected = (build_scorers(there, runners=dict.fromkeys(sources, runner)), build_scorers(section()))
        for name in sources:
            said, known = (list(asyncio.run(scorers[name].score(items))) for scorers in (asked, expected))
            for one, other in zip(said, known, strict=True):
                assert one.component.value == pytest.approx(other.component.value, abs=1e-4)
                assert one.component.detail == pytest.approx(other.component.detail, abs=1e-4)
            assert len({one.component.value for one in said}) > 1
        absent = remote.remote(ModelSpec(judge["model"], None, "choice", "float32", "auto", "s", "vllm", 100_000))
        with pytest.raises(UserError, match="vLLM does not start"):
            ReplicaRunner("s", [ActorReplica(absent, ray, load_s=240)], restarts=1)
    finally:
        ray.kill(actor)
