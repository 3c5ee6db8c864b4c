"""Time that is spent in a place of the code, added up."""

import time
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Stopwatch:
    """Adds up seconds spent in `with` blocks; for one thread at a time, not nested. On a GPU that is what the host
    spent: kernels run on after they are launched."""

    __slots__ = ("_since", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = 0.0

    def __enter__(self) -> "Stopwatch":
        self._since = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._since


class _Watched(Protocol):
    time: Stopwatch


S = TypeVar("S", bound=_Watched)


def timed(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method whose time goes to its object's `time`. A timed method calls no other of the same object."""

    @wraps(method)
    def watched(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.time:
            return method(self, *args, **kwargs)

    return watched
