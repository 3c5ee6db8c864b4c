"""Weights out of the ZeRO-3 partitions: published for the rollouts, or exported as a model directory.

Parameters are gathered a bucket at a time on all ranks, and rank 0 writes each bucket before the next is gathered: the
memory this takes is one bucket, never a second copy of the model. Only the language model leaves, under the names of
its Hugging Face state dict, tied weights once; the value function stays in checkpoints.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from learner.engine import Engine
from learner.lora import adapters_of, plain_name
from services.records import PolicyVersion, WeightsBucket
from services.transfer.packing import TensorMeta
from services.weights import write_bucket, write_manifest

BUCKET_BYTES = 256 * 2**20
"""What is gathered at once where no recipe says (`cluster.bucket_mib`): few collectives, little beside a partition."""


def buckets_of(sizes: Sequence[tuple[str, int]], bucket_bytes: int) -> list[list[str]]:
    """Names in order, cut so that a bucket holds at most `bucket_bytes`; what is larger alone has one of its own."""
    buckets: list[list[str]] = []
    filled = 0
    for name, size in sizes:
        if buckets and filled + size <= bucket_bytes:
            buckets[-1].append(name)
            filled += size
        else:
            buckets.append([name])
            filled = size
    return buckets


def published_tensors(lm: nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once) and persistent buffers by name: what a model directory holds, partitioned or not.

    Weights that have adapters are under their own names, without what the adapters add.
    """
    named: dict[str, Tensor] = dict(lm.named_parameters())
    every = {name for name, _ in lm.named_parameters(remove_duplicate=False)}
    buffers = dict(lm.named_buffers())
    named |= {name: buffers[name] for name in lm.state_dict() if name not in every and name in buffers}
    return {plain: tensor for name, tensor in named.items() if (plain := plain_name(name)) is not None}


class Zero3Source:
    """The language model's weights out of the partitions, adapters merged, in buckets; may be gone through any number
    of times, always the same tensors in the same order.
    """

    def __init__(self, engine: Engine, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._named = published_tensors(engine.lm)
        self._adapters = adapters_of(engine.lm)
        self._bucket_bytes = bucket_bytes

    def metadata(self) -> list[TensorMeta]:
        """Names, types and whole shapes. Nothing is gathered, nothing collective."""
        return [
            TensorMeta(name, tensor.dtype, tuple(getattr(tensor, "ds_shape", tensor.shape)))
            for name, tensor in self._named.items()
        ]

    def plan(self) -> list[list[TensorMeta]]:
        """`metadata`, cut into buckets."""
        metas = {meta.name: meta for meta in self.metadata()}
        sizes = [(name, meta.bytes) for name, meta in metas.items()]
        return [[metas[name] for name in names] for names in buckets_of(sizes, self._bucket_bytes)]

    def buckets(self) -> Iterator[dict[str, Tensor]]:
        """The buckets of the plan; the tensors live until the next is asked for. Collective."""
        from deepspeed import zero

        for bucket in self.plan():
            adapted = {meta.name: self._adapters[meta.name] for meta in bucket if meta.name in self._adapters}
            needed = [self._named[meta.name] for meta in bucket]
            needed += [part for adapter in adapted.values() for part in (adapter.down, adapter.up)]
            apart = [tensor for tensor in needed if _partitioned(tensor)]
            with zero.GatheredParameters(apart, enabled=bool(apart)):
                plain = {meta.name: self._named[meta.name].data for meta in bucket}
                yield plain | {
                    name: (plain[name].float() + adapter.change()).to(plain[name].dtype)
                    for name, adapter in adapted.items()
                }


def publish(engine: Engine, version: PolicyVersion, directory: str | Path, bucket_bytes: int = BUCKET_BYTES) -> str:
    """Publishes the weights in `directory` (emptied first) and returns the path of their manifest. Collective."""
    path = Path(directory)
    if engine.rank == 0:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    buckets: list[WeightsBucket] = []
    for index, tensors in enumerate(Zero3Source(engine, bucket_bytes).buckets()):
        if engine.rank == 0:
            buckets.append(write_bucket(path, index, tensors))
    return str(write_manifest(path, version, buckets)) if engine.rank == 0 else str(path)


def export(engine: Engine, tokenizer: Any, directory: str | Path, bucket_bytes: int = BUCKET_BYTES) -> None:
    """Writes a Hugging Face model directory: safetensors, configuration, tokenizer. Collective."""
    path = Path(directory)
    if engine.rank == 0:
        path.mkdir(parents=True, exist_ok=True)
        save_model_files(engine.lm, tokenizer, path)
    source = Zero3Source(engine, bucket_bytes)
    shards = ShardWriter(path, len(source.plan()))
    for tensors in source.buckets():
        if engine.rank == 0:
            shards.write(tensors)
    if engine.rank == 0:
        shards.finish()


def save_model_files(lm: nn.Module, tokenizer: Any, directory: Path) -> None:
    """What a model directory holds beside weights: configurations and the tokenizer."""
    model: Any = lm
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


class ShardWriter:
    """Writes `count` safetensors files as transformers names them, with the index where there are several."""

    def __init__(self, directory: Path, count: int) -> None:
        self._directory = directory
        self._count = count
        self._files: dict[str, str] = {}
        self._bytes = 0
        self._written = 0

    def write(self, tensors: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        self._written += 1
        name = "model.safetensors"
        if self._count > 1:
            name = f"model-{self._written:05d}-of-{self._count:05d}.safetensors"
        save_file(
            {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()},
            self._directory / name,
            metadata={"format": "pt"},
        )
        self._files |= dict.fromkeys(tensors, name)
        self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def finish(self) -> None:
        if self._count > 1:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": self._files}
            (self._directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 holds only this rank's part at the moment."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    return isinstance(tensor, nn.Parameter) and getattr(tensor, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE
