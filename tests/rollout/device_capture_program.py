"""Steps by hand through `DeviceCapture`, in Triton's interpreter: what a model runner would do to two requests that
are captured and one that is not. Run with TRITON_INTERPRET=1. Prints what came of three runs, as JSON.

"by hand": the layers run. "replayed": their launches were recorded once, over no rows, and run again each time, as a
CUDA graph does. "ranks": each of two ranks has half of the heads.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rollout.vllm_capture import triton_kernels
from rollout.vllm_capture.buffers import LayerShape
from rollout.vllm_capture.device_capture import DeviceCapture
from rollout.vllm_capture.placed_rows import StepTensors
from rollout.vllm_capture.reference import reference_row, reference_scores, reference_statistics
from rollout.vllm_capture.request import CaptureRequest

SLOTS, LONGEST, BLOCK, DEPTH, TOKENS = 3, 64, 16, 32, 32
SHAPES = [LayerShape(name, 4, 2, DEPTH, DEPTH**-0.5, (0.5, 1.0, 0.0, 2.0)) for name in ("first", "last")]
TOTAL = 7.0
PROMPTS = {"a": 20, "b": 5, "c": 9}


class Runner:
    """Queries and keys of every request at every position, a paged cache, and the tensors of a batch; a rank's `groups`
    are its key heads."""

    def __init__(self, groups: slice = slice(0, 2), reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        random = torch.Generator().manual_seed(4)
        self.queries = {id: torch.randn(2, LONGEST, 4, DEPTH, generator=random) for id in PROMPTS}
        self.keys = {id: torch.randn(2, LONGEST, 2, DEPTH, generator=random) for id in PROMPTS}
        self.drafted = torch.randn(2, 4, DEPTH, generator=random)
        each = LONGEST // BLOCK
        self.groups, self.heads = groups, slice(2 * groups.start, 2 * groups.stop)
        count = groups.stop - groups.start
        # Keys and values side by side, a block's tokens before its heads.
        self.caches = torch.full((2, SLOTS * each, BLOCK, count, 2 * DEPTH), torch.nan).transpose(2, 3)
        self.table = torch.randperm(SLOTS * each, generator=random).view(SLOTS, each).to(torch.int32)
        self.held = torch.zeros(SLOTS, dtype=torch.int32)
        self.batch = torch.zeros((2, TOKENS, 2 * count, DEPTH))
        self.capture = DeviceCapture(
            [
                replace(shape, query_heads=2 * count, key_heads=count, weights=shape.weights[self.heads])
                for shape in SHAPES
            ],
            [self.table, self.table],
            total=TOTAL,
            dtype=torch.float32,
            slots=SLOTS,
            drafts=1,
            longest=LONGEST,
            device=torch.device("cpu"),
            reduce=reduce,
        )
        self.slots: dict[str, int] = {}
        self.run: Callable[[], None] = self.layers

    def layers(self) -> None:
        for layer, shape in enumerate(SHAPES):
            self.capture.attend_layer(shape.name, self.batch[layer], self.caches[layer][..., :DEPTH])

    def enter(self, id: str, slot: int, held: int) -> None:
        self.slots[id] = slot
        self.held[slot] = held
        self.capture.enter(id, slot, PROMPTS[id], 8, wish(id))

    def idle(self) -> None:
        """A step of one token that belongs to nobody, as other ranks may need it."""
        self.capture.place_none(1)
        for layer, shape in enumerate(SHAPES):
            self.capture.attend_layer(shape.name, self.batch[layer, :1], self.caches[layer][..., :DEPTH])
        self.capture.keep_dense()

    def step(
        self, scheduled: list[tuple[str, int, int]], *, rejected: tuple[str, ...] = (), anew: bool = False
    ) -> None:
        """Computes [start, end) of each request. The last token of `rejected` is a draft that is not kept; `anew`:
        other queries than before at positions whose rows are written already."""
        starts, lengths, token = [0], [], 0
        self.batch.fill_(torch.nan)
        for id, start, end in scheduled:
            queries, keys = self.queries[id][:, start:end].clone(), self.keys[id][:, start:end].clone()
            if anew:
                queries[:, : max(0, int(self.held[self.slots[id]]) - 1 - start)] += 3.0
            if id in rejected:
                queries[:, -1] = self.drafted
                keys[:, -1] += 1.0
            self.batch[:, token : token + end - start] = queries[:, :, self.heads]
            positions = torch.arange(start, end)
            blocks = self.table[self.slots[id]][positions // BLOCK].long()
            for layer in range(2):
                self.caches[layer][blocks, :, positions % BLOCK, :DEPTH] = keys[layer][:, self.groups]
            token += end - start
            starts.append(token)
            lengths.append(end)
        slots = np.array([self.slots[id] for id, _, _ in scheduled])
        step = StepTensors(torch.from_numpy(slots), torch.tensor(starts).int(), torch.tensor(lengths).int(), self.held)
        self.capture.place(step, slots, np.array(lengths))
        self.run()
        self.capture.keep_dense()


def wish(id: str) -> CaptureRequest | None:
    if id == "c":
        return None
    prompt = PROMPTS[id]
    return CaptureRequest(id, tuple(range(1, prompt)), (2, prompt - 1), (0.5, 1.5), dense=id == "a")


def recorded(runner: Runner) -> Callable[[], None]:
    """What the layers launch in a step without rows, to be run again on whatever the tensors hold by then."""
    calls: list[Callable[[], Any]] = []
    launch, select = triton_kernels._launch, torch.index_select

    def recording(call: Any) -> Any:
        def remembered(*args: Any, **kwargs: Any) -> Any:
            calls.append(lambda: call(*args, **kwargs))
            return call(*args, **kwargs)

        return remembered

    triton_kernels._launch, torch.index_select = recording(launch), recording(select)
    runner.capture.place_none(SLOTS)
    runner.layers()
    triton_kernels._launch, torch.index_select = launch, select

    def replay() -> None:
        for call in calls:
            call()

    return replay


def expected(runner: Runner, id: str, tokens: int) -> tuple[Tensor, Tensor]:
    """Statistics [T, 4] and rows [T, P] in float64."""
    prompt, asked = PROMPTS[id], wish(id)
    assert asked is not None
    content, salient = torch.zeros(prompt), torch.zeros(prompt)
    content[list(asked.content)] = 1.0
    salient[list(asked.salient)] = torch.tensor(asked.salient_weights)
    rows: list[Tensor] = []
    for position in range(prompt - 1, prompt - 1 + tokens):
        row = torch.zeros(prompt, dtype=torch.float64)
        for layer, shape in enumerate(SHAPES):
            paged = runner.keys[id][layer].unflatten(0, (-1, BLOCK)).transpose(1, 2)
            blocks = torch.arange(len(paged))
            scores = reference_scores(runner.queries[id][layer, position], paged, blocks, position + 1, shape.scale)
            row += reference_row(scores, torch.tensor(shape.weights), prompt, prompt) / TOTAL
        rows.append(row)
    return torch.stack([reference_statistics(row, content, salient) for row in rows]), torch.stack(rows)


def of_two_ranks() -> dict[str, Any]:
    """The second rank runs through first; the first one then adds what the other had at each of its sums."""
    kept: list[Tensor] = []

    def keep(sums: Tensor) -> Tensor:
        kept.append(sums.clone())
        return sums

    outcome(Runner(slice(1, 2), keep))
    others = iter(kept)
    return outcome(Runner(slice(0, 1), lambda sums: sums + next(others)))


def replayed(runner: Runner) -> Runner:
    runner.run = recorded(runner)
    return runner


def outcome(runner: Runner) -> dict[str, Any]:
    runner.enter("a", 2, PROMPTS["a"])
    runner.enter("b", 0, PROMPTS["b"])
    runner.step([("b", 0, 5), ("a", 0, 16)])
    runner.held[0] = 6
    runner.idle()
    runner.step([("b", 5, 7), ("a", 16, 20)], rejected=("b",))
    runner.held[0], runner.held[2] = 7, 21
    runner.step([("b", 6, 8), ("a", 20, 21)])
    runner.capture.leave("a")  # preempted, with two tokens
    runner.enter("c", 2, PROMPTS["c"])
    runner.held[0] = 9
    runner.step([("b", 8, 9), ("c", 0, 9)])
    runner.capture.leave("c")
    runner.capture.finish(["b", "c"])
    runner.enter("a", 1, 22)
    runner.step([("a", 0, 10)], anew=True)
    runner.step([("a", 10, 22)], anew=True)
    lengths = {"a": 3, "b": 5}
    fetched = dict(zip(lengths, runner.capture.pop(list(lengths), list(lengths.values())), strict=True))
    errors = {"statistics": 0.0, "dense": 0.0}
    for id, found in fetched.items():
        statistics, rows = expected(runner, id, lengths[id])
        errors["statistics"] = max(
            errors["statistics"], float((torch.tensor(found.statistics) - statistics).abs().max())
        )
        if found.dense is not None:
            errors["dense"] = max(errors["dense"], float((torch.tensor(found.dense) - rows).abs().max()))
    refused: list[str] = []
    for keys, tokens in ((["b"], [5]), (["a"], [3])):
        try:
            runner.capture.pop(keys, tokens)
        except KeyError as error:
            refused.append(str(error))
    return {
        "errors": errors,
        "dense": sorted(id for id, found in fetched.items() if found.dense is not None),
        "bits": [found.statistics.tobytes().hex() for found in fetched.values()],
        "preempted": runner.capture.preempted,
        "refused": refused,
    }


if __name__ == "__main__":
    print(json.dumps({"by hand": outcome(Runner()), "replayed": outcome(replayed(Runner())), "ranks": of_two_ranks()}))
