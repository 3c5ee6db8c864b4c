"""How a bucket's bytes get from the sender to all receivers: through a process group, or by a look at the sender's own.

A way is one party's side of it, for the length of a transfer.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from services.transfer.group import PIECE_POLL_S, await_any, broadcast, finish, leave, put
from services.transfer.offer import Broken
from services.transfer.shared import Handle, Lent, borrowed, gpu_of, machine, settle

Backend = Literal["ipc", "nccl", "gloo"]


def place_of(device: torch.device) -> dict[str, str]:
    """What a party says of itself: its `machine`, its `process` there, and the `device` (cpu, cuda) where it has the
    weights, on CUDA with the GPU's own number as `gpu`.
    """
    place = {"machine": machine(), "process": str(os.getpid()), "device": device.type}
    return place | ({"gpu": gpu_of(device)} if device.type == "cuda" else {})


def backend_for(places: Sequence[Mapping[str, str]]) -> Backend:
    """By the places of all parties.

    `ipc` where all have the same memory: one GPU, or one machine's without GPUs. `nccl` where every party has a GPU of
    its own; it knows no other case. `gloo`, through host memory, otherwise.
    """
    if places[0]["machine"] and len({(each["machine"], each["device"], each.get("gpu")) for each in places}) == 1:
        return "ipc"
    gpus = [place.get("gpu", "") for place in places]
    return "nccl" if all(gpus) and len(set(gpus)) == len(gpus) else "gloo"


class Way(Protocol):
    def room(self, size: int) -> Tensor:
        """Where the next bucket's bytes are put, by the sender or by its coming: [size] bytes."""
        ...

    def bring(self, index: int, flat: Tensor, what: str) -> Callable[[], None]:
        """Begins to bring bucket `index` from the sender's `flat` to the receivers'; what is returned waits for it.

        Both raise Broken, which says `what` was waited for, or one of `services.transfer.group.LOST`.
        """
        ...

    def leave(self) -> None:
        """Ends this party's part."""
        ...


class ByGroup:
    """Through a process group of all parties. The sender fills one buffer of `most` bytes again and again, a receiver
    has a new one for each bucket: who takes its tensors may keep them."""

    def __init__(self, group: Any, device: torch.device, phase_s: float, most: int | None = None) -> None:
        self._group = group
        self._device = device
        self._phase_s = phase_s
        self._flat = None if most is None else torch.zeros(most, dtype=torch.uint8, device=device)

    def room(self, size: int) -> Tensor:
        if self._flat is None:
            return torch.empty(size, dtype=torch.uint8, device=self._device)
        return self._flat[:size]

    def bring(self, index: int, flat: Tensor, what: str) -> Callable[[], None]:
        del index
        return partial(finish, broadcast(self._group, flat, self._phase_s, what), self._phase_s, what)

    def leave(self) -> None:
        leave(self._group)
        self._flat = None


class Lending:
    """The sender's side of a buffer that the receivers look at; `gone` says why one of them takes nothing any more.

    It is filled again when all have copied what was in it, which each says by an entry in the store.
    """

    def __init__(
        self, store: Any, lent: Lent, receivers: Sequence[str], gone: Callable[[str], str | None], phase_s: float
    ) -> None:
        self._store = store
        self._lent = lent
        self._receivers = receivers
        self._gone = gone
        self._phase_s = phase_s

    def room(self, size: int) -> Tensor:
        return self._lent.flat[:size]

    def bring(self, index: int, flat: Tensor, what: str) -> Callable[[], None]:
        settle(flat)
        put(self._store, f"lent/{index}", None)
        return partial(self._until_copied, index, what)

    def leave(self) -> None:
        self._lent.close()

    def _until_copied(self, index: int, what: str) -> None:
        end = time.monotonic() + self._phase_s
        waiting = list(self._receivers)
        while waiting:
            # Looked at first: who has copied it may be done, and gone, a moment later.
            gone = {name: why for name in waiting if (why := self._gone(name)) is not None}
            waiting = [name for name in waiting if not self._store.check([f"copied/{index}/{name}"])]
            for name in waiting:
                if name in gone:
                    raise Broken(f"{what}: {name} {gone[name]}")
            if waiting and time.monotonic() > end:
                raise Broken(f"waited {self._phase_s:.0f} s for {what}: {', '.join(waiting)} did not")
            time.sleep(PIECE_POLL_S if waiting else 0)


class Borrowing:
    """A receiver's side of it: it copies each bucket into memory of its own."""

    def __init__(self, store: Any, name: str, handle: Handle, most: int, device: torch.device, phase_s: float) -> None:
        self._store = store
        self._name = name
        self._lent: Tensor | None = borrowed(handle, most, device)
        self._device = device
        self._phase_s = phase_s

    def room(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def bring(self, index: int, flat: Tensor, what: str) -> Callable[[], None]:
        return partial(self._copy, index, flat, what)

    def leave(self) -> None:
        self._lent = None

    def _copy(self, index: int, flat: Tensor, what: str) -> None:
        assert self._lent is not None
        found = await_any(self._store, (f"lent/{index}", "stopped"), self._phase_s)
        if found is None:
            raise Broken(f"waited {self._phase_s:.0f} s for {what}")
        if found == "stopped":
            raise ConnectionError("the sender has stopped")
        flat.copy_(self._lent[: flat.numel()])
        settle(flat)
        put(self._store, f"copied/{index}/{self._name}", None)
