"""Whether a part gets on, by its own answers: what the driver did meanwhile is not held against it."""

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.pulse import ANSWER_S, Pulse


def pulse() -> Pulse:
    actor: Any = SimpleNamespace(pulse=SimpleNamespace(remote=object))
    return Pulse(actor, moved=0.0)


def talk(of: Pulse, at: float, count: int, *, has_work: bool = True) -> None:
    of.ask(at)
    assert of.reference is not None
    of.heard((count, has_work), at + 0.5)


def test_work_that_stands_still_is_known_from_answers() -> None:
    stuck = pulse()
    for second in range(1, 100):
        talk(stuck, 2.0 * second, count=7)
    assert stuck.still_s(200.0) == pytest.approx(198.0 - 2.5)


def test_a_part_that_does_not_answer_stands_still() -> None:
    silent = pulse()
    talk(silent, 1.0, count=7)
    silent.ask(3.0)
    assert silent.still_s(3.0 + ANSWER_S - 1) == 0.0
    assert silent.still_s(903.0) == pytest.approx(901.5)


@pytest.mark.parametrize("has_work", [True, False])
def test_a_driver_that_was_away_knows_nothing_of_that_time(has_work: bool) -> None:
    """It sums and reads back a large checkpoint, say. Each part would be ended at its first look after that."""
    healthy = pulse()
    talk(healthy, 1.0, count=7, has_work=has_work)
    assert healthy.still_s(901.0) == 0.0
    healthy.ask(901.0)
    assert healthy.still_s(902.0) == 0.0  # before it has had the time to answer
    healthy.heard((8, has_work), 902.0)
    assert healthy.still_s(903.0) == 0.0


def test_an_answer_from_before_the_driver_was_away_tells_of_before() -> None:
    busy = pulse()
    talk(busy, 1.0, count=7)
    busy.ask(3.0)
    busy.heard((7, True), 903.0)  # it was there at once, and is read now
    assert busy.still_s(903.0) == pytest.approx(1.5)
