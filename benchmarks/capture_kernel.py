"""The GPU kernels of the attention capture: right against float64, then timed against the bytes that they move.

Parity: ragged batches with rows that are not there, grouped queries, two layers summed, every physical order of the
cache, in float32, bfloat16 and float16; the bounds are the specification's. Whatever no row may read is NaN, whatever
no row may write is compared afterwards. A bound that is missed ends the program with exit code 1 and the figure.

On a CUDA device the kernels are timed too, launched one by one and from a CUDA graph, and their bandwidth is held
against a copy's. Without one they run in Triton's interpreter (`"interpreter": true`), and there are no times.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Options, finish, parse_options

NAME = "capture_kernel"
STATISTICS = ("mass", "salient_mass", "neg_entropy_sum", "peak")
BOUNDS = {"float32": (1e-5, 1e-4), "bfloat16": (1e-4, 1e-3), "float16": (1e-4, 1e-3)}
"""Largest absolute error of (M, C, X and the dense rows; h), by the type of queries and keys."""
LAYOUTS = ("heads first", "tokens first", "interleaved", "interleaved, tokens first", "depth first")
UNWRITTEN = -7.0


@dataclass(frozen=True)
class Case:
    """`contexts`: keys of each row, 0 for a row that is not there."""

    dtype: torch.dtype
    group: int
    depth: int
    key_heads: int
    block_size: int
    layout: str
    contexts: tuple[int, ...]
    splits: int = 4


@dataclass(frozen=True)
class Layer:
    query: Tensor
    keys: Tensor
    heads: Tensor


@dataclass(frozen=True)
class Problem:
    """`rows` and `slots` are those of `triton_kernels`."""

    case: Case
    layers: list[Layer]
    rows: Any
    slots: Any
    scale: float
    total: float


def main() -> None:
    options = parse_options(NAME, "Parity, time and bandwidth of the Triton kernels of the attention capture.")
    interpreter = not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    if interpreter:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined, so before their import
    results, missed = measure(options, torch.device("cpu" if interpreter else "cuda"))
    finish(NAME, options, results)
    if missed:
        raise SystemExit("\n".join(missed))


def measure(options: Options, device: torch.device) -> tuple[dict[str, Any], list[str]]:
    """The results, and a line for every bound that was missed."""
    from rollout.vllm_capture.triton_kernels import INTERPRETED

    found = cases(quick=options.quick)
    errors: dict[str, dict[str, float]] = {}
    missed: list[str] = []
    for number, case in enumerate(found):
        of_case, wrong = parity(build(case, device, seed=number))
        missed += [f"{case}: {each}" for each in wrong]
        into = errors.setdefault(str(case.dtype).removeprefix("torch."), dict.fromkeys(of_case, 0.0))
        for what, error in of_case.items():
            into[what] = max(into[what], error)
    results: dict[str, Any] = {
        "interpreter": INTERPRETED,
        "cases": len(found),
        "rows": sum(len(case.contexts) for case in found),
        "errors": errors,
        "bounds": {dtype: {"statistics": bounds[0], "entropy": bounds[1]} for dtype, bounds in BOUNDS.items()},
        "max_error": max(error for of_type in errors.values() for error in of_type.values()),
        "bandwidth_share": None,  # nothing is measured in the interpreter
        "missed": len(missed),
    }
    if device.type == "cuda":
        results.update(timings(options, missed))
        results["bandwidth_share"] = results["graph_share_of_copy"]
    return results, missed


def cases(*, quick: bool) -> list[Case]:
    """Every group, type and common depth; layouts, block sizes and numbers of splits in turn."""
    contexts = (1, 0, 70) if quick else (2000, 0, 1, 16, 0, 33, 517, 1024)
    found = [
        Case(
            dtype,
            group,
            depth,
            1 + number % 3,
            (16, 32)[(number // 2 + number // 4) % 2],
            LAYOUTS[(number + number // 5) % 5],
            contexts,
        )
        for number, (group, depth, dtype) in enumerate(
            (group, depth, dtype)
            for group in (1, 2, 4, 8)
            for depth in (64, 128)
            for dtype in (torch.float32, torch.bfloat16)
        )
    ]
    if quick:
        found = found[::5]  # every group, layout but one, and both of everything else
    return [
        *found,
        Case(torch.float32, 3, 80, 2, 16, "interleaved", contexts, splits=2),
        Case(torch.bfloat16, 1, 32, 1, 16, "depth first", contexts, splits=8),
        Case(torch.float16, 5, 96, 1, 32, "heads first", contexts, splits=1),
        Case(torch.float32, 1, 256, 1, 16, "interleaved, tokens first", contexts, splits=2),
    ]


def build(case: Case, device: torch.device, *, seed: int) -> Problem:
    """Random tensors of a case, two layers: keys of no context are NaN, and so are the values beside the keys."""
    from rollout.vllm_capture.triton_kernels import RowTensors, SlotTensors

    generator = torch.Generator().manual_seed(seed)
    rows = len(case.contexts)
    slot = torch.randperm(rows + 1, generator=generator)[:rows]  # one slot has no row
    token = torch.randint(0, 4, (rows,), generator=generator)
    width = max(case.contexts) + 3
    prompt = torch.zeros(rows + 1, dtype=torch.int32)
    content, salient = torch.full((rows + 1, width), math.nan), torch.full((rows + 1, width), math.nan)
    for where, context in zip(slot.tolist(), case.contexts, strict=True):
        prompt[where] = length = _between(1, context, generator) if context else 0
        chosen = (torch.rand(length, generator=generator) < 0.8).float()
        chosen[:1] = 1.0
        weights = chosen * torch.rand(length, generator=generator) * (torch.rand(length, generator=generator) < 0.3)
        content[where, :length] = chosen
        salient[where, :length] = weights * (weights > 0).sum() / weights.sum().clamp(min=1e-6)
    table, blocks = _block_table(case, slot, generator)
    heads = case.group * case.key_heads
    layers = [
        Layer(
            (2.0 * torch.randn(rows, heads, case.depth, generator=generator)).to(device, case.dtype),
            _paged_keys(case, slot, table, blocks, generator).to(device),
            torch.rand(heads, generator=generator).to(device),
        )
        for _ in range(2)
    ]
    layers[0].heads[0] = 0.0
    return Problem(
        case,
        layers,
        RowTensors(*(each.to(device, torch.int32) for each in (slot, token, torch.tensor(case.contexts)))),
        SlotTensors(
            table.to(device),
            prompt.to(device),
            content.to(device),
            salient.to(device),
            torch.full((rows + 1, 4, 4), UNWRITTEN, device=device),
        ),
        case.depth**-0.5,
        float(sum(layer.heads.sum() for layer in layers)),
    )


def _between(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _block_table(case: Case, slot: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
    """Blocks in random order, [slots, most blocks] int32, and their number; absurd where no row may follow them."""
    needed = [-(-context // case.block_size) for context in case.contexts]
    free = torch.randperm(sum(needed) + 2, generator=generator).tolist()
    table = torch.full((len(needed) + 1, max(needed) + 1), 2**30, dtype=torch.int32)
    for where, count in zip(slot.tolist(), needed, strict=True):
        table[where, :count] = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
    return table, sum(needed) + 2


def _paged_keys(case: Case, slot: Tensor, table: Tensor, blocks: int, generator: torch.Generator) -> Tensor:
    """Keys [blocks, Hkv, block size, D] as a view of a cache in the physical order of the case."""
    heads, size, depth = case.key_heads, case.block_size, case.depth
    doubled = 2 * depth if "interleaved" in case.layout else depth
    if "tokens first" in case.layout:
        cache = torch.full((blocks, size, heads, doubled), math.nan, dtype=case.dtype).transpose(1, 2)
    elif case.layout == "depth first":
        cache = torch.full((blocks, heads, doubled, size), math.nan, dtype=case.dtype).transpose(2, 3)
    else:
        cache = torch.full((blocks, heads, size, doubled), math.nan, dtype=case.dtype)
    keys = cache[..., :depth]
    for where, context in zip(slot.tolist(), case.contexts, strict=True):
        positions = torch.arange(context)
        paged = table[where, positions // size].long()
        keys[paged, :, positions % size] = torch.randn(context, heads, depth, generator=generator).to(case.dtype)
    return keys


def run(problem: Problem, space: Any, dense: Tensor, lse: list[Tensor] | None = None) -> None:
    """The kernels over both layers; the log-sum-exp of each is computed unless it is given."""
    from rollout.vllm_capture.triton_kernels import accumulate_rows, reduce_rows

    for number, layer in enumerate(problem.layers):
        accumulate_rows(
            space,
            problem.rows,
            problem.slots,
            *(layer.query, layer.keys, layer.heads, problem.scale),
            add=number > 0,
            lse=None if lse is None else lse[number],
        )
    reduce_rows(space, problem.rows, problem.slots, problem.total, dense=dense)


def parity(problem: Problem) -> tuple[dict[str, float], list[str]]:
    """The largest error in each statistic, in h and in the dense rows; and what was wrong, a line each."""
    expected, expected_dense, lse = reference(problem)
    case, slots = problem.case, problem.slots
    wrong: list[str] = []
    outcomes: list[tuple[Tensor, Tensor]] = []
    # The second time to see the same bits again; the third with the log-sum-exp given, [H, R] as FlashAttention does.
    for given in (None, None, lse):
        space = scratch(problem)
        slots.statistics.fill_(UNWRITTEN)
        dense = torch.full((len(case.contexts), slots.content.shape[1]), UNWRITTEN, device=slots.content.device)
        run(problem, space, dense, given)
        outcomes.append((slots.statistics.clone(), dense))
    if not all(torch.equal(first, second) for first, second in zip(outcomes[0], outcomes[1], strict=True)):
        wrong.append("two runs differ in their bits")
    errors: dict[str, float] = {}
    for statistics, dense in (outcomes[0], outcomes[2]):
        for what, error in _errors(problem, statistics, dense, expected, expected_dense).items():
            errors[what] = max(errors.get(what, 0.0), error)
        if not _only_its_own_rows(problem, statistics, dense):
            wrong.append("something was written where no row is")
    bound, entropy_bound = BOUNDS[str(case.dtype).removeprefix("torch.")]
    for what in ("mass", "salient_mass", "peak", "dense", "entropy"):
        limit = entropy_bound if what == "entropy" else bound
        if errors[what] > limit:
            wrong.append(f"error of {what} is {errors[what]:.3g}, over {limit:.0e}")
    if any(not math.isfinite(error) for error in errors.values()):
        raise SystemExit(f"{case}: {wrong}")  # a result with such a figure could not be printed
    return errors, wrong


def reference(problem: Problem) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Statistics [R, 4] and A [R, W] in float64, and each layer's log-sum-exp, float32 [R, H] laid out as [H, R]."""
    from rollout.vllm_capture.reference import reference_row, reference_scores, reference_statistics

    slots, count, width = problem.slots, len(problem.case.contexts), problem.slots.content.shape[1]
    dense = torch.zeros((count, width), dtype=torch.float64, device=slots.content.device)
    statistics = dense.new_zeros((count, 4))
    lse = [torch.zeros_like(layer.query[..., 0], dtype=torch.float32).T.contiguous().T for layer in problem.layers]
    for row, (slot, context) in enumerate(zip(problem.rows.slot.tolist(), problem.case.contexts, strict=True)):
        if not context:
            continue
        prompt = int(slots.prompt[slot])
        for number, layer in enumerate(problem.layers):
            scores = reference_scores(layer.query[row], layer.keys, slots.block_table[slot], context, problem.scale)
            lse[number][row] = torch.logsumexp(scores, dim=-1).float()
            dense[row] += reference_row(scores, layer.heads, prompt, width) / problem.total
        content, salient = (torch.nan_to_num(each[slot]) for each in (slots.content, slots.salient))
        statistics[row] = reference_statistics(dense[row], content, salient)
    return statistics, dense, lse


def scratch(problem: Problem) -> Any:
    """For one row and one head more than there are, full of NaN: nothing may be read before it is written."""
    from rollout.vllm_capture.triton_kernels import workspace

    count, heads = problem.layers[0].query.shape[:2]
    content = problem.slots.content
    space = workspace(
        rows=count + 1, heads=heads + 1, width=content.shape[1], device=content.device, splits=problem.case.splits
    )
    for each in (space.rows, space.lse, space.largest, space.sums):
        each.fill_(math.nan)
    return space


def _errors(
    problem: Problem, statistics: Tensor, dense: Tensor, expected: Tensor, expected_dense: Tensor
) -> dict[str, float]:
    from rollout.vllm_capture.reference import entropies

    there = problem.rows.context > 0
    found = statistics[problem.rows.slot.long(), problem.rows.token.long()][there].double()
    expected = expected[there]
    pairs = {what: (found[:, i], expected[:, i]) for i, what in enumerate(STATISTICS)}
    pairs["entropy"] = (entropies(found), entropies(expected))
    pairs["dense"] = (dense[there].double(), expected_dense[there])
    # NaN as infinite: `max` of Python would pass over it.
    return {what: float((a - b).abs().nan_to_num(nan=math.inf).max()) for what, (a, b) in pairs.items()}


def _only_its_own_rows(problem: Problem, statistics: Tensor, dense: Tensor) -> bool:
    there = problem.rows.context > 0
    rest = statistics.clone()
    rest[problem.rows.slot[there].long(), problem.rows.token[there].long()] = UNWRITTEN
    return bool((rest == UNWRITTEN).all()) and bool((dense[~there] == UNWRITTEN).all())


def timings(options: Options, missed: list[str]) -> dict[str, Any]:
    """Microseconds of one captured layer and its statistics in a decode step, its bytes, and the device's own copy."""
    rows, prompt, context = (16, 1024, 1536) if options.quick else (64, 1024, 1536)
    case = Case(torch.bfloat16, 4, 128, 8, 16, "interleaved", (context,) * rows, splits=16)
    problem = build(case, torch.device("cuda"), seed=0)
    problem.slots.prompt.fill_(prompt)
    problem.slots.content.fill_(1.0)
    problem.slots.salient.fill_(0.5)
    problem = replace(problem, layers=problem.layers[:1])
    space, repeats = scratch(problem), 20 if options.quick else 100
    layer = problem.layers[0]
    from rollout.vllm_capture.triton_kernels import accumulate_rows, reduce_rows

    lse = torch.full(layer.query.shape[:2], 8.0, device="cuda")  # any value costs the same time

    def step(given: Tensor | None) -> None:
        arguments = (layer.query, layer.keys, layer.heads, problem.scale)
        accumulate_rows(space, problem.rows, problem.slots, *arguments, lse=given)
        reduce_rows(space, problem.rows, problem.slots, problem.total)

    copied = copy_bytes_per_s(repeats)
    results: dict[str, Any] = {
        "shape": f"{rows} rows, 32 heads on 8, depth 128, bfloat16, prompt {prompt}, context {context}",
        "copy_gb_per_s": copied / 1e9,
    }
    for name, given in (("", None), ("_lse_given", lse)):
        moved = bytes_moved(problem, prompt, lse_given=given is not None)
        launched_s = seconds(lambda given=given: step(given), repeats)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(given)
        # Other queries and a row less than were recorded: a replay reads what the tensors hold by then.
        layer.query.copy_(layer.query.flip(0))
        problem.slots.statistics.fill_(UNWRITTEN)
        problem.rows.context[0] = 0
        graph.replay()
        replayed = problem.slots.statistics.clone()
        problem.slots.statistics.fill_(UNWRITTEN)
        step(given)
        if not torch.equal(problem.slots.statistics, replayed):
            missed.append(f"CUDA graph{name}: statistics differ from those of single launches")
        problem.rows.context[0] = context
        graph_s = seconds(graph.replay, repeats)
        results |= {
            f"bytes{name}": moved,
            f"launched_us{name}": 1e6 * launched_s,
            f"graph_us{name}": 1e6 * graph_s,
            f"graph_gb_per_s{name}": moved / graph_s / 1e9,
            f"graph_share_of_copy{name}": moved / graph_s / copied,
        }
    results["missed"] = len(missed)
    return results


def bytes_moved(problem: Problem, prompt: int, *, lse_given: bool) -> int:
    """What must cross the memory bus: keys once for the log-sum-exp and the prompt's once more; queries, both key sets,
    A written and read, statistics."""
    case, rows = problem.case, len(problem.case.contexts)
    query = problem.layers[0].query
    key = case.key_heads * case.depth * query.element_size()
    read = rows * prompt * key + query.nbytes
    if not lse_given:
        read += sum(case.contexts) * key + query.nbytes
    return read + 4 * rows * (4 * prompt + 4)


def copy_bytes_per_s(repeats: int) -> float:
    """Bytes read and written by a large copy, a second."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), repeats)


def seconds(action: Callable[[], object], repeats: int) -> float:
    """Median time on the device of one call, after a few that are not counted."""
    for _ in range(5):
        action()
    found: list[float] = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        action()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1000)
    return median(found)


if __name__ == "__main__":
    main()
