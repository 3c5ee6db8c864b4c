"""Which rows of a step are written, against the rule spelled out token by token."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rollout.vllm_capture.steps import rows_of_step, tokens_of_step


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    """(computed, scheduled, prompt, committed) of each request: prefills, chunks, decodes, drafts, recomputation."""
    requests: list[tuple[int, int, int, int]] = []
    for _ in range(draw(st.integers(1, 6))):
        prompt = draw(st.integers(1, 12))
        committed = draw(st.integers(0, 6))
        drafts = draw(st.integers(0, 3))
        known = prompt + committed
        computed = draw(st.integers(0, known - 1))
        scheduled = draw(st.integers(1, known - computed + drafts))
        requests.append((computed, scheduled, prompt, committed))
    return requests


@given(batches())
def test_every_uncommitted_row_of_a_step_is_written_once(requests: list[tuple[int, int, int, int]]) -> None:
    computed, scheduled, prompt, committed = (
        np.array(column, dtype=np.int64) for column in zip(*requests, strict=True)
    )
    slots = np.arange(len(requests))[::-1].copy()
    expected: set[tuple[int, int, int, int]] = set()
    index = 0
    for i, (start, count, length, held) in enumerate(requests):
        for position in range(start, start + count):
            t = position + 1 - length
            if t >= 0 and t >= held:
                expected.add((index, int(slots[i]), t, position + 1))
            index += 1

    rounds = rows_of_step(slots, computed, scheduled, prompt, committed)
    for rows in rounds:
        assert len(set(rows.slot.tolist())) == len(rows.slot) > 0
    found = [row for r in rounds for row in zip(r.query, r.slot, r.token, r.context, strict=True)]
    assert len(found) == len(expected)
    assert {tuple(int(x) for x in row) for row in found} == expected

    tokens = tokens_of_step(slots, computed, scheduled)
    laid_out = [(int(slots[i]), p) for i, (s, n, _, _) in enumerate(requests) for p in range(s, s + n)]
    assert list(zip(tokens.slot.tolist(), tokens.position.tolist(), strict=True)) == laid_out
