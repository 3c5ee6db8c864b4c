"""Whose death is whose: what ends while the driver waits for the learner or the evaluator is not taken for theirs.

Ray is played: an actor answers its pulse, ends the calls that it is told to end, and dies when it is told to.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import exceptions

from cluster import evaluator
from cluster.evaluator import Evaluator
from cluster.files import read_jsonl
from cluster.learners import LearnerGroup
from cluster.parts import wait_for_rollouts
from cluster.plan import Part
from cluster.pulse import ANSWER_S
from cluster.restarts import RestartBudget
from cluster.run_dir import RunDir
from cluster.running import Kept, LearnerDied, PartFailed, Running, Unanswered
from cluster.supervise import VIEW_S, Supervisor
from reward_server.worker import ScoringOutage
from services.errors import Deadline, PlanError, UserError
from services.stream.errors import StreamLost
from services.transfer.offer import Broken


class Reference:
    """The answer of a call, once there is one."""

    answer: Any = None
    error: Exception | None = None
    done = False

    def end(self, answer: Any = None, error: Exception | None = None) -> None:
        if not self.done:
            self.answer, self.error, self.done = answer, error, True


class Actor:
    """A handle: `actor.method.remote(...)` is a call; every call but a pulse is out until it is ended."""

    def __init__(self) -> None:
        self.dead = False
        self.ready_at_once = False
        self.error: Exception | None = None
        """What a pulse ends with, where it is not up."""
        self.calls: list[Reference] = []

    def __getattr__(self, method: str) -> Any:
        def remote(*_: object) -> Reference:
            self.calls.append(reference := Reference())
            if self.dead:
                reference.end(error=exceptions.ActorDiedError())
            elif method == "pulse":
                reference.end((0, False), self.error)
            elif method == "ready" and self.ready_at_once:
                reference.end()
            return reference

        return SimpleNamespace(remote=remote)

    def end_calls(self, answer: Any) -> None:
        for reference in self.calls:
            reference.end(answer)

    def die(self) -> None:
        self.dead = True
        for reference in self.calls:
            reference.end(error=exceptions.ActorDiedError())


class Silent(Actor):
    """Its process is not up yet: not even a pulse is answered."""

    def __getattr__(self, method: str) -> Any:
        def remote(*_: object) -> Reference:
            self.calls.append(reference := Reference())
            return reference

        return SimpleNamespace(remote=remote)


class Ray:
    """What a supervisor asks of Ray."""

    exceptions = exceptions

    def __init__(self) -> None:
        self.free = [{"CPU": 4.0}]
        self.options: dict[str, Any] = {}
        """Of the actor that was started last."""
        nodes = SimpleNamespace(available_resources_per_node=lambda: dict(enumerate(self.free)))
        self._private = SimpleNamespace(state=nodes)

    def remote(self, cls: type) -> Any:
        del cls

        def options(**asked: Any) -> Any:
            self.options = asked
            return SimpleNamespace(remote=lambda *_: Actor())

        return SimpleNamespace(options=options)

    def kill(self, actor: Actor, *, no_restart: bool) -> None:
        assert no_restart
        actor.die()

    def wait(self, references: Sequence[Reference], *, num_returns: int = 1, timeout: float) -> Any:
        del num_returns, timeout
        return [each for each in references if each.done], [each for each in references if not each.done]

    def get(self, asked: Any, timeout: float | None = None) -> Any:
        del timeout
        if isinstance(asked, list):
            return [self.get(each) for each in asked]
        assert asked.done
        if asked.error is not None:
            raise asked.error
        return asked.answer


class NoLedger:
    """The actors here have no leases."""

    def release(self, owner: str) -> list[str]:
        del owner
        return []


class Crew:
    """A supervisor with a learner rank and a rollout actor; `script` is what happens, tick by tick."""

    def __init__(self, path: Path, *, restarts: int) -> None:
        ray: Any = Ray()
        ledger: Any = NoLedger()
        self.ray: Ray = ray
        self.run = RunDir(path)
        self.supervisor = Supervisor(ray, "run", self.run, ledger, RestartBudget(restarts, 0.0), progress_s=600.0)
        self.part = Part("rollout", 1, 1.0)
        self.rank = Running("learner-0", Actor())
        self.supervisor.learners = [self.rank]
        self.supervisor.start_rollouts(self.part, self.rollout)
        self.script: list[Callable[[], object]] = []

    @property
    def actor(self) -> Actor:
        """The first rollout actor."""
        return self.supervisor.rollouts[0].handle

    def rollout(self, name: str) -> Running:
        actor = Actor()
        return Running(name, actor, actor.run.remote())

    def tick(self) -> None:
        if self.script:
            self.script.pop(0)()

    def train(self, *script: Callable[[], object], seconds: float = 5.0) -> str:
        self.script = list(script)
        group = LearnerGroup(self.supervisor, (self.rank,), self.tick)
        return group.call("train_step", what="step 0 to train", seconds=seconds)

    def lose_rollout(self) -> None:
        self.supervisor.rollouts[0].handle.die()

    def replace(self) -> None:
        """A death is seen at one look, and another is started at the next."""
        self.supervisor.check()
        self.supervisor.check()

    def events(self) -> list[str]:
        return [event["event"] for event in read_jsonl(self.run.events)]


def nothing() -> None:
    pass


def test_a_rollout_actor_that_dies_once_too_often_while_the_learner_trains_ends_the_run(tmp_path: Path) -> None:
    crew = Crew(tmp_path, restarts=1)
    done = crew.train(crew.lose_rollout, nothing, lambda: crew.rank.handle.end_calls("trained"))
    assert done == "trained"
    assert crew.events() == ["rollout_died", "part_started"]  # the first death is within the budget
    with pytest.raises(PartFailed, match="rollout-1 failed: ActorDiedError") as failed:
        crew.train(crew.lose_rollout)
    assert type(failed.value) is PartFailed  # neither the learner's death nor one that is waited out


def test_a_node_that_takes_many_actors_with_it_costs_each_of_them_one_restart(tmp_path: Path) -> None:
    crew = Crew(tmp_path, restarts=1)
    for _ in range(3):
        crew.supervisor.start_rollouts(crew.part, crew.rollout)
    for actor in crew.supervisor.rollouts:
        actor.handle.die()
    crew.replace()
    assert crew.events() == ["rollout_died"] * 4 + ["part_started"] * 4
    assert [actor.name for actor in crew.supervisor.rollouts] == [f"rollout-{n}" for n in range(4, 8)]
    crew.supervisor.rollouts[2].handle.die()  # in a slot that has had its restart
    with pytest.raises(PartFailed, match="rollout-6 failed: ActorDiedError"):
        crew.supervisor.check()


def test_a_users_mistake_of_an_actor_whose_place_had_one_that_worked_is_tried_again(tmp_path: Path) -> None:
    """What vLLM cannot start for is in its words alone: too little memory for a moment reads like a wrong setting."""
    crew = Crew(tmp_path, restarts=3)
    mistake = UserError("vLLM does not start with policy.model m: no free memory")
    crew.supervisor.check()  # its pulse is heard: it is up
    crew.lose_rollout()
    crew.replace()
    for _ in range(2):
        crew.actor.calls[0].end(error=mistake)
        crew.replace()
    assert crew.events() == ["rollout_died", "part_started"] * 3
    crew.actor.calls[0].end(error=mistake)
    with pytest.raises(UserError, match="no free memory"):  # and not that a part died
        crew.supervisor.check()


@pytest.mark.parametrize("dies_before", [False, True])
def test_a_users_mistake_of_the_first_that_comes_up_ends_the_run_at_once(tmp_path: Path, dies_before: bool) -> None:
    crew = Crew(tmp_path, restarts=3)
    if dies_before:  # while it came up: that says nothing about its settings
        crew.lose_rollout()
        crew.replace()
    crew.actor.calls[0].end(error=UserError("policy.model: nowhere"))
    with pytest.raises(UserError, match="nowhere"):
        crew.supervisor.check()


def test_an_outage_of_the_scoring_is_final_whatever_worked_before(tmp_path: Path) -> None:
    crew = Crew(tmp_path, restarts=3)
    crew.supervisor.check()
    crew.lose_rollout()
    crew.replace()
    crew.actor.calls[0].end(error=ScoringOutage("no answer for 600 s"))
    with pytest.raises(PartFailed, match="no answer for 600 s"):
        crew.supervisor.check()


def test_a_rank_that_dies_or_does_not_answer_is_the_learners_death(tmp_path: Path) -> None:
    crew = Crew(tmp_path, restarts=0)
    with pytest.raises(LearnerDied, match="step 0 to train: learner-0 did not answer"):
        crew.train(seconds=0.1)
    with pytest.raises(LearnerDied, match="learner-0 failed: ActorDiedError"):
        crew.train(crew.rank.handle.die)


def test_a_rank_that_dies_while_nothing_waits_for_it_is_the_learners_death(tmp_path: Path) -> None:
    crew = Crew(tmp_path, restarts=0)
    crew.rank.handle.error = ValueError("what its pulse says is no death")
    crew.supervisor.check()
    crew.supervisor.check()
    crew.rank.handle.die()
    crew.rank.pulse.asked = 0.0  # a second later
    with pytest.raises(LearnerDied, match="learner-0 failed: ActorDiedError"):
        crew.supervisor.check()


def test_a_redis_that_is_lost_while_the_learner_trains_is_no_death_of_a_rank(tmp_path: Path) -> None:
    def look() -> None:
        raise StreamLost(waited_for="the ledger's look", who="redis", seconds=30.0)

    with pytest.raises(StreamLost):
        Crew(tmp_path, restarts=0).train(look)


class Measuring:
    """A crew with an evaluator, and what measures with it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, *, step_s: float = 5.0, start_s: float = 5.0):
        monkeypatch.setattr(evaluator, "evaluation_prompts", lambda *_: [])
        monkeypatch.setattr(evaluator, "attention_options", lambda *_: None)
        config: Any = SimpleNamespace(
            evaluation=SimpleNamespace(split="test", prompts=1, best_goal="max"),
            rollout=SimpleNamespace(threads=1), actors_rollout=None, policy=None, attention=None,
            cluster=SimpleNamespace(step_s=step_s, start_s=start_s),
        )  # fmt: skip
        data: Any = None
        self.crew = Crew(path, restarts=1)
        self.asked = Evaluator(self.crew.supervisor, Part("evaluator", 1, 1.0), config, data, self.crew.tick)

    @property
    def actor(self) -> Actor:
        return self.crew.supervisor.others[0].handle

    def answer(self) -> None:
        self.actor.end_calls(({}, 1.0))

    def break_off(self) -> None:
        for reference in self.actor.calls:
            reference.end(error=Broken("bucket 2 of 3: its connection was reset"))

    def __call__(self, *script: Callable[[], object]) -> float | None:
        self.crew.script = list(script)
        return self.asked.evaluate(lambda: ("weights", None)).value


def test_the_evaluator_is_started_again_after_its_own_death_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Measuring(tmp_path, monkeypatch)
    crew, answer = measure.crew, measure.answer
    others = crew.supervisor.others
    assert measure(others[0].handle.die, nothing, answer) == 1.0
    assert crew.events().count("evaluator_died") == 1
    (healthy,) = crew.supervisor.others
    assert measure(crew.lose_rollout, nothing, answer) == 1.0
    with pytest.raises(PartFailed, match="rollout-1 failed: ActorDiedError"):
        measure(crew.lose_rollout, nothing, answer)
    assert crew.events().count("evaluator_died") == 1
    assert crew.supervisor.others == [healthy]  # `stop` ends it with the others
    assert not healthy.handle.dead


def test_the_evaluator_is_offered_weights_again_whose_transfer_broke_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Measuring(tmp_path, monkeypatch)
    assert measure(measure.break_off, nothing, measure.break_off, measure.answer) == 1.0
    with pytest.raises(PartFailed, match="evaluator failed: Broken: bucket 2 of 3"):
        measure(*[measure.break_off] * 5)
    assert not measure.crew.script[2:]  # three times
    assert measure.crew.events() == []


def test_an_evaluator_without_room_is_waited_for_and_then_the_run_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Measuring(tmp_path, monkeypatch, start_s=1.0)
    crew = measure.crew
    missing_rollouts(crew, 1)  # which would take its room
    crew.ray.free = [{"CPU": 0.5}]

    def lose_node() -> None:
        crew.ray.free = [{"CPU": 0.5}]
        measure.actor.die()

    def add_node() -> None:
        crew.ray.free.append({"CPU": 1.0})

    assert measure(lose_node, *[nothing] * 3, add_node, *[nothing] * 5, measure.answer) == 1.0
    told = [event for event in read_jsonl(crew.run.events) if event["event"] != "part_died"]
    assert [event["event"] for event in told[:3]] == ["evaluator_died", "part_missing", "part_started"]
    assert told[2]["actor"] == "evaluator"
    crew.supervisor.budget.committed()
    with pytest.raises(PlanError, match=r"evaluator died: for 1 s.* needs 1 CPU on one node; free are 0\.5 CPU\."):
        measure(lose_node)
    assert not crew.supervisor.planned


@pytest.mark.parametrize("comes_up", [False, True])
def test_an_evaluator_that_does_not_answer_is_ended_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes_up: bool
) -> None:
    measure = Measuring(tmp_path, monkeypatch, step_s=0.5, start_s=0.5)
    crew, stuck = measure.crew, measure.actor
    if not comes_up:  # Ray has not placed it, and says nothing
        stuck = crew.supervisor.others[0].handle = crew.supervisor.others[0].pulse.handle = Silent()

    def answer_if_another() -> None:
        crew.script.append(answer_if_another)
        if crew.supervisor.others and measure.actor is not stuck:
            measure.answer()

    assert measure(answer_if_another) == 1.0
    assert stuck.dead
    assert crew.events() == ["evaluator_died", "part_started"]
    crew.supervisor.others[0].handle = stuck = Silent()
    with pytest.raises(Unanswered, match="0 s for the evaluation: evaluator did not answer"):
        measure()
    assert stuck.dead


def test_who_sends_weights_is_told_of_every_part_that_has_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    measure = Measuring(tmp_path, monkeypatch)
    measure.crew.supervisor.on_death = told.append
    measure.crew.lose_rollout()
    measure.actor.die()
    measure.crew.supervisor.check()
    assert told == ["rollout-0", "evaluator"]


def test_a_part_that_stands_still_is_ended_and_started_again(tmp_path: Path) -> None:
    crew = Crew(tmp_path, restarts=1)
    part = crew.supervisor.rollouts[0]
    stuck = part.handle = part.pulse.handle = Silent()
    crew.supervisor.check()
    part.pulse.asked -= ANSWER_S
    crew.supervisor.check()
    assert not stuck.dead
    part.pulse.moved -= 600.0
    crew.replace()
    assert stuck.dead
    assert [part.name for part in crew.supervisor.rollouts] == ["rollout-1"]
    (died, _) = read_jsonl(crew.run.events)
    assert died["error"] == "rollout-0 failed: made no progress for 600 s (cluster.progress_s)"


def test_a_model_that_ray_takes_long_to_start_again_died_once(tmp_path: Path) -> None:
    crew = Crew(tmp_path, restarts=0)
    model = Running("model of taste 1", Actor())
    crew.supervisor.others.append(model)

    def look() -> None:
        model.pulse.asked = 0.0  # a second later
        crew.supervisor.check()

    for _ in range(2):
        look()
        model.handle.error = exceptions.ActorUnavailableError("no room for it", None)
        for _ in range(3):
            look()
        model.handle.error = None
        look()
    assert crew.events() == ["part_died", "part_started"] * 2
    model.handle.die()  # Ray has given it up
    look()
    assert crew.events() == ["part_died", "part_started"] * 2 + ["part_died"]
    assert model not in crew.supervisor.others


def test_rollout_actors_without_room_are_waited_for_while_one_is_left_and_then_for_so_long(tmp_path: Path) -> None:
    crew = Crew(tmp_path, restarts=3)
    crew.supervisor.start_rollouts(crew.part, crew.rollout)
    crew.ray.free = [{"CPU": 0.5}, {"CPU": 0.75}]

    def lose_one() -> None:
        crew.lose_rollout()
        crew.supervisor.check()
        crew.supervisor.check()

    lose_one()
    crew.supervisor.check_room("rollout", 0.0)  # the other goes on
    lose_one()
    crew.supervisor.check_room("rollout", 60.0)
    with pytest.raises(
        PlanError, match=r"rollout-0, rollout-1 died.* which needs 1 CPU on one node; free are 0\.5 CPU; 0\.75 CPU"
    ):
        crew.supervisor.check_room("rollout", 0.0)
    crew.ray.free = [{"CPU": 0.5}, {"CPU": 1.0}]
    crew.supervisor.check()
    crew.supervisor.check_room("rollout", 0.0)
    assert crew.events().count("part_started") == 1


def missing_rollouts(crew: Crew, count: int) -> None:
    """An elastic run: there was room for one of `count` + 1 rollout actors."""
    for _ in range(count):
        crew.supervisor.keep(Kept("rollout", crew.part, lambda: crew.rollout("late")), missing=True)


def test_what_one_look_starts_is_not_room_for_the_next_while_rays_view_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crew = Crew(tmp_path, restarts=0)
    crew.supervisor.check()
    crew.supervisor.check()  # the first is heard
    missing_rollouts(crew, 4)
    crew.ray.free = [{"CPU": 1.5}, {"CPU": 1.0}]
    monkeypatch.setattr(crew, "rollout", lambda name: Running(name, coming_up := Silent(), coming_up.run.remote()))
    for _ in range(3):
        crew.supervisor.check()
    assert len(crew.supervisor.rollouts) == 3
    crew.ray.free = [{"CPU": 1.0}, {}]  # what was started is placed, and another job has gone
    for late in crew.supervisor.rollouts[1:]:
        late.pulse.moved -= VIEW_S
    crew.supervisor.check()
    assert len(crew.supervisor.rollouts) == 4


def test_the_room_of_ranks_that_come_back_is_not_taken_by_rollout_actors_that_were_missing(tmp_path: Path) -> None:
    crew = Crew(tmp_path, restarts=0)
    learner = Part("learner", 2, 1.0)
    crew.supervisor.learners = [Running(f"learner-{rank}", Actor(), part=learner) for rank in range(2)]
    missing_rollouts(crew, 2)
    crew.ray.free = [{"CPU": 0.5}, {"CPU": 0.5}]
    crew.supervisor.check()
    crew.supervisor.learners[0].handle.die()
    crew.supervisor.stop_learners()
    crew.ray.free = [{"CPU": 1.0}, {"CPU": 1.0}]
    crew.supervisor.check()
    assert len(crew.supervisor.rollouts) == 1
    answers = crew.supervisor.actor("learner-0", Actor, learner, {})
    crew.supervisor.learners = [
        Running("learner-0", answers, part=learner),
        Running("learner-1", Silent(), part=learner),
    ]
    crew.ray.free = [{"CPU": 1.0}, {}]  # one is placed and answers, the other is on its way
    for _ in range(3):
        crew.supervisor.check()
    assert len(crew.supervisor.rollouts) == 1
    crew.ray.free = [{"CPU": 1.0}, {"CPU": 1.0}]
    crew.supervisor.check()
    assert len(crew.supervisor.rollouts) == 2


def test_a_run_on_one_machine_binds_its_actors_to_it_and_sees_no_room_elsewhere(tmp_path: Path) -> None:
    crew = Crew(tmp_path, restarts=0)
    crew.supervisor.machine = "10.0.0.1"
    crew.supervisor.check()
    crew.supervisor.check()
    missing_rollouts(crew, 1)
    crew.ray.free = [{"CPU": 0.5, "node:10.0.0.1": 1.0}, {"CPU": 4.0, "node:10.0.0.2": 1.0}]  # this one came later
    crew.supervisor.check()
    assert len(crew.supervisor.rollouts) == 1
    crew.ray.free[0]["CPU"] = 1.0
    crew.supervisor.check()
    assert len(crew.supervisor.rollouts) == 2
    crew.supervisor.actor("scoring-0", Actor, crew.part, {})
    assert crew.ray.options["resources"] == {"node:10.0.0.1": 0.001}


def test_a_reservation_holds_its_room_by_itself(tmp_path: Path) -> None:
    crew = Crew(tmp_path, restarts=0)
    reserved: Any = SimpleNamespace()
    crew.supervisor.room = reserved
    crew.supervisor.learners = [Running("learner-0", Silent(), part=Part("learner", 1, 1.0))]
    missing_rollouts(crew, 1)
    crew.ray.free = [{"CPU": 1.0}]
    crew.supervisor.check()
    crew.supervisor.check()
    assert len(crew.supervisor.rollouts) == 2


def test_a_reservation_ends_with_the_ranks_that_it_was_for(tmp_path: Path) -> None:
    crew = Crew(tmp_path, restarts=0)
    given_back: list[bool] = []
    reserved: Any = SimpleNamespace(give_back=lambda: given_back.append(crew.rank.handle.dead))
    crew.supervisor.room = reserved
    crew.supervisor.stop_learners()
    assert given_back == [True]  # when the ranks were gone
    crew.supervisor.stop()
    assert given_back == [True]  # and not again


def test_room_that_came_back_for_a_while_ends_the_wait_for_room(tmp_path: Path) -> None:
    crew = Crew(tmp_path, restarts=3)
    for _ in range(2):
        crew.ray.free = []
        crew.lose_rollout()
        crew.replace()
        crew.supervisor.check_room("rollout", 600.0)
        (kept,) = crew.supervisor.kept
        assert kept.no_room_since is not None
        kept.no_room_since -= 900.0  # a quarter of an hour ago
        crew.ray.free = [{"CPU": 1.0}]
        crew.supervisor.check()
        assert len(crew.supervisor.rollouts) == 1


def test_a_rollout_actor_that_made_room_has_shown_that_its_settings_work(tmp_path: Path) -> None:
    crew = Crew(tmp_path, restarts=1)
    crew.supervisor.check()
    crew.supervisor.check()  # it is up
    crew.supervisor.end_rollouts(1)
    crew.supervisor.check()
    crew.actor.calls[0].end(error=UserError("vLLM does not start with policy.model m: no free memory"))
    crew.replace()
    assert crew.events() == ["part_missing", "part_started", "rollout_died", "part_started"]


def test_rollout_actors_that_sit_where_the_learner_has_to_go_are_ended_and_come_back(tmp_path: Path) -> None:
    crew = Crew(tmp_path, restarts=0)
    for _ in range(2):
        crew.supervisor.start_rollouts(crew.part, crew.rollout)
    crew.supervisor.end_rollouts(0)
    crew.supervisor.end_rollouts(-1)
    assert len(crew.supervisor.rollouts) == 3
    crew.supervisor.planned["learner"] = Part("learner", 2, 1.0)
    crew.supervisor.end_rollouts(2)
    assert [part.name for part in crew.supervisor.rollouts] == ["rollout-0"]
    crew.ray.free = [{"CPU": 2.5}]
    crew.supervisor.check()
    assert len(crew.supervisor.rollouts) == 1  # the room is the learner's
    crew.ray.free = [{"CPU": 4.0}]
    crew.supervisor.check()
    assert len(crew.supervisor.rollouts) == 3
    assert crew.events() == ["part_missing"] * 2 + ["part_started"] * 2  # no death, and nothing of the budget


def test_the_evaluators_room_is_kept_until_it_is_started(tmp_path: Path) -> None:
    crew = Crew(tmp_path, restarts=0)
    part = Part("evaluator", 1, 1.0)
    crew.supervisor.planned["evaluator"] = part
    missing_rollouts(crew, 1)
    crew.ray.free = [{"CPU": 1.5}]
    crew.supervisor.check()
    crew.supervisor.check()
    assert len(crew.supervisor.rollouts) == 1
    crew.supervisor.others.append(Running("evaluator", crew.supervisor.actor("evaluator", Actor, part, {}), part=part))
    crew.ray.free = [{"CPU": 1.0}]
    for _ in range(2):
        crew.supervisor.check()
    assert len(crew.supervisor.rollouts) == 2


def test_the_first_start_waits_for_the_engines_that_were_planned_alone(tmp_path: Path) -> None:
    crew = Crew(tmp_path, restarts=0)
    crew.supervisor.rollouts[0].handle.ready_at_once = True
    missing_rollouts(crew, 1)
    crew.supervisor.check()
    crew.supervisor.check()
    assert len(crew.supervisor.rollouts) == 2  # the second builds its engine still
    wait_for_rollouts(crew.supervisor, 1, 0.5, nothing)
    with pytest.raises(Deadline, match=r"to build their engines: late did not answer"):
        wait_for_rollouts(crew.supervisor, 2, 0.5, nothing)
