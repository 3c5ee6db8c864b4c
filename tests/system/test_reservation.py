"""Room for the learner's ranks: all of it or none, given back when it is not found in time or no longer needed.

Ray is imported late: it reads its token mode then, and `ray_session` sets it.
"""

import time
from typing import Any

import pytest

from cluster.plan import Part
from cluster.reservation import reserve


class Rank:
    def node(self) -> str:
        import ray

        return ray.get_runtime_context().get_node_id()


def free_cpus() -> float:
    import ray

    return float(ray.available_resources().get("CPU", 0.0))


def until_free(cpus: float) -> None:
    end = time.monotonic() + 60
    while free_cpus() < cpus and time.monotonic() < end:
        time.sleep(0.1)
    assert free_cpus() == cpus


@pytest.mark.usefixtures("ray_session")  # one node of 4 CPUs
def test_room_is_all_or_none_and_given_back() -> None:
    import ray

    until_free(4)
    looked: list[float] = []
    part = Part("learner", 2, 1.5, apart="pack")
    room = reserve(ray, part, seconds=60, tick=lambda: looked.append(time.monotonic()))
    assert room is not None
    assert looked
    cls: Any = ray.remote(Rank)
    ranks = [cls.options(**part.options(), **room.options(index)).remote() for index in range(2)]
    assert len(set(ray.get([rank.node.remote() for rank in ranks], timeout=120))) == 1
    assert free_cpus() == 1.0
    assert reserve(ray, Part("learner", 1, 2.0, apart="pack"), seconds=1, tick=lambda: None) is None
    room.give_back()  # with what runs in it
    until_free(4)
    # Two that may not share a node never find one: the request does not stay behind.
    assert reserve(ray, Part("learner", 2, 1.0, apart="strict_spread"), seconds=1, tick=lambda: None) is None

    def stopped() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reserve(ray, Part("learner", 2, 1.0, apart="strict_spread"), seconds=30, tick=stopped)
    until_free(4)
