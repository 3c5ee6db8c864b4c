"""Room on the cluster for a run's parts: waited for after a node was lost, and reserved for the learner."""

import logging
import time
from collections.abc import Callable

from cluster.config import Config
from cluster.plan import Part, fitting, nodes_of_ray
from cluster.reservation import Reservation, reserve
from cluster.supervise import POLL_S, Supervisor
from services.errors import Deadline, PlanError

log = logging.getLogger(__name__)

RESERVE_S = 20.0
"""Seconds in which Ray finds room that is there: it notices a lost node after some ten."""


def plan_with_room(config: Config, supervisor: Supervisor, look: Callable[[], None], wait_s: float) -> dict[str, Part]:
    """The parts as the cluster can hold them now; where it cannot, it is waited for, and said.

    `look` is called meanwhile, between two looks at the cluster.

    Raises:
        PlanError: not even as few as the recipe allows, after `wait_s`.
    """
    end = time.monotonic() + wait_s
    said = False
    while True:
        try:
            return fitting(config, nodes_of_ray(supervisor.ray.nodes(), supervisor.machine))
        except PlanError as error:
            if time.monotonic() >= end:
                raise
            if not said:
                log.warning("the run waits up to %.0f s for room: %s", wait_s, error)
                supervisor.run_dir.event("waiting_for_room", why=str(error), seconds=wait_s)
                said = True
        look()
        time.sleep(POLL_S)


def room_for_learner(
    config: Config, supervisor: Supervisor, part: Part, look: Callable[[], None]
) -> tuple[Part, Reservation | None]:
    """What is reserved for the ranks (None: `learner_placement` is `any`), and the part as the cluster can hold it.

    Ray may have found no room because of a node that it has yet to notice is gone: the plan is asked again.

    Raises:
        Deadline: Ray has not found it within `cluster.start_s`.
        PlanError: a node was lost meanwhile, and not even as few as the recipe allows fit on the others.
    """
    seconds = config.cluster.start_s
    end = time.monotonic() + seconds
    while part.apart != "any":
        left = min(RESERVE_S, end - time.monotonic())
        if left <= 0:
            what = f"room for {part.count} learner ranks (cluster.learner_placement: {part.apart})"
            raise Deadline(waited_for=what, who="Ray", seconds=seconds)
        room = reserve(supervisor.ray, part, machine=supervisor.machine, seconds=left, tick=look)
        if room is not None:
            return part, room
        part = plan_with_room(config, supervisor, look, end - time.monotonic())["learner"]
        supervisor.planned[part.name] = part
    return part, None
