"""Rows of attention -> the four numbers a row that scoring needs (specification, "From weights to rows").

A row is A[t, :], the attention of the query that predicts response token t on the P positions of the context, averaged
over heads. Pure, float64. The engines compute the same four numbers on their device; this is their definition.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.attention.failures import AttentionFailure

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RowStatistics:
    """M_t, C_t, E_t and X_t: arrays of shape [T]."""

    mass: Floats
    salient_mass: Floats
    neg_entropy_sum: Floats
    peak: Floats


def scale_weights(weights: Sequence[float] | None, count: int) -> Floats:
    """Salience weights [count] scaled to mean 1; `None` is weight 1 for each.

    Raises AttentionFailure `length_mismatch`, or `invalid_weights` for negative, not finite or all-zero ones.
    """
    if weights is None:
        return np.ones(count)
    if len(weights) != count:
        raise AttentionFailure("length_mismatch", f"{len(weights)} salience weights for {count} salient positions")
    values = to_floats(weights, "salient_weights")
    if count == 0:
        return values
    if not np.isfinite(values).all() or (values < 0).any() or values.max() == 0:
        raise AttentionFailure("invalid_weights", "salience weights are finite, none negative and not all 0")
    values = values / values.max()  # the sum of huge weights would overflow
    return values / values.mean()


def check_positions(content: Sequence[int], salient: Sequence[int], context: int) -> None:
    """Raises AttentionFailure unless `salient` is a subset of `content`, and both are sets in 0 .. context-1."""
    for name, positions in (("content", content), ("salient", salient)):
        for position in positions:
            if not 0 <= position < context:
                raise AttentionFailure(
                    "index_out_of_range", f"{name} position {position} is outside 0 .. {context - 1} of the context"
                )
        if len(set(positions)) != len(positions):
            raise AttentionFailure("duplicate_position", f"a position occurs twice in {name}")
    outside = sorted(set(salient) - set(content))
    if outside:
        raise AttentionFailure("salient_outside_content", f"salient position {outside[0]} is not a content position")


def row_statistics(
    rows: Floats, content: Sequence[int], salient: Sequence[int], salient_weights: Sequence[float] | None = None
) -> RowStatistics:
    """Statistics of rows [T, P]. An empty `salient` stands for the content with weights 1.

    Raises AttentionFailure for positions or weights that are wrong. A value that is not finite makes its row's
    statistics not finite; a value outside the content counts for nothing.
    """
    check_positions(content, salient, rows.shape[1])
    weights = scale_weights(salient_weights, len(salient))
    if len(salient) == 0:
        salient, weights = content, np.ones(len(content))
    inside = rows[:, list(content)]
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(inside == 0, 0.0, inside * np.log(inside))  # 0 log 0 := 0
    return RowStatistics(
        mass=inside.sum(axis=1),
        salient_mass=(rows[:, list(salient)] * weights).sum(axis=1),
        neg_entropy_sum=terms.sum(axis=1),
        peak=inside.max(axis=1),
    )


def row_entropy(mass: Floats, neg_entropy_sum: Floats) -> Floats:
    """h_t [T] in nats, the entropy of each row as a distribution over the content; every mass is positive."""
    return np.maximum(0.0, np.log(mass) - neg_entropy_sum / mass)


def rows_matrix(rows: Sequence[Sequence[Any]] | NDArray[Any]) -> Floats:
    """Rows as they came, [T, P] float64; null and "NaN" become NaN. Raises AttentionFailure `ragged_rows`."""
    if isinstance(rows, np.ndarray) and rows.ndim == 2:
        return rows.astype(np.float64)
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise AttentionFailure("ragged_rows", f"rows have {min(lengths)} to {max(lengths)} positions, not one number")
    width = lengths.pop() if lengths else 0
    return to_floats(rows, "rows").reshape(len(rows), width)


def to_floats(values: Sequence[Any] | NDArray[Any], name: str) -> Floats:
    """Numbers as float64; null, "NaN" and "Infinity" become what they say, so that the finite check can name them.

    Raises AttentionFailure `non_finite_attention` for what is no number at all.
    """
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise AttentionFailure("non_finite_attention", f"{name} holds a value that is no finite number") from error
