"""Many tensors as one run of bytes, and the checksum of it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes. Every tensor begins at a multiple of it, so that it can be looked at where it lies, whatever its type."""

CHUNK = 2**22
"""Words that the checksum on a GPU takes at once: some 100 MB of intermediate values."""


@dataclass(frozen=True)
class TensorMeta:
    """A tensor that is sent, before its values are known."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count * self.dtype.itemsize

    def to_json(self) -> list[Any]:
        return [self.name, str(self.dtype).removeprefix("torch."), list(self.shape)]

    @classmethod
    def from_json(cls, row: Sequence[Any]) -> "TensorMeta":
        """Raises ValueError where it is none."""
        name, dtype, shape = row
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"{name}: {dtype!r} is no type of a tensor")
        return cls(str(name), found, tuple(int(length) for length in shape))


def packed_bytes(metas: Sequence[TensorMeta]) -> int:
    return sum(_aligned(meta.bytes) for meta in metas)


def pack(metas: Sequence[TensorMeta], tensors: Mapping[str, Tensor], flat: Tensor) -> None:
    """Copies the tensors into `flat` (uint8, `packed_bytes` long), one after the other.

    Raises:
        ValueError: a tensor is not what was announced.
    """
    start = 0
    for meta in metas:
        tensor = tensors[meta.name].detach()
        if tensor.dtype != meta.dtype or tuple(tensor.shape) != meta.shape:
            raise ValueError(
                f"{meta.name} was announced as {meta.dtype} {list(meta.shape)}, and is {tensor.dtype} "
                f"{list(tensor.shape)}"
            )
        flat[start : start + meta.bytes].copy_(tensor.contiguous().view(-1).view(torch.uint8))
        start += _aligned(meta.bytes)


def unpack(metas: Sequence[TensorMeta], flat: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors where they lie in `flat`, by name."""
    start = 0
    for meta in metas:
        yield meta.name, flat[start : start + meta.bytes].view(meta.dtype).view(meta.shape)
        start += _aligned(meta.bytes)


def checksum(flat: Tensor) -> str:
    """Of bytes in a host's memory BLAKE2b-128, as of a file; of bytes on a GPU `words_checksum`.

    A GPU's bytes would have to be copied to the host and hashed there at some 1 GB/s, slower than NCCL brings them; the
    checksum of words is computed where they lie, at the speed of its memory. Both sides of a transfer have the same
    kind of memory, so they compute the same.
    """
    if flat.device.type == "cpu":
        content: Any = flat.numpy()
        return hashlib.blake2b(content, digest_size=16).hexdigest()
    return words_checksum(flat)


def words_checksum(flat: Tensor) -> str:
    """64 bits of any device's bytes, whose number is a multiple of 8.

    Each word of 8 bytes is mixed with its place by steps that can be undone, so that no two values of a word give the
    same; the mixed words are added modulo 2^64, in any order. A single damaged word is always noticed, other damage but
    for 1 in 2^64. It is no protection against somebody who wants to deceive.
    """
    words = flat.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(words), CHUNK):
        mixed = words[start : start + CHUNK].clone()
        places = torch.arange(start, start + len(mixed), dtype=torch.int64, device=flat.device)
        mixed ^= places.mul_(0x1E3779B97F4A7C15).add_(0x3F58476D1CE4E5B9)
        for multiplier, shift in ((0x3F58476D1CE4E5B9, 29), (0x14D049BB133111EB, 32)):
            mixed.mul_(multiplier)
            mixed ^= (mixed >> shift) & ((1 << (64 - shift)) - 1)  # a logical shift: torch's repeats the sign
        total += mixed.sum()
    return f"{int(total) & (2**64 - 1):016x}"


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
