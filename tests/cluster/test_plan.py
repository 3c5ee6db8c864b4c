"""The plan of resources: what is placed fits, what does not fit says which part and how much is missing."""

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import Config
from cluster.plan import Node, Part, addresses_of_ray, fitting, machines_of_ray, nodes_of_ray, parts_of, place
from cluster.recipe import resolve
from services.errors import PlanError, UserError

CPUS = st.sampled_from([0.0, 0.1, 0.25, 1.0, 1.5, 4.0])
GPUS = st.sampled_from([0.0, 0.0, 0.5, 1.0])
MEMORY = st.sampled_from([0.0, 0.0, 2.0, 7.5])

parts_drawn = st.lists(st.builds(Part, st.just(""), st.integers(1, 5), CPUS, GPUS, MEMORY), min_size=1, max_size=5).map(
    lambda parts: [Part(f"part{i}", p.count, p.cpus, p.gpus, p.memory_gb) for i, p in enumerate(parts)]
)
# Two names for up to five nodes: several raylets of one machine have the same.
nodes_drawn = st.lists(
    st.builds(Node, st.sampled_from(["a", "b"]), st.sampled_from([1.0, 2.0, 8.0]), st.sampled_from([0.0, 2.0]), MEMORY),
    max_size=5,
)


def amounts(part: Part) -> tuple[float, float, float]:
    return part.cpus, part.gpus, part.memory_gb


@given(parts_drawn, nodes_drawn)
def test_a_placement_never_exceeds_a_node(parts: list[Part], nodes: list[Node]) -> None:
    # Named apart, so that what lies on each node can be added up.
    nodes = [Node(f"{node.name}{i}", node.cpus, node.gpus, node.memory_gb) for i, node in enumerate(nodes)]
    try:
        placed = place(parts, nodes)
    except PlanError:
        return
    used: Counter[tuple[str, int]] = Counter()
    for part in parts:
        assert len(placed[part.name]) == part.count
        for name in placed[part.name]:
            used.update({(name, i): amount for i, amount in enumerate(amounts(part))})
    for node in nodes:
        for i, have in enumerate((node.cpus, node.gpus, node.memory_gb)):
            assert used[node.name, i] <= have + 1e-6


@given(parts_drawn, nodes_drawn)
def test_a_plan_is_refused_only_where_a_part_finds_no_room(parts: list[Part], nodes: list[Node]) -> None:
    """Where every node alone could hold everything, or the sums exceed the cluster, the answer is known."""
    need = [sum(part.count * amounts(part)[i] for part in parts) for i in range(3)]
    roomy = any(all(n <= h for n, h in zip(need, (x.cpus, x.gpus, x.memory_gb), strict=True)) for x in nodes)
    short = any(n > sum((x.cpus, x.gpus, x.memory_gb)[i] for x in nodes) + 1e-6 for i, n in enumerate(need))
    if roomy:
        assert sum(map(len, place(parts, nodes).values())) == sum(part.count for part in parts)
    if short:
        with pytest.raises(PlanError):
            place(parts, nodes)


@given(parts_drawn, nodes_drawn)
def test_the_error_names_a_part_that_has_no_room_and_the_numbers(parts: list[Part], nodes: list[Node]) -> None:
    try:
        place(parts, nodes)
    except PlanError as error:
        said = str(error)
        match = re.search(r"no node has room for (part\d) (\d+) of (\d+), which needs ([\d.]+) CPU", said)
        assert match
        part = next(part for part in parts if part.name == match[1])
        assert int(match[3]) == part.count
        assert 1 <= int(match[2]) <= part.count
        assert float(match[4]) == part.cpus
        for p in parts:
            assert f"{p.count} x {p.name} ({p.cpus:g} CPU" in said
        for node in nodes:
            assert f"{node.name}: {node.cpus:g} CPU" in said


def test_nodes_of_one_name_are_two_nodes() -> None:
    nodes = [Node("host", 1, 0, 0), Node("host", 1, 0, 0)]
    assert place([Part("learner", 2, 1.0)], nodes) == {"learner": ["host", "host"]}
    with pytest.raises(PlanError, match="learner 3 of 3, which needs 1 CPU"):
        place([Part("learner", 3, 1.0)], nodes)


def test_an_empty_cluster_says_so() -> None:
    with pytest.raises(PlanError, match="no nodes") as caught:
        place([Part("rollout", 1, 0.25)], [])
    assert isinstance(caught.value, UserError)


def test_the_largest_goes_first() -> None:
    """First come, first placed would put the small part where only the large one fits."""
    nodes = [Node("large", 4, 1, 0), Node("small", 1, 0, 0)]
    assert place([Part("little", 1, 1.0), Part("big", 1, 4.0, 1.0)], nodes) == {"little": ["small"], "big": ["large"]}


def test_the_parts_of_a_recipe() -> None:
    tree = {
        "data": {},
        "policy": {"model": "m"},
        "learner": {"ranks": 3},
        "rollout": {"actors": 5},
        "evaluation": {"every": 2},
        "reward": {"worker": {"workers": 2}},
        "cluster": {"learner_cpus": 2, "learner_gpus": 1, "rollout_gpus": 0.5, "memory_gb": 3, "service_cpus": 0.5},
    }
    parts = parts_of(resolve(tree, "test"))
    assert {name: part.count for name, part in parts.items()} == {
        "learner": 3,
        "rollout": 5,
        "reward_server": 1,
        "scoring_worker": 2,
        "evaluator": 1,
    }
    assert parts["learner"].options() == {"num_cpus": 2, "num_gpus": 1, "memory": 3 * 2**30}
    assert parts["scoring_worker"].options() == {"num_cpus": 0.5, "num_gpus": 0}
    tree["evaluation"] = {"every": 0}
    assert "evaluator" not in parts_of(resolve(tree, "test"))


def test_only_living_nodes_count() -> None:
    rows = [
        {"NodeManagerHostname": "a", "Alive": True, "Resources": {"CPU": 4.0, "memory": 8 * 2.0**30, "node:a": 1.0}},
        {"NodeManagerHostname": "b", "Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
        {"NodeManagerHostname": "c", "Alive": True, "Resources": {"GPU": 2.0}},
    ]
    assert nodes_of_ray(rows) == [Node("a", 4, 0, 8), Node("c", 0, 2, 0)]


def test_a_run_that_stays_on_one_machine_counts_every_node_of_it_and_no_other() -> None:
    rows = [
        {"NodeManagerHostname": name, "NodeManagerAddress": address, "Alive": True, "Resources": {"CPU": cpus}}
        for name, address, cpus in [("a", "10.0.0.1", 1.0), ("a", "10.0.0.1", 2.0), ("b", "10.0.0.2", 4.0)]
    ]
    assert [node.cpus for node in nodes_of_ray(rows, "10.0.0.1")] == [1.0, 2.0]
    assert [node.cpus for node in nodes_of_ray(rows)] == [1.0, 2.0, 4.0]


def small_plan(**sections: dict[str, object]) -> Config:
    tree = {
        "data": {"source": "prompts.jsonl"},
        "policy": {"model": "policy"},
        "rollout": {"actors": 3, "min_actors": 1},
        "learner": {"ranks": 2, "min_ranks": 1},
        "cluster": {"rollout_cpus": 1, "learner_cpus": 1, "service_cpus": 0.1},
    }
    return resolve({**tree, **sections}, "test")


@pytest.mark.parametrize(("cpus", "rollouts", "ranks"), [(5.2, 3, 2), (4.2, 2, 2), (3.2, 1, 2), (2.2, 1, 1)])
def test_a_plan_gives_up_rollout_actors_before_ranks(cpus: float, rollouts: int, ranks: int) -> None:
    plan = fitting(small_plan(), [Node("a", cpus, 0, 0)])
    assert (plan["rollout"].count, plan["learner"].count) == (rollouts, ranks)


def test_less_than_the_recipe_allows_is_refused_with_the_whole_plan() -> None:
    with pytest.raises(PlanError, match="3 x rollout"):
        fitting(small_plan(), [Node("a", 2.1, 0, 0)])
    config = small_plan(rollout={"actors": 3}, learner={"ranks": 2})  # all, where the recipe says nothing
    with pytest.raises(PlanError):
        fitting(config, [Node("a", 4.2, 0, 0)])


def test_ranks_that_are_spread_strictly_share_no_node() -> None:
    nodes = [Node("a", 8, 0, 0), Node("b", 2, 0, 0)]
    ranks = Part("learner", 2, 1.0, apart="strict_spread")
    # The larger part goes first, but not where it takes the place that a rank is bound to.
    assert place([Part("big", 1, 2.0), ranks], nodes) == {"big": ["a"], "learner": ["a", "b"]}
    with pytest.raises(PlanError, match=r"learner 3 of 3.*on a node without another of them"):
        place([Part("learner", 3, 1.0, apart="strict_spread")], nodes)
    assert place([Part("learner", 3, 1.0, apart="spread")], nodes) == {"learner": ["a", "b", "a"]}
    assert place([Part("learner", 3, 1.0, apart="pack")], nodes) == {"learner": ["a", "a", "a"]}


def test_a_lost_node_leaves_fewer_ranks_where_they_are_spread_strictly() -> None:
    config = small_plan(cluster={"rollout_cpus": 0.1, "learner_cpus": 1, "learner_placement": "strict_spread"})
    assert fitting(config, [Node("a", 4, 0, 0), Node("b", 4, 0, 0)])["learner"].count == 2
    assert fitting(config, [Node("a", 64, 0, 0)])["learner"].count == 1


def test_ranks_without_anything_to_reserve_cannot_be_placed() -> None:
    with pytest.raises(UserError, match=r"learner_placement: pack reserves learner_cpus and learner_gpus"):
        small_plan(cluster={"learner_cpus": 0, "learner_placement": "pack"})


def test_machines_are_counted_by_address_and_nodes_of_one_are_one() -> None:
    rows = [
        {"NodeManagerAddress": "10.0.0.1", "Alive": True},
        {"NodeManagerAddress": "10.0.0.1", "Alive": True},
        {"NodeManagerAddress": "10.0.0.2", "Alive": False},
    ]
    assert addresses_of_ray(rows) == {"10.0.0.1"}
    assert machines_of_ray(rows) == 1
    assert machines_of_ray([*rows, {"NodeManagerAddress": "10.0.0.3", "Alive": True}]) == 2


@pytest.mark.parametrize(("restarts", "of_ray"), [(3, -1), (0, 0)])
def test_ray_starts_a_models_process_again_however_often_unless_none_is_to_be(restarts: int, of_ray: int) -> None:
    """How often is for the reward server to count: it gives a replica its restarts back, and Ray does not."""
    source = {"kind": "preference", "model": "scorer", "restarts": restarts}
    parts = parts_of(small_plan(reward={"sources": {"taste": source}}))
    assert parts["model of taste"].restarts == of_ray
