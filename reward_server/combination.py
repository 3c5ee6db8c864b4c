"""Components -> one reward: a weighted sum with constants of the recipe, the same for everybody. Pure.

    reward = sum over sources of  weight * clip(scale * value + offset)

A required source that failed fails the item with that source's error. An optional one is left out and said, by the flag
`without:NAME`. Where nothing is left the item fails: a failure is never a number (design, invariant 2).

Sources of an ensemble are reduced to one value first, and that one is summed. CRS is a sum in which the weights of a
preference and an absolute source add up to 1: raw scores are averaged, as published.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from reward_server.schema import Component, ErrorCode, ItemError, Result, item_error

DISAGREE = "sources_disagree"
"""Flag of a result whose sources' shifted values differ by more than the recipe allows."""


class Constants(Protocol):
    """Constants of the recipe for one value: `reward_server.sources_config.Summand`."""

    @property
    def weight(self) -> float: ...
    @property
    def offset(self) -> float: ...
    @property
    def scale(self) -> float: ...
    @property
    def clip(self) -> tuple[float, float] | None: ...


class Combining(Constants, Protocol):
    """Those of a source: `reward_server.sources_config.SourceBase`."""

    @property
    def required(self) -> bool: ...


def shifted(value: float, source: Constants) -> float:
    """clip(scale * value + offset)."""
    number = source.scale * value + source.offset
    return number if source.clip is None else min(max(number, source.clip[0]), source.clip[1])


@dataclass(frozen=True)
class Ensemble:
    """Several sources as one: `reduce` of their shifted values, in the sum with constants of its own."""

    of: tuple[str, ...]
    reduce: Callable[[Sequence[float]], float]
    constants: Constants


def reducer(name: Literal["mean", "min", "quantile"], quantile: float = 0.0) -> Callable[[Sequence[float]], float]:
    """Mean, lowest value, or the lower quantile, linear between neighbours (numpy's default)."""
    if name == "mean":
        return lambda values: sum(values) / len(values)
    if name == "min":
        return min

    def lower(values: Sequence[float]) -> float:
        rising = sorted(values)
        place = quantile * (len(rising) - 1)
        below = math.floor(place)
        above = min(below + 1, len(rising) - 1)
        return rising[below] + (place - below) * (rising[above] - rising[below])

    return lower


def combine(
    item_id: str,
    components: Mapping[str, Component],
    sources: Mapping[str, Combining],
    flags: Sequence[str] = (),
    *,
    ensembles: Mapping[str, Ensemble] | None = None,
    weights: Mapping[str, float] | None = None,
    disagreement: float | None = None,
) -> Result:
    """One item's result from the components of the sources that were asked for.

    `components` is in the order of the request; the first error of a required source is the item's. An ensemble is of
    those of its sources that were asked for, and stands among the components under its own name. `weights` takes the
    place of the constants' own, by name. The result's detail has the standard deviation of the shifted values of the
    sources where there are two or more; above `disagreement` the result is flagged.
    """
    said = list(flags)
    shown = dict(components)
    counting: dict[str, Constants] = {name: sources[name] for name in components}
    required_error: ItemError | None = None
    optional_error: ItemError | None = None
    values = {name: shifted(c.value, sources[name]) for name, c in components.items() if c.value is not None}
    for name, component in components.items():
        if component.error is None:
            continue
        if sources[name].required:
            required_error = required_error or component.error
        else:
            optional_error = optional_error or component.error
            said.append(f"without:{name}")
    spread = deviation(list(values.values()))
    detail: dict[str, float | int] = {} if spread is None else {"disagreement": spread}
    if spread is not None and disagreement is not None and spread > disagreement:
        said.append(DISAGREE)
    for name, ensemble in (ensembles or {}).items():
        asked = [member for member in ensemble.of if member in components]
        members = [values.pop(member) for member in asked if member in values]
        if members:
            value = ensemble.reduce(members)
            counts: dict[str, float | int] = {"members": len(members), "disagreement": deviation(members) or 0.0}
            if math.isfinite(value) and math.isfinite(counts["disagreement"]):
                shown[name] = Component(status="ok", value=value, detail=counts)
            values[name] = shifted(value, ensemble.constants)
            counting[name] = ensemble.constants
    total = sum((weights or {}).get(name, counting[name].weight) * value for name, value in values.items())
    error = required_error or (optional_error if not values else None)
    if error is None and not math.isfinite(total):
        error = item_error(ErrorCode.NON_FINITE_SCORE, "the weighted sum of the sources is not a finite number")
    return Result(
        id=item_id,
        status="ok" if error is None else "failed",
        reward=total if error is None else None,
        components=shown,
        error=error,
        flags=tuple(dict.fromkeys(said)),
        detail=detail if all(math.isfinite(number) for number in detail.values()) else {},
    )


def deviation(values: Sequence[float]) -> float | None:
    """The population's standard deviation of two values or more."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.hypot(*(value - mean for value in values)) / math.sqrt(len(values))
