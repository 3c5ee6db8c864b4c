"""Attention statistics -> the reward (specification, "From rows to the reward"). Pure, float64.

    R = coverage_weight * coverage + focus_weight * focus - repetition_weight * repeat - spike_weight * spike

A sample that cannot be scored raises `AttentionFailure` with its code, checked in the order of `FailureCode`; it never
becomes a reward of 0. Source: CAGSR, arXiv 2502.10482; where the paper is ambiguous the specification decides.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.attention.failures import AttentionFailure
from services.attention.options import AttentionOptions
from services.attention.statistics import Floats, row_entropy, row_statistics, rows_matrix, to_floats

NO_SALIENT_TOKENS = "no_salient_tokens"


@dataclass(frozen=True)
class AttentionReward:
    """The reward R, its terms, the signs of attention that is being gamed, and the flags of the sample.

    `mass_mean` is the mean M_t, `peak_share` the mean X_t / M_t, `entropy_q05` the 5 % quantile of h_t in nats;
    `rows_without_mass` counts the rows with M_t = 0, which every mean leaves out.
    """

    reward: float
    coverage: float
    focus: float
    repeat: float
    spike: float
    mass_mean: float
    peak_share: float
    entropy_q05: float
    rows_without_mass: int
    flags: tuple[str, ...]


def is_empty(response_ids: Sequence[int], eos_ids: Sequence[int]) -> bool:
    """No token, or an end-of-sequence token alone."""
    return len(response_ids) == 0 or (len(response_ids) == 1 and response_ids[0] in eos_ids)


def repetition(response_ids: Sequence[int], eos_ids: Sequence[int], options: AttentionOptions) -> float:
    """The term `repeat`: repeated n-grams of the response without one trailing end-of-sequence token."""
    ids = list(response_ids)
    if ids and ids[-1] in eos_ids:
        ids.pop()
    repeated = total = 0
    for n in options.ngrams:
        counts = Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))
        occurrences = sum(counts.values())
        total += occurrences
        if options.repeat_count == "types":
            repeated += sum(1 for count in counts.values() if count > 1)
        else:
            repeated += occurrences - len(counts)
    if options.rate:
        return repeated / total if total else 0.0
    return float(repeated)


def score_rows(
    rows: Sequence[Sequence[Any]] | NDArray[Any],
    content: Sequence[int],
    salient: Sequence[int],
    salient_weights: Sequence[float] | None,
    response_ids: Sequence[int],
    eos_ids: Sequence[int],
    options: AttentionOptions,
) -> AttentionReward:
    """The reward of dense rows [T][P]. Raises AttentionFailure."""
    _check_response(response_ids, eos_ids)
    if len(content) == 0 or (len(rows) > 0 and all(len(row) == 0 for row in rows)):
        raise AttentionFailure("no_content_tokens", "there is no content position to attend to")
    if len(rows) != len(response_ids):
        raise AttentionFailure("length_mismatch", f"{len(rows)} attention rows for {len(response_ids)} response tokens")
    statistics = row_statistics(rows_matrix(rows), content, salient, salient_weights)
    return score_statistics(
        statistics.mass,
        statistics.salient_mass,
        statistics.neg_entropy_sum,
        statistics.peak,
        len(salient),
        len(content),
        response_ids,
        eos_ids,
        options,
    )


def score_statistics(
    mass: Sequence[Any] | NDArray[Any],
    salient_mass: Sequence[Any] | NDArray[Any],
    neg_entropy_sum: Sequence[Any] | NDArray[Any],
    peak: Sequence[Any] | NDArray[Any],
    salient_count: int,
    content_count: int,
    response_ids: Sequence[int],
    eos_ids: Sequence[int],
    options: AttentionOptions,
) -> AttentionReward:
    """The reward of the statistics M, C, E and X, one a response token; |I| = salient_count, |S| = content_count.

    With `salient_count` 0 the content is salient: C is read as M, and the sample is flagged. Raises AttentionFailure.
    """
    _check_response(response_ids, eos_ids)
    if content_count < 1:
        raise AttentionFailure("no_content_tokens", "there is no content position to attend to")
    named = {"mass": mass, "salient_mass": salient_mass, "neg_entropy_sum": neg_entropy_sum, "peak": peak}
    for name, values in named.items():
        if len(values) != len(response_ids):
            raise AttentionFailure(
                "length_mismatch", f"{name} has {len(values)} values for {len(response_ids)} response tokens"
            )
    if not 0 <= salient_count <= content_count:
        raise AttentionFailure(
            "salient_outside_content", f"{salient_count} salient positions among {content_count} content positions"
        )
    M, C, E, X = (to_floats(values, name) for name, values in named.items())
    for name, values in zip(named, (M, C, E, X), strict=True):
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise AttentionFailure("non_finite_attention", f"{name}[{row}] is not a finite number")
    for name, values in (("mass", M), ("salient_mass", C), ("peak", X)):
        if (values < 0).any():
            row = int(np.flatnonzero(values < 0)[0])
            raise AttentionFailure("negative_attention", f"{name}[{row}] is negative")
    held = M > 0
    without = int((~held).sum())
    if without == len(M):
        raise AttentionFailure("no_attention_mass", "no row has attention on the content")
    flags = (NO_SALIENT_TOKENS,) if salient_count == 0 else ()
    return _combine(
        M[held],
        (C if salient_count else M)[held],
        E[held],
        X[held],
        salient_count or content_count, content_count, without, flags,
        repetition(response_ids, eos_ids, options), options,
    )  # fmt: skip


def _combine(
    M: Floats, C: Floats, E: Floats, X: Floats, salient_count: int, content_count: int,
    without: int, flags: tuple[str, ...], repeat: float, options: AttentionOptions,
) -> AttentionReward:  # fmt: skip
    """The terms over rows that all have mass, and their sum."""
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is named below
        entropy = row_entropy(M, E)
        coverage = float(np.mean(C / M if options.mass == "renormalised" else C))
        if options.per_token:
            coverage /= salient_count
        focus, spike = _focus_and_spike(entropy, E, content_count, options)
        signs = (float(np.mean(M)), float(np.mean(X / M)), float(np.quantile(entropy, 0.05)))
    reward = (
        options.coverage_weight * coverage
        + options.focus_weight * focus
        - options.repetition_weight * repeat
        - options.spike_weight * spike
    )
    if not all(math.isfinite(value) for value in (reward, coverage, focus, spike, *signs)):
        raise AttentionFailure("non_finite_attention", "the statistics are too large: a term is not a finite number")
    return AttentionReward(reward, coverage, focus, repeat, spike, *signs, rows_without_mass=without, flags=flags)


def _focus_and_spike(entropy: Floats, E: Floats, content_count: int, options: AttentionOptions) -> tuple[float, float]:
    if content_count == 1:  # one position: attention on it is neither sharp nor spread
        return 0.0, 0.0
    sharpness = entropy if options.focus_mass == "renormalised" else -E
    scale = math.log(content_count) if options.normalised else 1.0
    focus = -float(np.mean(np.maximum(sharpness, options.entropy_floor))) / scale
    spike = float(np.mean(np.maximum(0.0, options.entropy_floor - sharpness))) / scale
    return focus, spike


def _check_response(response_ids: Sequence[int], eos_ids: Sequence[int]) -> None:
    if is_empty(response_ids, eos_ids):
        raise AttentionFailure("empty_response", "the response has no token beside an end-of-sequence token")
