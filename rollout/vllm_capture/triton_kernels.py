"""Rows of attention and their statistics on a GPU, read straight from the paged cache of keys.

Four kernels. `accumulate_rows` runs the first three, once a captured layer: partial sums of the softmax over splits of
the keys, the log-sum-exp of each head, and then sum_h u[h] a[h, j] at the positions of the prompt. `reduce_rows` runs
the last, once a step: M, C, E and X. Under tensor parallelism the caller sums `Workspace.rows` over the ranks between.

Nothing is allocated here and no grid depends on a value on the device, so that a step can be recorded in a CUDA graph:
a row that is not there has context 0. No atomics: what one row gives depends on that row alone, and is the same bits at
every run. With TRITON_INTERPRET=1 in the environment before the import, the kernels run on CPU tensors.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton import knobs
except ImportError as error:
    raise ImportError(
        "the GPU kernels of the attention capture need triton 3.6 or later: pip install 'triton>=3.6' (a CUDA build of "
        "torch brings the one that fits it)"
    ) from error

INTERPRETED = bool(knobs.runtime.interpret)

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_REDUCED_TILE = 512


@dataclass(frozen=True)
class Workspace:
    """Scratch for up to R rows of H heads (of this rank) and prompts of up to W tokens; float32, contiguous.

    rows [R, W]: sum over layers and heads of u a, undivided, defined before P of each row's slot; lse [R * H] and
    largest, sums [R * H * splits] are used front to back by layers with fewer heads.
    """

    rows: Tensor
    lse: Tensor
    largest: Tensor
    sums: Tensor
    heads: int
    splits: int


@dataclass(frozen=True)
class RowTensors:
    """R rows: slot, response token t, keys in the context (0: there is no row, and nothing is written). int32 [R]."""

    slot: Tensor
    token: Tensor
    context: Tensor


@dataclass(frozen=True)
class SlotTensors:
    """What belongs to a request, a row a slot: block_table [slots, blocks] and prompt [slots] (P, at most W), int32;
    content [slots, W] (1 or 0) and salient [slots, W] (w_j or 0), float32; statistics [slots, T, 4], float32, written.

    Slots and tokens of rows lie inside these shapes: a kernel cannot raise, so the caller sees to it.
    """

    block_table: Tensor
    prompt: Tensor
    content: Tensor
    salient: Tensor
    statistics: Tensor


def workspace(*, rows: int, heads: int, width: int, device: torch.device | str, splits: int = 16) -> Workspace:
    """Memory for `rows` rows, layers of up to `heads` query heads and prompts of up to `width` tokens.

    `splits` parts of a context are worked on side by side, however long it is: more of them fill a GPU with few rows.

    Raises:
        ValueError: `splits` is no power of two.
    """
    if splits < 1 or splits & (splits - 1):
        raise ValueError(f"splits: {splits} is no power of two")

    def floats(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=device)

    partials = rows * heads * splits
    return Workspace(floats(rows, width), floats(rows * heads), floats(partials), floats(partials), heads, splits)


def accumulate_rows(
    space: Workspace,
    rows: RowTensors,
    slots: SlotTensors,
    query: Tensor,
    keys: Tensor,
    heads: Tensor,
    scale: float,
    *,
    add: bool = False,
    lse: Tensor | None = None,
) -> Tensor:
    """One captured layer: sum_h u[h] a[h, j] into `space.rows` (`add`: onto what the layers before left).

    query [R, H, D]; keys [blocks, Hkv, block size, D], read by strides, so that any physical order or a half of an
    interleaved cache will do; heads [H]: the weights u of this layer, float32; scale: of the scores. lse [R, H]
    (natural logarithm, of the scaled scores, float32, any strides) saves reading all keys for it. Returns
    `space.rows` [most rows, W], of which the first R are those of this call.

    Raises:
        ValueError: shapes or types do not fit each other or the workspace.
    """
    _check(space, rows, slots, query, keys, heads, lse)
    count, query_heads, depth = query.shape
    key_heads, block_size = keys.shape[1], keys.shape[2]
    group = query_heads // key_heads
    padded = max(16, triton.next_power_of_2(depth))
    tile = 64 if padded * keys.element_size() <= 512 else 32  # so that three tiles in flight fit into shared memory
    shape: dict[str, Any] = {
        "GROUP": group,
        "MEMBERS": 1 if group == 1 else max(16, triton.next_power_of_2(group)),
        "DEPTH": depth,
        "PADDED": padded,
        "BLOCK_SIZE": block_size,
        "TILE": tile,
        "UPCAST": INTERPRETED,
        "num_warps": 4,
    }
    paged = (query, keys, slots.block_table)
    strides = (*query.stride(), *keys.stride(), slots.block_table.stride(0))
    if lse is None:
        lse = space.lse[: count * query_heads].view(count, query_heads)
        _launch(
            _partials,
            (count, key_heads, space.splits),
            *(*paged, rows.slot, rows.context, space.largest, space.sums, scale, *strides),
            HEADS=query_heads,
            SPLITS=space.splits,
            **shape,
        )
        _launch(
            _combine,
            (count,),
            *(space.largest, space.sums, lse, rows.context),
            HEADS=query_heads,
            PADDED_HEADS=triton.next_power_of_2(query_heads),
            SPLITS=space.splits,
        )
    _launch(
        _accumulate,
        (count, triton.cdiv(space.rows.shape[1], tile)),
        *(*paged, rows.slot, rows.context, slots.prompt, lse, heads, space.rows, scale),
        *(*strides, *lse.stride(), space.rows.stride(0)),
        KEY_HEADS=key_heads,
        ADD=add,
        **shape,
    )
    return space.rows


def reduce_rows(
    space: Workspace, rows: RowTensors, slots: SlotTensors, total: float, *, dense: Tensor | None = None
) -> None:
    """M, C, E and X of A = `space.rows` / total into the statistics at (slot, token).

    total: the sum of u over all layers and heads, of all ranks. dense [R, W] float32, where given, takes A itself, with
    zeros past the prompt.

    Raises:
        ValueError: there are more rows than the workspace holds, or `dense` is not [R, W].
    """
    count, width = rows.slot.shape[0], space.rows.shape[1]
    if count > space.rows.shape[0]:
        raise ValueError(f"{count} rows, and a workspace for {space.rows.shape[0]}")
    if dense is not None and (dense.shape != (count, width) or dense.dtype != torch.float32 or dense.stride(1) != 1):
        raise ValueError(f"dense: {list(dense.shape)} of {dense.dtype} is not [{count}, {width}] of float32")
    taken = space.rows if dense is None else dense
    _launch(
        _reduce,
        (count,),
        *(space.rows, rows.slot, rows.token, rows.context),
        *(slots.prompt, slots.content, slots.salient, slots.statistics, taken, float(total), width),
        *(space.rows.stride(0), slots.content.stride(0), slots.salient.stride(0)),
        *(*slots.statistics.stride()[:2], taken.stride(0)),
        DENSE=dense is not None,
        TILE=_REDUCED_TILE,
    )


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    if grid[0]:
        kernel[grid](*arguments, **constants)


def _check(
    space: Workspace,
    rows: RowTensors,
    slots: SlotTensors,
    query: Tensor,
    keys: Tensor,
    heads: Tensor,
    lse: Tensor | None,
) -> None:
    count, query_heads, depth = query.shape
    width = space.rows.shape[1]
    wrong = {
        f"query is {query.dtype} and keys are {keys.dtype}": query.dtype != keys.dtype or query.dtype not in _FLOATS,
        f"keys of width {keys.shape[3]} for queries of {depth}": keys.shape[3] != depth,
        f"{query_heads} query heads on {keys.shape[1]} key heads": query_heads % keys.shape[1] != 0,
        f"{heads.shape[0]} head weights of {heads.dtype}": heads.shape != (query_heads,)
        or heads.dtype != torch.float32,
        f"{count} queries for {rows.slot.shape[0]} rows": rows.slot.shape[0] != count,
        f"{count} rows of {query_heads} heads in a workspace for {space.rows.shape[0]} of {space.heads}": (
            count > space.rows.shape[0] or query_heads > space.heads
        ),
        f"key sets of width {slots.content.shape[1]}, {slots.salient.shape[1]} in a workspace of {width}": (
            slots.content.shape[1] != width or slots.salient.shape[1] != width
        ),
        "block table, key sets or statistics are not contiguous in their last dimension": any(
            tensor.stride(-1) != 1 for tensor in (slots.block_table, slots.content, slots.salient, slots.statistics)
        ),
        f"lse is not [{count}, {query_heads}] of float32": lse is not None
        and (lse.shape != (count, query_heads) or lse.dtype != torch.float32),
        "tensors on the CPU, where TRITON_INTERPRET=1 was not set before the import": (
            query.device.type == "cpu" and not INTERPRETED
        ),
    }
    for what, holds in wrong.items():
        if holds:
            raise ValueError(f"attention kernels: {what}")


@triton.jit
def _group_query(
    query,
    stride_head,
    stride_depth,
    key_head,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    DEPTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Queries of the heads that share a key head, [MEMBERS, PADDED]; zeros beyond the GROUP and the DEPTH."""
    member = tl.arange(0, MEMBERS)[:, None]
    depth = tl.arange(0, PADDED)[None, :]
    at = (key_head * GROUP + member) * stride_head + depth * stride_depth
    return tl.load(query + at, mask=(member < GROUP) & (depth < DEPTH), other=0.0)


@triton.jit
def _scores(
    query,
    keys,
    table,
    positions,
    end,
    scale,
    stride_block,
    stride_token,
    stride_depth,
    MEMBERS: tl.constexpr,
    DEPTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Scaled scores of a group at positions [TILE], float32 [MEMBERS, TILE]; -inf and nothing read from `end` on."""
    inside = positions < end
    depth = tl.arange(0, PADDED)[None, :]
    block = tl.load(table + positions // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    at = block * stride_block + (positions % BLOCK_SIZE) * stride_token
    key = tl.load(keys + at[:, None] + depth * stride_depth, mask=inside[:, None] & (depth < DEPTH), other=0.0)
    if MEMBERS == 1:
        # One head: a matrix product would do 16 times the work.
        scores = tl.expand_dims(tl.sum(query.to(tl.float32) * key.to(tl.float32), axis=1), 0)
    elif UPCAST:
        # The interpreter holds bfloat16 as integers, and its tl.dot would multiply those.
        scores = tl.dot(query.to(tl.float32), tl.trans(key.to(tl.float32)), input_precision="ieee")
    else:
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    return tl.where(inside[None, :], scores * scale, float("-inf"))


@triton.jit
def _partials(
    query,
    keys,
    table,
    row_slot,
    row_context,
    largest,
    sums,
    scale,
    stride_query_row,
    stride_query_head,
    stride_query_depth,
    stride_block,
    stride_key_head,
    stride_token,
    stride_depth,
    stride_table,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    DEPTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program (row, key head, split): largest score of each head in its keys, and the sum of exp(score - largest)."""
    row = tl.program_id(0).to(tl.int64)
    key_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    context = tl.load(row_context + row)
    if context <= 0:
        return
    slot = tl.load(row_slot + row).to(tl.int64)
    each = tl.cdiv(tl.cdiv(context, TILE), SPLITS) * TILE
    first = split * each
    last = tl.minimum(first + each, context)
    group = _group_query(
        query + row * stride_query_row,
        stride_query_head,
        stride_query_depth,
        key_head,
        GROUP=GROUP,
        MEMBERS=MEMBERS,
        DEPTH=DEPTH,
        PADDED=PADDED,
    )
    # A split without keys keeps these, which add nothing when the splits are combined.
    best = tl.full([MEMBERS], float("-inf"), tl.float32)
    total = tl.zeros([MEMBERS], tl.float32)
    for start in range(first, last, TILE):
        scores = _scores(
            group,
            keys + key_head * stride_key_head,
            table + slot * stride_table,
            start + tl.arange(0, TILE),
            last,
            scale,
            stride_block,
            stride_token,
            stride_depth,
            MEMBERS=MEMBERS,
            DEPTH=DEPTH,
            PADDED=PADDED,
            BLOCK_SIZE=BLOCK_SIZE,
            UPCAST=UPCAST,
        )
        higher = tl.maximum(best, tl.max(scores, axis=1))
        total = total * tl.exp(best - higher) + tl.sum(tl.exp(scores - higher[:, None]), axis=1)
        best = higher
    member = tl.arange(0, MEMBERS)
    at = (row * HEADS + key_head * GROUP + member) * SPLITS + split
    tl.store(largest + at, best, mask=member < GROUP)
    tl.store(sums + at, total, mask=member < GROUP)


@triton.jit
def _combine(
    largest,
    sums,
    lse,
    row_context,
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Program (row): log-sum-exp of each head over its splits. A context of 1 or more has keys in the first split."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(row_context + row) <= 0:
        return
    head = tl.arange(0, PADDED_HEADS)[:, None]
    at = (row * HEADS + head) * SPLITS + tl.arange(0, SPLITS)[None, :]
    best = tl.load(largest + at, mask=head < HEADS, other=0.0)
    total = tl.load(sums + at, mask=head < HEADS, other=1.0)
    top = tl.max(best, axis=1, keep_dims=True)
    value = top + tl.log(tl.sum(total * tl.exp(best - top), axis=1, keep_dims=True))
    tl.store(lse + row * HEADS + head, value, mask=head < HEADS)


@triton.jit
def _accumulate(
    query,
    keys,
    table,
    row_slot,
    row_context,
    prompt,
    lse,
    heads,
    rows,
    scale,
    stride_query_row,
    stride_query_head,
    stride_query_depth,
    stride_block,
    stride_key_head,
    stride_token,
    stride_depth,
    stride_table,
    stride_lse_row,
    stride_lse_head,
    stride_rows,
    KEY_HEADS: tl.constexpr,
    ADD: tl.constexpr,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    DEPTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program (row, tile of prompt positions): the weighted sum of all heads there, in one order."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * TILE
    context = tl.load(row_context + row)
    if context <= 0:
        return
    slot = tl.load(row_slot + row).to(tl.int64)
    width = tl.load(prompt + slot)
    if first >= width:
        return
    positions = first + tl.arange(0, TILE)
    member = tl.arange(0, MEMBERS)
    sums = tl.zeros([TILE], tl.float32)
    of_head = keys  # moved on as a pointer: a product with the stride could leave 32 bits
    for key_head in range(KEY_HEADS):
        group = _group_query(
            query + row * stride_query_row,
            stride_query_head,
            stride_query_depth,
            key_head,
            GROUP=GROUP,
            MEMBERS=MEMBERS,
            DEPTH=DEPTH,
            PADDED=PADDED,
        )
        scores = _scores(
            group,
            of_head,
            table + slot * stride_table,
            positions,
            tl.minimum(width, context),
            scale,
            stride_block,
            stride_token,
            stride_depth,
            MEMBERS=MEMBERS,
            DEPTH=DEPTH,
            PADDED=PADDED,
            BLOCK_SIZE=BLOCK_SIZE,
            UPCAST=UPCAST,
        )
        head = key_head * GROUP + member
        norm = tl.load(lse + row * stride_lse_row + head * stride_lse_head, mask=member < GROUP, other=0.0)
        weight = tl.load(heads + head, mask=member < GROUP, other=0.0)
        sums += tl.sum(weight[:, None] * tl.exp(scores - norm[:, None]), axis=0)
        of_head += stride_key_head
    at = rows + row * stride_rows + positions
    if ADD:
        sums += tl.load(at, mask=positions < width, other=0.0)
    tl.store(at, sums, mask=positions < width)


@triton.jit
def _reduce(
    rows,
    row_slot,
    row_token,
    row_context,
    prompt,
    content,
    salient,
    statistics,
    dense,
    total,
    width,
    stride_rows,
    stride_content,
    stride_salient,
    stride_slot,
    stride_row,
    stride_dense,
    DENSE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (row): the four numbers. What is not finite stays so, and fails the sample where it is scored."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(row_context + row) <= 0:
        return
    slot = tl.load(row_slot + row).to(tl.int64)
    token = tl.load(row_token + row).to(tl.int64)
    length = tl.load(prompt + slot)
    mass = tl.zeros([TILE], tl.float32)
    salient_mass = tl.zeros([TILE], tl.float32)
    neg_entropy = tl.zeros([TILE], tl.float32)
    peak = tl.zeros([TILE], tl.float32)
    for start in range(0, length, TILE):
        at = start + tl.arange(0, TILE)
        known = at < length
        value = tl.load(rows + row * stride_rows + at, mask=known, other=0.0) / total
        inside = value * tl.load(content + slot * stride_content + at, mask=known, other=0.0)
        mass += inside
        salient_mass += value * tl.load(salient + slot * stride_salient + at, mask=known, other=0.0)
        neg_entropy += tl.where(inside == 0.0, 0.0, inside * tl.log(tl.where(inside == 0.0, 1.0, inside)))
        peak = tl.maximum(peak, inside)
        if DENSE:
            tl.store(dense + row * stride_dense + at, value, mask=known)
    if DENSE:
        for start in range(0, width, TILE):
            at = start + tl.arange(0, TILE)
            tl.store(dense + row * stride_dense + at, tl.zeros([TILE], tl.float32), mask=(at >= length) & (at < width))
    to = statistics + slot * stride_slot + token * stride_row
    tl.store(to, tl.sum(mass, axis=0))
    tl.store(to + 1, tl.sum(salient_mass, axis=0))
    tl.store(to + 2, tl.sum(neg_entropy, axis=0))
    tl.store(to + 3, tl.max(peak, axis=0))
