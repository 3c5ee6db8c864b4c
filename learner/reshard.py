"""A checkpoint of N ranks, as M ranks would have written it.

ZeRO-3 cuts every parameter into as many equal parts as there are ranks, the last one padded; a rank's file holds its
parts one after the other, in the order of the parameters, and the optimiser's moments cut alike. So the parts of all
ranks put together are the parameter, bit for bit, and may be cut again. Each of the M ranks reads all N files (mapped,
not copied), cuts what is its own, and writes the files that DeepSpeed then loads as ever.
"""

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learner.commit import RESHARDED

TAG = "engine"
MOMENTS = ("exp_avg", "exp_avg_sq")


@contextmanager
def resharded(directory: str | Path, engine: Any, optimizer: Any) -> Iterator[str]:
    """For the block, a directory with the engine's part of the checkpoint as this many ranks would have it.

    Collective. `engine` and `optimizer` are DeepSpeed's.
    """
    source = Path(directory)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    target = source.with_name(RESHARDED.format(source.name, ranks))
    if rank == 0:
        for left_over in source.parent.glob(RESHARDED.format("step_*", "*")):  # of ranks that were killed as they read
            shutil.rmtree(left_over, ignore_errors=True)
        (target / TAG).mkdir(parents=True)
    torch.distributed.barrier()
    try:
        _write_part(source, str(target), engine, optimizer, rank, ranks)
        torch.distributed.barrier()
        yield str(target)
        torch.distributed.barrier()
    finally:
        if rank == 0:
            shutil.rmtree(target, ignore_errors=True)


def _write_part(source: Path, target: str, engine: Any, optimizer: Any, rank: int, ranks: int) -> None:
    models = _saved(source, "model_states")
    states = _saved(source, "optim_states")
    shapes = {name: shape for group in models[0]["param_shapes"] for name, shape in group.items()}
    groups = [[engine.param_names[parameter] for parameter in group] for group in optimizer.fp16_groups]
    order = [name for group in groups for name in group]
    if order != list(shapes):
        raise ValueError(f"{source}: the parameters saved are not those of the model: {sorted({*order} ^ {*shapes})}")
    whole = [_Whole(state["optimizer_state_dict"], shapes) for state in states]
    state = states[0]
    zero = state["optimizer_state_dict"]

    def cut(key: str) -> list[Tensor]:
        parts = {
            name: part_of([each.parts(key)[name] for each in whole], math.prod(shape), rank, ranks)
            for name, shape in shapes.items()
        }
        return [torch.cat([parts[name] for name in group]) for group in groups]

    zero["fp32_flat_groups"] = cut("weights")
    saved = zero["optimizer_state_dict"]
    moments = {key: cut(key) for key in MOMENTS} if saved["state"] else {}
    group_of = [optimizer.sub_group_to_group_id[flat] for flat in range(len(groups))]
    saved["state"], saved["param_groups"] = _numbered(saved, moments, group_of)
    zero["partition_count"] = ranks
    torch.save(state, engine._get_zero_ckpt_name(target, TAG))
    model: dict[str, Any] = models[0] | {"dp_world_size": ranks}
    if frozen := model.get("frozen_param_shapes"):
        model["frozen_param_fragments"] = {
            name: part_of([each["frozen_param_fragments"][name] for each in models], math.prod(shape), rank, ranks)
            for name, shape in frozen.items()
        }
    torch.save(model, engine._get_ckpt_name(target, TAG))


class _Whole:
    """One saved rank's parts: of the weights (float32) and of each moment, by parameter."""

    def __init__(self, zero: dict[str, Any], shapes: dict[str, Any]) -> None:
        state = zero["optimizer_state_dict"]["state"]
        flat = {"weights": zero["fp32_flat_groups"], **{key: [state[i][key] for i in sorted(state)] for key in MOMENTS}}
        ranks = int(zero["partition_count"])
        sizes = [math.ceil(math.prod(shape) / ranks) for shape in shapes.values()]
        self._parts = {
            key: dict(zip(shapes, torch.cat([t.reshape(-1) for t in tensors]).split(sizes), strict=True))
            for key, tensors in flat.items()
            if tensors
        }

    def parts(self, key: str) -> dict[str, Tensor]:
        return self._parts[key]


def part_of(parts: Sequence[Tensor], numel: int, rank: int, ranks: int) -> Tensor:
    """The part of a parameter of `numel` elements that `rank` of `ranks` holds, from all parts of another number of
    ranks; padded with zeros."""
    size = math.ceil(numel / ranks)
    mine = torch.cat([part.reshape(-1) for part in parts])[:numel][rank * size : (rank + 1) * size]
    return torch.nn.functional.pad(mine, (0, size - mine.numel()))


def _numbered(saved: dict[str, Any], moments: dict[str, list[Tensor]], group_of: Sequence[int]) -> tuple[Any, Any]:
    """The optimiser's state by number, and its groups with the numbers in them, as torch has them."""
    of_group = [[flat for flat, group in enumerate(group_of) if group == g] for g in range(len(saved["param_groups"]))]
    state: dict[int, Any] = {}
    groups: list[Any] = []
    for group, flats in zip(saved["param_groups"], of_group, strict=True):
        numbers = range(len(state), len(state) + len(flats))
        groups.append({**group, "params": list(numbers)})
        if moments:
            step = saved["state"][group["params"][0]]["step"]
            state |= {
                number: {"step": step, **{key: moments[key][flat] for key in MOMENTS}}
                for number, flat in zip(numbers, flats, strict=True)
            }
    return state, groups


def _saved(source: Path, kind: str) -> list[dict[str, Any]]:
    """The files of a kind, in the order of the ranks that wrote them."""
    files = (source / TAG).glob(f"*_{kind}.pt")
    ranked = {int(path.name.split("pp_rank_")[1].split("_")[0]): path for path in files}
    # DeepSpeed's own format, which it reads the same way; its files were verified when the commit was read.
    return [torch.load(path, map_location="cpu", mmap=True, weights_only=False) for _, path in sorted(ranked.items())]
