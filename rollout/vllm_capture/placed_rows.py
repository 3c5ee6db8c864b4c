"""Which rows of a step are written, settled on the device: the rule of `steps`, out of tensors that no one waits for.

A token computed at absolute position `pos` is the row of response token t = pos + 1 - P, and is written if and only if
the request holds no token at pos + 1 yet. A draft's row is written like any other; where the draft is rejected, the
next step begins at the same t and writes over it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rollout.vllm_capture.triton_kernels import RowTensors, tl, triton

_BLOCK = 128


@dataclass(frozen=True)
class PlacedRows:
    """The rows of a step at fixed addresses: `query` [R] (index of each row's query among the step's tokens; int32) and
    `rows`; the first `per_request` belong to the batch's first request, latest token first."""

    query: Tensor
    rows: RowTensors
    per_request: int


@dataclass(frozen=True)
class StepTensors:
    """A batch of N requests: slot [N] (int64; below 0: none), start [at least N + 1] and length [at least N] (int32:
    where each one's tokens begin in the step, and its context after it), held [slots] (int32: prompt and response
    tokens that the request has had so far)."""

    slot: Tensor
    start: Tensor
    length: Tensor
    held: Tensor


def no_rows(requests: int, per_request: int, device: torch.device | str) -> PlacedRows:
    """Room for the rows of `requests` requests, none of which is there."""

    def integers() -> Tensor:
        return torch.zeros(requests * per_request, dtype=torch.int32, device=device)

    return PlacedRows(integers(), RowTensors(integers(), integers(), integers()), per_request)


def place_rows(placed: PlacedRows, step: StepTensors, prompt: Tensor) -> None:
    """Sets every row of `placed`; those without a token to write get context 0.

    prompt [slots], int32: P of each request, 0 for one that is not captured.
    """
    rows = placed.rows
    constants: dict[str, Any] = {"PER_REQUEST": placed.per_request, "BLOCK": _BLOCK}
    _place[(triton.cdiv(placed.query.shape[0], _BLOCK),)](
        *(step.slot, step.start, step.length, step.held, prompt),
        *(placed.query, rows.slot, rows.token, rows.context),
        *(step.slot.shape[0], placed.query.shape[0]),
        **constants,
    )


@triton.jit(do_not_specialize=["requests", "count"])
def _place(
    batch_slot,
    batch_start,
    batch_length,
    held,
    prompt,
    query,
    row_slot,
    row_token,
    row_context,
    requests,
    count,
    PER_REQUEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (block of rows)."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    request = row // PER_REQUEST
    back = row % PER_REQUEST
    there = request < requests
    slot = tl.load(batch_slot + request, mask=there, other=-1)
    there = there & (slot >= 0)
    slot = tl.where(there, slot, 0)
    start = tl.load(batch_start + request, mask=there, other=0)
    end = tl.load(batch_start + request + 1, mask=there, other=0)
    context = tl.load(batch_length + request, mask=there, other=0) - back
    length = tl.load(prompt + slot, mask=there, other=0)
    known = tl.load(held + slot, mask=there, other=0)
    there = there & (back < end - start) & (length > 0) & (context >= length) & (context >= known)
    inside = row < count
    tl.store(query + row, tl.where(there, end - 1 - back, 0), mask=inside)
    tl.store(row_slot + row, tl.where(there, slot, 0).to(tl.int32), mask=inside)
    tl.store(row_token + row, tl.where(there, context - length, 0), mask=inside)
    tl.store(row_context + row, tl.where(there, context, 0), mask=inside)
