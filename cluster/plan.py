"""The plan of resources: which actors a run needs, and whether the cluster can hold them. Pure but for `nodes_of_ray`.

Fault of others that this avoids: a placement that can never fit and waits for ever without a word.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cluster.config import Config
from reward_server.placement import placed_models
from services.errors import PlanError

Apart = Literal["any", "pack", "spread", "strict_spread"]
"""How the actors of a part lie on the nodes: `cluster.learner_placement`."""


@dataclass(frozen=True)
class Part:
    """`count` actors of one kind, and what Ray reserves for each."""

    name: str
    count: int
    cpus: float
    gpus: float = 0.0
    memory_gb: float = 0.0
    restarts: int = 0
    """How often Ray starts one again by itself; -1: always."""
    apart: Apart = "any"

    def options(self) -> dict[str, float]:
        """The actor options of Ray."""
        options: dict[str, float] = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        return options | ({"memory": self.memory_gb * 2**30} if self.memory_gb else {})


@dataclass(frozen=True)
class Node:
    name: str
    cpus: float
    gpus: float
    memory_gb: float


def parts_of(config: Config) -> dict[str, Part]:
    cluster = config.cluster
    parts = [
        Part(
            "learner",
            config.learner.ranks,
            cluster.learner_cpus,
            cluster.learner_gpus,
            cluster.memory_gb,
            apart=cluster.learner_placement,
        ),
        Part("rollout", config.rollout.actors, cluster.rollout_cpus, cluster.rollout_gpus, cluster.memory_gb),
        Part("reward_server", 1, cluster.service_cpus),
        Part("scoring_worker", config.reward.worker.workers, cluster.service_cpus),
    ]
    if config.evaluation.every:
        parts.append(Part("evaluator", 1, cluster.rollout_cpus, cluster.rollout_gpus, cluster.memory_gb))
    if config.reward.worker.url is None:
        parts += [
            # Who counts them is the reward server: what has lived for long has them all again, and Ray forgets nothing.
            Part(model_part(name), source.replicas, source.cpus, source.gpus, restarts=-1 if source.restarts else 0)
            for name, source in placed_models(config.reward).items()
        ]
    return {part.name: part for part in parts}


def model_part(source: str) -> str:
    """The name of the part that holds a source's model."""
    return f"model of {source}"


def place(parts: Sequence[Part], nodes: Sequence[Node]) -> dict[str, list[str]]:
    """First-fit-decreasing placement: the node of each actor, by part.

    Raises:
        PlanError: names the first part that does not fit, and what is missing.
    """
    # By place, not by name: two nodes of one machine have the same.
    free = [[node.cpus, node.gpus, node.memory_gb] for node in nodes]
    placed: dict[str, list[str]] = {part.name: [] for part in parts}
    # What is bound to places goes before what fits anywhere.
    order = sorted(
        parts, key=lambda part: (part.apart != "strict_spread", -part.gpus, -part.cpus, -part.memory_gb, part.name)
    )
    for part in order:
        need = (part.cpus, part.gpus, part.memory_gb)
        here = [0] * len(nodes)
        for index in range(part.count):
            fits = [
                place
                for place, left in enumerate(free)
                if all(n <= have + 1e-9 for n, have in zip(need, left, strict=True))
                and not (part.apart == "strict_spread" and here[place])
            ]
            if not fits:
                raise PlanError(_missing(part, index, parts, nodes))
            chosen = min(fits, key=lambda place: here[place]) if part.apart in ("spread", "strict_spread") else fits[0]
            here[chosen] += 1
            free[chosen] = [have - n for n, have in zip(need, free[chosen], strict=True)]
            placed[part.name].append(nodes[chosen].name)
    return placed


def fitting(config: Config, nodes: Sequence[Node]) -> dict[str, Part]:
    """The plan, with fewer rollout actors and then fewer learner ranks where that is what the nodes hold.

    Raises:
        PlanError: not even `rollout.min_actors` and `learner.min_ranks` of them fit.
    """
    parts = parts_of(config)
    rollouts, ranks = parts["rollout"].count, parts["learner"].count
    fewest = config.rollout.min_actors or rollouts
    tried = [(ranks, count) for count in range(rollouts, fewest - 1, -1)]
    tried += [(count, fewest) for count in range(ranks - 1, (config.learner.min_ranks or ranks) - 1, -1)]
    failed: PlanError | None = None
    for learner, rollout in tried:
        plan = {
            **parts,
            "learner": replace(parts["learner"], count=learner),
            "rollout": replace(parts["rollout"], count=rollout),
        }
        try:
            place(list(plan.values()), nodes)
        except PlanError as error:
            failed = failed or error  # of the whole plan: it says what was asked for
            continue
        return plan
    assert failed is not None
    raise failed


def _missing(part: Part, index: int, parts: Sequence[Part], nodes: Sequence[Node]) -> str:
    wanted = ", ".join(f"{p.count} x {p.name} ({amount(p.cpus, p.gpus, p.memory_gb)})" for p in parts)
    total = amount(
        sum(p.count * p.cpus for p in parts),
        sum(p.count * p.gpus for p in parts),
        sum(p.count * p.memory_gb for p in parts),
    )
    there = "; ".join(f"{node.name}: {amount(node.cpus, node.gpus, node.memory_gb)}" for node in nodes) or "no nodes"
    alone = ", on a node without another of them (cluster.learner_placement: strict_spread)"
    return (
        f"the cluster cannot hold the plan: no node has room for {part.name} {index + 1} of {part.count}, which needs "
        f"{amount(part.cpus, part.gpus, part.memory_gb)}{alone if part.apart == 'strict_spread' else ''}. "
        f"The plan: {wanted}; in all {total}. "
        f"The cluster has {there}. "
        f"Ask for less (cluster.*_cpus, cluster.*_gpus, rollout.actors, learner.ranks, and cpus, gpus and replicas of "
        f"reward.sources) or add nodes"
    )


def no_room(part: Part, why: str, seconds: float, free: Sequence[Node], spoken_for: Sequence[Part]) -> PlanError:
    """The error to end a run with, where there was no room for one of a part for so long."""
    there = "; ".join(amount(node.cpus, node.gpus, node.memory_gb) for node in free)
    first = ", ".join(f"{each.count} x {each.name}" for each in spoken_for)
    return PlanError(
        f"{why}: for {seconds:.0f} s (cluster.start_s) the cluster had no room "
        f"for another, which needs {amount(part.cpus, part.gpus, part.memory_gb)} on one node; free are {there}"
        f"{f', spoken for by {first}' if first else ''}. "
        "Go on with --resume auto when there are nodes"
    )


def amount(cpus: float, gpus: float, memory_gb: float) -> str:
    """In words."""
    words = [f"{cpus:g} CPU"]
    words += [f"{gpus:g} GPU"] if gpus else []
    words += [f"{memory_gb:.3g} GB"] if memory_gb else []
    return ", ".join(words)


def nodes_of_ray(rows: Sequence[Mapping[str, object]], only: str | None = None) -> list[Node]:
    """The living nodes of `ray.nodes()`; `only` those of the machine with this address."""
    nodes: list[Node] = []
    for row in rows:
        resources = row["Resources"]
        if not row["Alive"] or not isinstance(resources, Mapping):
            continue
        if only is not None and row["NodeManagerAddress"] != only:
            continue
        amount = {key: float(value) for key, value in resources.items() if isinstance(value, int | float)}
        nodes.append(_node(str(row["NodeManagerHostname"]), amount))
    return nodes


def free_of_ray(view: Mapping[str, Mapping[str, float]], only: str | None = None) -> list[Node]:
    """What is free on each living node, by Ray's resources of each; `only` on the machine with this address."""
    bound = set() if only is None else bound_to(only).keys()
    return [_node(name, free) for name, free in view.items() if free.keys() >= bound]


def _node(name: str, amount: Mapping[str, float]) -> Node:
    return Node(name, amount.get("CPU", 0.0), amount.get("GPU", 0.0), amount.get("memory", 0.0) / 2**30)


def machines_of_ray(rows: Sequence[Mapping[str, object]]) -> int:
    """How many machines (or containers) the living nodes of `ray.nodes()` are: several raylets may be of one.

    What one machine has for itself, its loopback and its shared memory, is out of reach for the others.
    """
    return len(addresses_of_ray(rows))


def addresses_of_ray(rows: Sequence[Mapping[str, object]]) -> set[str]:
    """Of the machines that the living nodes of `ray.nodes()` are."""
    return {str(row["NodeManagerAddress"]) for row in rows if row["Alive"]}


def bound_to(address: str) -> dict[str, float]:
    """What of Ray's resources binds an actor to a machine: each raylet there has 1 of it."""
    return {f"node:{address}": 0.001}
