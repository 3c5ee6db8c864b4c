"""Published weights: a directory of safetensors buckets, and `weights.json` that names them, written last.

The learner writes a bucket at a time, so that neither side ever holds the whole model twice. A reader takes a
directory only through its manifest, and verifies the BLAKE2b-128 of every bucket before it yields the first tensor: an
engine never ends up with half of one version and half of another.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from pydantic import ValidationError

from services.records import PolicyVersion, PublishedWeights, WeightsBucket

MANIFEST = "weights.json"


class Corrupt(Exception):  # noqa: N818 - reads as what it says where it is raised
    """Published weights that are not what was published; the message names the file."""


def write_bucket(directory: str | Path, index: int, tensors: Mapping[str, torch.Tensor]) -> WeightsBucket:
    """Writes one bucket; `tensors` by their names in the Hugging Face model's state dict."""
    name = f"bucket_{index:05d}.safetensors"
    path = Path(directory) / name
    contiguous = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    safetensors.torch.save_file(contiguous, path)  # pyright: ignore[reportUnknownMemberType]
    return WeightsBucket(file=name, names=tuple(tensors), bytes=path.stat().st_size, checksum=_checksum(path))


def write_manifest(directory: str | Path, version: PolicyVersion, buckets: Sequence[WeightsBucket]) -> Path:
    """Writes `weights.json` atomically; from then on the weights are published. Returns its path."""
    path = Path(directory) / MANIFEST
    partial = path.with_suffix(".partial")
    partial.write_text(PublishedWeights(version=version, buckets=tuple(buckets)).model_dump_json(indent=1))
    partial.replace(path)
    return path


def read_manifest(path: str | Path) -> PublishedWeights:
    """The manifest at `path` (the file, or its directory).

    Raises:
        Corrupt: it is missing or is not a manifest.
    """
    file = _manifest_path(path)
    try:
        return PublishedWeights.model_validate_json(file.read_bytes())
    except FileNotFoundError as error:
        raise Corrupt(f"{file} is missing: these weights were not published to the end") from error
    except ValidationError as error:
        raise Corrupt(f"{file} is not a manifest of published weights: {error}") from error


def read_published(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of published weights (CPU), a bucket in memory at a time.

    All buckets are verified when this is called, before the iterator yields anything.

    Raises:
        Corrupt: a bucket is missing, its checksum differs, or it holds other tensors than the manifest says.
    """
    manifest = read_manifest(path)
    directory = _manifest_path(path).parent
    seen: set[str] = set()
    for bucket in manifest.buckets:
        file = directory / bucket.file
        if Path(bucket.file).name != bucket.file:
            raise Corrupt(f"{bucket.file!r} in {directory / MANIFEST} is not a plain file name")
        if not file.is_file():
            raise Corrupt(f"{file} is missing")
        if file.stat().st_size != bucket.bytes or _checksum(file) != bucket.checksum:
            raise Corrupt(f"{file} is not what was published: its checksum or size differs from the manifest's")
        twice = seen.intersection(bucket.names)
        if twice:
            raise Corrupt(f"{sorted(twice)[0]} stands in two buckets of {directory}")
        seen.update(bucket.names)
    return _tensors(directory, manifest)


def _tensors(directory: Path, manifest: PublishedWeights) -> Iterator[tuple[str, torch.Tensor]]:
    for bucket in manifest.buckets:
        # Not `safe_open`, which maps the file: in safetensors 0.8 it leaks 64 bytes with each tensor that is read.
        tensors = safetensors.torch.load((directory / bucket.file).read_bytes())
        if set(tensors) != set(bucket.names):
            raise Corrupt(f"{directory / bucket.file} holds other tensors than the manifest says")
        for name in bucket.names:
            yield name, tensors.pop(name)


def _manifest_path(path: str | Path) -> Path:
    given = Path(path)
    return given / MANIFEST if given.is_dir() else given


def _checksum(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
