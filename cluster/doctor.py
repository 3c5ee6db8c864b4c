"""`attune doctor`: whether a recipe fits what is there, before anything is started.

The cluster is the one that a run would join; where there is none, this machine. Nothing is loaded but a model's
configuration, and nothing is started but a look at every node.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from cluster.config import Config
from cluster.health import (
    Finding,
    enough,
    look_at_disk,
    look_at_ports,
    look_at_ray,
    look_at_redis,
    look_at_versions,
)
from cluster.machine import SHARED_MEMORY, Machine, look_at_cluster, look_here
from cluster.memory import Need, Shape
from cluster.needs import files_of, needs_of
from cluster.plan import Part, fitting, parts_of, place
from cluster.ray_runtime import OBJECT_STORE_BYTES, ray_cluster
from cluster.shapes import saved_parameters, shape_of
from reward_server.placement import placed_models
from services.attention.config import resolve_capture
from services.errors import PlanError
from services.models import load_config, max_context_of

DRIVER_BYTES = 550 * 2**20
"""The driver's process, and Redis beside it."""

UNKNOWN_STEPS = 10
"""Commits that are reckoned with where all are kept and the recipe has no number of steps."""


@dataclass(frozen=True)
class Report:
    """`placed`: the machine of every actor, by part; empty where the plan does not fit."""

    machines: Sequence[Machine]
    joined: bool
    findings: Sequence[Finding]
    shape: Shape | None = None
    parts: Mapping[str, Part] = field(default_factory=dict)
    needs: Mapping[str, Need] = field(default_factory=dict)
    placed: Mapping[str, Sequence[str]] = field(default_factory=dict)
    sizes: Sequence[Finding] = ()
    """Of models, where no recipe was given."""

    @property
    def exit_code(self) -> int:
        """3 where something does not fit, 1 where something is broken, else 0."""
        found = {finding.status for finding in self.findings}
        return 3 if "short" in found else 1 if "broken" in found else 0


def examine(config: Config, run_dir: Path) -> Report:
    """Looks at everything that a run of this recipe would need.

    Raises:
        UserError: the recipe names no model that there is, no cluster answers where it says that there is one.
        Deadline: a node of the cluster does not answer.
    """
    model_config = load_config(config.policy)
    shape = shape_of(config.policy)
    captured = len(resolve_capture(config.attention, shape.layers, shape.heads).layers)
    saved, unknown = saved_models(config)
    findings = [*look_at_versions(), look_at_redis(config)]
    with ExitStack() as stack:
        joined = bool(config.cluster.address or os.environ.get("RAY_ADDRESS"))
        if joined:
            section = config.cluster.model_copy(update={"open_dashboard": True})  # it is looked at, and said
            ray = stack.enter_context(ray_cluster(section))
            machines = look_at_cluster(ray)
            findings += look_at_ray(config, ray, machines)
        else:
            machines = [look_here()]
            findings += [Finding("ok", "Ray", "a cluster of its own, with a token of its own and no dashboard")]
            findings += look_at_ports()
    findings += [
        Finding("note", name, "is no directory with safetensors here: its memory is not counted") for name in unknown
    ]
    parts, placed = parts_of(config), {}
    try:
        parts = fitting(config, [machine.node() for machine in machines])
        placed = place(list(parts.values()), [machine.node() for machine in machines])
        if parts["learner"].count < config.learner.ranks or parts["rollout"].count < config.rollout.actors:
            counts = f"{parts['rollout'].count} rollout actors, {parts['learner'].count} learner ranks"
            findings.append(Finding("note", "plan", f"fits with fewer than the recipe asks for: {counts}"))
    except PlanError as error:
        findings.append(Finding("short", "plan", str(error)))
    needs = needs_of(config, shape, parts, captured=captured, context=max_context_of(model_config), saved=saved)
    steps = config.run.steps or UNKNOWN_STEPS * config.checkpoint.every
    files = files_of(config, shape, steps, saved)
    published = 0
    if config.cluster.weights == "files":
        if config.cluster.weights_dir is None:
            published = files.published
            findings.append(
                enough("shared memory", published, machines[0].shared_free, f"published weights in {SHARED_MEMORY}")
            )
        else:
            findings.append(look_at_disk(Path(config.cluster.weights_dir), files.published, "published weights"))
    findings.append(look_at_disk(run_dir, files.run_dir, "commits and policies"))
    findings += look_at_memory(machines, parts, needs, placed, joined=joined, published=published)
    return Report(machines, joined, findings, shape, parts, needs, placed)


def saved_models(config: Config) -> tuple[dict[str, int], list[str]]:
    """Elements of the models that the recipe names beside the policy, and the names that nothing is known of."""
    named = [source.model for source in placed_models(config.reward).values()]
    if config.learner.value_model is not None:
        named.append(config.learner.value_model)
    counts = {name: saved_parameters(name) for name in named}
    known = {name: count for name, count in counts.items() if count is not None}
    return known, sorted(counts.keys() - known.keys())


def look_at_memory(
    machines: Sequence[Machine],
    parts: Mapping[str, Part],
    needs: Mapping[str, Need],
    placed: Mapping[str, Sequence[str]],
    *,
    joined: bool,
    published: int,
) -> Iterator[Finding]:
    """Each machine's memory against what is placed on it, and each GPU's against the actor that gets it.

    The driver, Redis and what is published count on the first machine: the head, or this one. Where the plan fits
    nowhere, everything is counted together.
    """
    used: dict[str, int] = {}
    for part, names in placed.items():
        for name in names:
            used[name] = used.get(name, 0) + needs[part].bytes("host")
    own = DRIVER_BYTES + published + (0 if joined else OBJECT_STORE_BYTES)
    if not placed:
        everything = own + sum(need.bytes("host") * parts[part].count for part, need in needs.items())
        yield enough("memory", everything, sum(of_hosts(machines).values()), "all parts on all machines")
    else:
        used[machines[0].name] = used.get(machines[0].name, 0) + own
        for host, there in of_hosts(machines).items():
            here = [machine for machine in machines if _host(machine) == host]
            needed = sum(used.get(machine.name, 0) for machine in here)
            yield enough("memory", needed, there, f"on {', '.join(machine.name for machine in here)}")
    yield from _gpus(machines, parts, needs)


def of_hosts(machines: Sequence[Machine]) -> dict[str, int]:
    """Bytes of memory by host: nodes of one machine have it together."""
    return {_host(machine): machine.memory for machine in machines}


def _host(machine: Machine) -> str:
    return machine.address or machine.name


def _gpus(machines: Sequence[Machine], parts: Mapping[str, Part], needs: Mapping[str, Need]) -> Iterator[Finding]:
    asking = [name for name in needs if parts[name].gpus]
    if not asking:
        return
    sizes = [size for machine in machines for size in machine.gpus]
    if not sizes:
        yield Finding("note", "GPU memory", f"of what {', '.join(asking)} would get is not known: no GPU answers")
        return
    for name in asking:
        given = int(min(sizes) * parts[name].gpus)
        yield enough("GPU memory", needs[name].bytes("device"), given, f"{name}, on {parts[name].gpus:g} GPU")
