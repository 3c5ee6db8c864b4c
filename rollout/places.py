"""Places of an engine, taken by many at a time."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Places:
    """`count` places."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._free = asyncio.Semaphore(count)
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def taken(self, count: int) -> AsyncIterator[None]:
        """Holds so many for the length of the block; who came first has them first. ValueError: more than there are."""
        if count > self._count:
            raise ValueError(f"{count} places are asked for, there are {self._count}")
        held = 0
        try:
            async with self._turn:  # two that hold a part each would wait for each other
                while held < count:
                    await self._free.acquire()
                    held += 1
            yield
        finally:
            for _ in range(held):
                self._free.release()
