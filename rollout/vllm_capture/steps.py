"""Which rows of a step are written: one rule for chunked prefill, prefix-cache hits, preemption and rejected drafts.

A token computed at absolute position `pos` gives the row of response token t = pos + 1 - P. It is written if and only
if t is not committed yet, that is t >= the response tokens that the request holds. Pure numpy.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Tokens:
    """The N tokens that a step computes: the slot of each one's request, and its absolute position. int64 [N]."""

    slot: Ints
    position: Ints


@dataclass(frozen=True)
class Rows:
    """R rows: index of the query among the step's tokens, slot, response token t, keys in its context. int64 [R]."""

    query: Ints
    slot: Ints
    token: Ints
    context: Ints


def tokens_of_step(slots: Ints, computed: Ints, scheduled: Ints) -> Tokens:
    """The tokens of a step, request by request as the model runner lays them out.

    slots, computed (tokens whose keys are there already) and scheduled: [requests].
    """
    starts = np.cumsum(scheduled) - scheduled
    within = np.arange(int(scheduled.sum())) - np.repeat(starts, scheduled)
    return Tokens(np.repeat(slots, scheduled), np.repeat(computed, scheduled) + within)


def rows_of_step(slots: Ints, computed: Ints, scheduled: Ints, prompt: Ints, committed: Ints) -> list[Rows]:
    """The rows to write, in rounds: a round has at most one row of a request, so that its rows are one batch.

    prompt: P of each request; committed: response tokens it holds before this step. Without drafts there is one round
    at most, since only the last token of a request's step stands at or past what is committed.
    """
    ends = np.cumsum(scheduled)
    last_token = computed + scheduled - prompt
    first_token = np.maximum(committed, np.maximum(computed + 1 - prompt, 0))
    counts = last_token + 1 - first_token
    rounds: list[Rows] = []
    for back in range(max(0, int(counts.max(initial=0)))):
        (chosen,) = np.nonzero(counts > back)
        token = last_token[chosen] - back
        rounds.append(Rows(ends[chosen] - 1 - back, slots[chosen], token, prompt[chosen] + token))
    return rounds
