"""Room for the learner's ranks as one reservation: all of them or none, and where `cluster.learner_placement` says."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.plan import Part, bound_to

POLL_S = 0.05

STRATEGY = {"pack": "PACK", "spread": "SPREAD", "strict_spread": "STRICT_SPREAD"}
"""Of Ray's placement groups."""


@dataclass(frozen=True)
class Reservation:
    """A placement group of one bundle a rank."""

    group: Any

    def options(self, index: int) -> dict[str, Any]:
        """The actor options that put an actor into the bundle `index`."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=index)
        return {"scheduling_strategy": strategy}

    def give_back(self) -> None:
        """Ends the reservation, and what still runs in it."""
        from ray.util import remove_placement_group

        remove_placement_group(self.group)


def reserve(
    ray: Any, part: Part, *, seconds: float, tick: Callable[[], None], machine: str | None = None
) -> Reservation | None:
    """Room for every actor of a part, on one `machine` alone where it is given; None where Ray has not found it within
    so many seconds.

    `tick` is called meanwhile; what it raises ends the wait, and the request with it.
    """
    from ray.util import placement_group

    amounts = {"CPU": part.cpus, "GPU": part.gpus, "memory": part.memory_gb * 2**30}
    bundle = {name: amount for name, amount in amounts.items() if amount}
    bundle |= {} if machine is None else bound_to(machine)
    reservation = Reservation(placement_group([bundle] * part.count, strategy=STRATEGY[part.apart]))
    ready = reservation.group.ready()
    end = time.monotonic() + seconds
    found = False
    try:
        while not found and time.monotonic() < end:
            found = bool(ray.wait([ready], timeout=POLL_S)[0])
            tick()
    finally:
        if not found:
            reservation.give_back()
    return reservation if found else None
