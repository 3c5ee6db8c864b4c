"""Which layers and heads are captured: the weights u[l, h] of the specification."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, model_validator

from services.config_base import Section
from services.errors import UserError

HeadWeight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class CaptureSection(Section):
    """The decoder layers, and their heads, whose attention on the prompt is averaged."""

    last_layers: int = Field(
        default=1, ge=1, description="how many of the last decoder layers are averaged; the paper's L', 1 costs least"
    )
    layers: tuple[int, ...] | None = Field(
        default=None,
        min_length=1,
        description="decoder layers from 0 (negative: from the end), in place of last_layers; null: last_layers",
    )
    heads: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        default=None,
        min_length=1,
        description="query heads of each captured layer, from 0; null: all, as the paper",
    )
    weights: tuple[tuple[HeadWeight, ...], ...] | None = Field(
        default=None,
        description="weight of each head, [captured layers][heads], none negative; null: 1 for each of `heads`",
    )

    @model_validator(mode="after")
    def _one_way_to_weigh(self) -> "CaptureSection":
        if self.heads is not None and self.weights is not None:
            raise ValueError("give either `heads` or `weights`: a head with weight 0 is left out")
        return self


@dataclass(frozen=True)
class CapturedLayers:
    """Captured decoder layers in rising order, and u[l, h] as [len(layers)][H]."""

    layers: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]

    @property
    def total(self) -> float:
        """The sum of all weights, by which the weighted sum over heads is divided."""
        return sum(sum(row) for row in self.weights)


def resolve_capture(section: CaptureSection, num_layers: int, num_heads: int) -> CapturedLayers:
    """The section for a model of `num_layers` decoder layers with `num_heads` query heads each.

    Raises UserError where a layer or head is not there, occurs twice, or the weights do not fit or add up to 0.
    """
    if section.layers is None:
        if section.last_layers > num_layers:
            raise UserError(
                f"attention.last_layers: {section.last_layers}, but the model has {num_layers} decoder layers"
            )
        chosen = tuple(range(num_layers - section.last_layers, num_layers))
    else:
        for layer in section.layers:
            if not -num_layers <= layer < num_layers:
                raise UserError(
                    f"attention.layers: {layer}, but the model's decoder layers are 0 .. {num_layers - 1} "
                    f"(or -{num_layers} .. -1)"
                )
        chosen = tuple(layer % num_layers for layer in section.layers)
        if len(set(chosen)) != len(chosen):
            raise UserError(f"attention.layers: {list(section.layers)} names a layer twice")
    weights = _weights(section, len(chosen), num_heads)
    order = sorted(range(len(chosen)), key=lambda i: chosen[i])
    resolved = CapturedLayers(tuple(chosen[i] for i in order), tuple(weights[i] for i in order))
    if resolved.total <= 0:
        raise UserError("attention.weights: they add up to 0, so no head is captured")
    return resolved


def _weights(section: CaptureSection, num_layers: int, num_heads: int) -> tuple[tuple[float, ...], ...]:
    if section.weights is not None:
        shape = [len(row) for row in section.weights]
        if shape != [num_heads] * num_layers:
            raise UserError(
                f"attention.weights: rows of {shape} weights, but {num_layers} layers have {num_heads} heads each"
            )
        return section.weights
    heads = range(num_heads) if section.heads is None else section.heads
    for head in heads:
        if head >= num_heads:
            raise UserError(f"attention.heads: {head}, but the model's heads are 0 .. {num_heads - 1}")
    row = tuple(1.0 if head in heads else 0.0 for head in range(num_heads))
    return (row,) * num_layers
