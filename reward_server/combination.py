"""Components -> one reward: a weighted sum with constants of the recipe, the same for everybody. Pure.

    reward = sum over sources of  weight * clip(scale * value + offset)

A required source that failed fails the item with that source's error. An optional one is left out and said, by the flag
`without:NAME`. Where nothing is left the item fails: a failure is never a number (design, invariant 2).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from reward_server.schema import Component, ErrorCode, ItemError, Result, item_error


class Combining(Protocol):
    """The constants of a source that the combination reads: `reward_server.config.SourceBase`."""

    @property
    def weight(self) -> float: ...
    @property
    def required(self) -> bool: ...
    @property
    def offset(self) -> float: ...
    @property
    def scale(self) -> float: ...
    @property
    def clip(self) -> tuple[float, float] | None: ...


def contribution(value: float, source: Combining) -> float:
    """weight * clip(scale * value + offset)."""
    shifted = source.scale * value + source.offset
    if source.clip is not None:
        shifted = min(max(shifted, source.clip[0]), source.clip[1])
    return source.weight * shifted


def combine(
    item_id: str, components: Mapping[str, Component], sources: Mapping[str, Combining], flags: Sequence[str] = ()
) -> Result:
    """One item's result from the components of the sources that were asked for.

    `components` is in the order of the request; the first error of a required source is the item's.
    """
    said = list(flags)
    total = 0.0
    counted = 0
    required_error: ItemError | None = None
    optional_error: ItemError | None = None
    for name, component in components.items():
        if component.value is not None:
            total += contribution(component.value, sources[name])
            counted += 1
        elif sources[name].required:
            required_error = required_error or component.error
        else:
            optional_error = optional_error or component.error
            said.append(f"without:{name}")
    error = required_error or (optional_error if counted == 0 else None)
    if error is None and not math.isfinite(total):
        error = item_error(ErrorCode.NON_FINITE_SCORE, "the weighted sum of the sources is not a finite number")
    return Result(
        id=item_id,
        status="ok" if error is None else "failed",
        reward=total if error is None else None,
        components=dict(components),
        error=error,
        flags=tuple(dict.fromkeys(said)),
    )
