"""Published weights are taken whole, or refused before the first tensor."""

import json
from pathlib import Path

import pytest
import torch

from learner.publish import buckets_of
from services.records import PolicyVersion
from services.weights import Corrupt, read_manifest, read_published, write_bucket, write_manifest

TENSORS = {
    "embed.weight": torch.arange(12.0).reshape(3, 4),
    "norm": torch.ones(4, dtype=torch.bfloat16),
    "head.weight": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
}


def published(directory: Path) -> Path:
    names = list(TENSORS)
    first = write_bucket(directory, 0, {name: TENSORS[name] for name in names[:2]})
    second = write_bucket(directory, 1, {names[2]: TENSORS[names[2]]})
    return write_manifest(directory, PolicyVersion(2, 7), [first, second])


@pytest.mark.parametrize("by", ["manifest", "directory"])
def test_what_was_published_is_read(by: str, tmp_path: Path) -> None:
    manifest = published(tmp_path)
    path = manifest if by == "manifest" else tmp_path
    assert read_manifest(path).version == PolicyVersion(2, 7)
    read = list(read_published(str(path)))
    assert [name for name, _ in read] == list(TENSORS)
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in read)
    assert read[1][1].dtype == torch.bfloat16


def test_a_changed_byte_is_noticed_before_the_first_tensor(tmp_path: Path) -> None:
    manifest = published(tmp_path)
    last = tmp_path / "bucket_00001.safetensors"
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(content)
    with pytest.raises(Corrupt, match="bucket_00001"):
        read_published(manifest)  # raised by the call itself, not by the first item


def test_a_missing_bucket_or_manifest_is_named(tmp_path: Path) -> None:
    manifest = published(tmp_path)
    (tmp_path / "bucket_00000.safetensors").unlink()
    with pytest.raises(Corrupt, match=r"bucket_00000\.safetensors is missing"):
        read_published(manifest)
    manifest.unlink()
    with pytest.raises(Corrupt, match="not published to the end"):
        read_published(tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["buckets"].append(m["buckets"][0]), "two buckets"),
        (lambda m: m["buckets"][0].update(file="../bucket_00000.safetensors"), "plain file name"),
        (lambda m: m.update(surprise=1), "not a manifest"),
        (lambda m: m["buckets"][0].update(names=["embed.weight"]), "other tensors"),
    ],
)
def test_a_manifest_that_lies_is_refused(change, said: str, tmp_path: Path) -> None:
    manifest = published(tmp_path)
    content = json.loads(manifest.read_text())
    change(content)
    manifest.write_text(json.dumps(content))
    with pytest.raises(Corrupt, match=said):
        list(read_published(manifest))


def test_buckets_hold_everything_in_order_within_the_bound() -> None:
    sizes = [("a", 3), ("b", 4), ("c", 1), ("large", 50), ("d", 2), ("e", 6)]
    assert buckets_of(sizes, 8) == [["a", "b", "c"], ["large"], ["d", "e"]]
    assert buckets_of([], 8) == []
