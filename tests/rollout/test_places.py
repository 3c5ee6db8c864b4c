"""Places of an engine: never more taken than there are, first come first served, given back whatever happens."""

import asyncio
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.places import Places


@given(st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), max_size=12))))
def test_never_more_than_there_are_and_everybody_has_a_turn(drawn: tuple[int, list[int]]) -> None:
    count, wanted = drawn
    most, order = 0, []

    async def take() -> None:
        places, taken = Places(count), 0

        async def one(index: int, number: int) -> None:
            nonlocal taken, most
            async with places.taken(number):
                order.append(index)
                taken += number
                most = max(most, taken)
                await asyncio.sleep(0)
                taken -= number

        async with asyncio.timeout(10):
            await asyncio.gather(*(one(index, number) for index, number in enumerate(wanted)))

    asyncio.run(take())
    assert most <= count
    assert order == list(range(len(wanted)))


def test_more_than_there_are_are_refused_at_once() -> None:
    async def take() -> None:
        async with Places(3).taken(4):
            pass

    with pytest.raises(ValueError, match="4 places are asked for, there are 3"):
        asyncio.run(take())


def test_one_who_gives_up_waiting_gives_back_what_he_had() -> None:
    async def take() -> None:
        places = Places(3)
        async with places.taken(2):
            waiting = asyncio.create_task(places.taken(2).__aenter__())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            waiting.cancel()
            with suppress(asyncio.CancelledError):
                await waiting
        async with asyncio.timeout(10), places.taken(3):
            pass

    asyncio.run(take())
