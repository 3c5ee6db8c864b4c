"""New weights for an engine, whichever way they come: by files, or by a transfer."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from services.transfer.offer import is_offer, read_offer, receiver_of
from services.transfer.receiver import Incoming, receiving
from services.weights import read_manifest, read_published


@contextmanager
def incoming_weights(published: str, owner: str, device: torch.device) -> Generator[Incoming]:
    """`published` is the path of a manifest, or an offer that lists rank 0 of `owner`.

    Of files every bucket is verified before the block begins; of a transfer each one before its first tensor.

    Raises:
        Corrupt, Broken: as `services.weights` and `services.transfer.receiver` say.
    """
    if is_offer(published):
        with receiving(read_offer(published), receiver_of(owner, 0), device) as incoming:
            yield incoming
        return
    manifest = read_manifest(published)
    names = tuple(name for bucket in manifest.buckets for name in bucket.names)
    yield Incoming(manifest.version, names, read_published(published))
