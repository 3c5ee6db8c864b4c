"""A receiver's side of a transfer."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from services.records import PolicyVersion
from services.transfer.group import LOST, await_any, get, join, new_group, own_address, put, try_put
from services.transfer.offer import Broken, Offer, short
from services.transfer.packing import TensorMeta, checksum, packed_bytes, unpack
from services.transfer.shared import borrowed
from services.transfer.ways import STOPPED, Borrowing, ByGroup, Way, place_of

MOMENT_S = 2.0
"""How long (s) a receiver whose group broke waits for the sender to say why."""


@dataclass(frozen=True)
class Incoming:
    """Weights on their way: the names of all, and the tensors, each bucket verified before the first of it is yielded.

    The tensors lie in memory of their own, a bucket's together, which lives as long as one of them.
    """

    version: PolicyVersion
    names: tuple[str, ...]
    tensors: Iterator[tuple[str, Tensor]]


@contextmanager
def receiving(offer: Offer, name: str, device: torch.device) -> Generator[Incoming]:
    """Joins a transfer as `name`. Leaving the block says that all was taken, or, by an error, that it was not and why.

    `device` is the model's. The tensors are there but where gloo brings them: then they are in the host's memory.

    Raises:
        Broken: the sender or another receiver is gone or does not answer, a checksum differs, or the offer is over.
    """
    store, host = _meet(offer, name)
    way: Way | None = None
    try:
        with _lost_is_broken(store, offer):
            put(store, f"join/{name}", place_of(device))
            start = _start(store, offer, name)
            plan = [[TensorMeta.from_json(row) for row in bucket] for bucket in start["plan"]]
            way = _way(store, offer, name, start, plan, host, device)
        names = tuple(meta.name for bucket in plan for meta in bucket)
        yield Incoming(offer.version, names, _tensors(store, way, offer, plan))
        if not way.joint:
            way.leave()  # the sender frees what it lent when all are done
        lost = try_put(store, f"done/{name}", None)
        if lost is not None:
            raise Broken(f"{offer.name}: {offer.sender} is gone, and does not know that all arrived ({lost})")
        if way.joint:
            _until_all_are_done(store, offer)
    except BaseException as error:
        if way is not None and not way.joint:
            way.leave()
        try_put(store, f"done/{name}", str(error))
        raise
    finally:
        if way is not None:
            way.leave()


@contextmanager
def _lost_is_broken(store: Any, offer: Offer) -> Generator[None]:
    """What torch raises where a peer is gone, as `Broken` with the reason where it can be known."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise Broken(f"{offer.name}: there is no memory for a bucket of it here ({short(error)})") from error
    except LOST as error:
        raise Broken(f"{offer.name}: {_reason(store, offer)} ({short(error)})") from error


def _meet(offer: Offer, name: str) -> tuple[Any, str]:
    """The sender's store, and the address of this host that the sender reaches."""
    if name not in offer.receivers:
        raise Broken(f"{offer.name} is not for {name}, but for {', '.join(offer.receivers) or 'nobody'}")
    try:
        host = own_address(offer.host, offer.port, offer.phase_s)
        return join(offer.host, offer.port, offer.key, offer.phase_s), host
    except (OSError, *LOST) as error:
        raise Broken(f"{offer.name}: {offer.sender} is not at {offer.address} ({short(error)})") from error


def _start(store: Any, offer: Offer, name: str) -> Any:
    # The sender begins up to `join_s` after it asks for receivers, which is after they were told where to come.
    within = offer.join_s + offer.phase_s
    key = await_any(store, ("stopped", "start"), within)
    if key is None:
        raise Broken(f"{offer.name}: waited {within:.0f} s for {offer.sender} to begin")
    if key == "stopped":
        raise Broken(f"{offer.name}: {offer.sender} ended it: {get(store, 'stopped')}")
    start = get(store, "start")
    if name not in start["receivers"]:
        raise Broken(f"{offer.name} began without {name}, which came too late")
    return start


def _way(
    store: Any,
    offer: Offer,
    name: str,
    start: Any,
    plan: list[list[TensorMeta]],
    host: str,
    device: torch.device,
) -> Way:
    """As the sender says that the bytes come."""
    if start["backend"] == "ipc":
        most = max(packed_bytes(bucket) for bucket in plan)
        return Borrowing(store, name, borrowed(start["handle"], most, device), device, offer.phase_s)
    receivers = list(start["receivers"])
    rank, size = receivers.index(name) + 1, len(receivers) + 1
    group = new_group(store, start["backend"], rank, size, host, offer.phase_s)
    return ByGroup(group, torch.device("cpu") if start["backend"] == "gloo" else device, offer.phase_s)


def _tensors(store: Any, way: Way, offer: Offer, plan: list[list[TensorMeta]]) -> Iterator[tuple[str, Tensor]]:
    for index, metas in enumerate(plan):
        what = f"bucket {index + 1} of {len(plan)} of {offer.name}"
        with _lost_is_broken(store, offer):
            flat = way.room(packed_bytes(metas))
            way.bring(index, flat, f"{what}: {offer.sender} did not send it")()
            said = await_any(store, (f"checksum/{index}", "stopped"), offer.phase_s)
            if said is None:
                raise Broken(f"{what}: waited {offer.phase_s:.0f} s for its checksum by {offer.sender}")
            if said == "stopped":
                raise ConnectionError(STOPPED)
            expected = get(store, f"checksum/{index}")
            found = checksum(flat)
        if found != expected:
            raise Broken(f"{what}: its checksum is not the one that {offer.sender} sent; nothing of it was used")
        yield from unpack(metas, flat)


def _until_all_are_done(store: Any, offer: Offer) -> None:
    """Stays in the group until the sender says that nobody needs it: this party may be passing bytes on to another."""
    try:
        await_any(store, ("end", "stopped"), offer.phase_s)
    except LOST:  # the sender has what it waited for, and left
        return


def _reason(store: Any, offer: Offer) -> str:
    """Why the group broke, as far as it can be known here."""
    try:
        if await_any(store, ("stopped",), min(MOMENT_S, offer.phase_s)) is not None:
            return f"{offer.sender} ended it: {get(store, 'stopped')}"
    except LOST:
        return f"{offer.sender} is gone"
    return f"the connection broke while {offer.sender} is there: another receiver may be gone"
