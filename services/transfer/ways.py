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
from services.transfer.shared import Lent, Memory, alive, gpu_of, machine, settle

Backend = Literal["ipc", "nccl", "gloo"]
Wanted = Literal["auto", "gloo"]

LOOK_S = 0.05
"""Between two looks at who is gone, while a bucket is waited for."""

STOPPED = "the sender has stopped"
"""Of the ConnectionError, one of `services.transfer.group.LOST`, that says what a broken group would."""

_unsettled: list[tuple[Lent, list[int]]] = []
"""What was lent, and the processes that may look at it still."""


def place_of(device: torch.device) -> dict[str, str]:
    """What a party says of itself: its `machine`, its `process` there, and the `gpu` of its weights, "" for none."""
    gpu = gpu_of(device) if device.type == "cuda" else ""
    return {"machine": machine(), "process": str(os.getpid()), "gpu": gpu}


def backend_for(places: Sequence[Mapping[str, str]]) -> Backend:
    """By the places of all parties.

    `ipc` where all have the same memory: one GPU, or one machine's without GPUs. `nccl` where every party has a GPU of
    its own; it knows no other case. `gloo`, through host memory, otherwise.
    """
    if places[0]["machine"] and len({(place["machine"], place["gpu"]) for place in places}) == 1:
        return "ipc"
    gpus = [place["gpu"] for place in places]
    return "nccl" if all(gpus) and len(set(gpus)) == len(gpus) else "gloo"


class Way(Protocol):
    joint: bool
    """Whether one that leaves ends it for the others."""

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

    joint = True

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
    """The sender's side of a buffer that the receivers look at.

    It is filled again when all have copied what was in it, which each says by an entry in the store. `receivers`: their
    processes, by name; `gone` says why one of them takes nothing any more.
    """

    joint = False

    def __init__(
        self,
        store: Any,
        memory: Lent,
        receivers: Mapping[str, int],
        gone: Callable[[str], str | None],
        phase_s: float,
    ) -> None:
        self._store = store
        self._memory = memory
        self._receivers = receivers
        self._gone = gone
        self._phase_s = phase_s

    def room(self, size: int) -> Tensor:
        return self._memory.flat[:size]

    def bring(self, index: int, flat: Tensor, what: str) -> Callable[[], None]:
        settle(flat)
        put(self._store, f"lent/{index}", None)
        return partial(self._until_copied, index, what)

    def leave(self) -> None:
        """Frees it once nobody has it open: who is done has closed it, and who is not may, for as long as it lives.

        A receiver whose actor is dead may be a process that lives on for a moment.
        """
        done = [name for name in self._receivers if self._store.check([f"done/{name}"])]
        _unsettled.append((self._memory, [each for name, each in self._receivers.items() if name not in done]))
        settle_lent()

    def _until_copied(self, index: int, what: str) -> None:
        end = time.monotonic() + self._phase_s
        copied = [f"copied/{index}/{name}" for name in self._receivers]
        look = time.monotonic() + LOOK_S
        while not self._store.check(copied):
            time.sleep(PIECE_POLL_S)
            now = time.monotonic()
            if now < min(look, end):
                continue
            look = now + LOOK_S
            # Asked first: who has copied it may be done, and gone, a moment later.
            gone = {name: why for name in self._receivers if (why := self._gone(name)) is not None}
            waiting = [name for name in self._receivers if not self._store.check([f"copied/{index}/{name}"])]
            for name in waiting:
                if name in gone:
                    raise Broken(f"{what}: {name} {gone[name]}")
            if waiting and now > end:
                raise Broken(f"waited {self._phase_s:.0f} s for {what}: {', '.join(waiting)} did not")


class Borrowing:
    """A receiver's side of it: it copies each bucket into memory of its own."""

    joint = False

    def __init__(self, store: Any, name: str, memory: Memory, device: torch.device, phase_s: float) -> None:
        self._store = store
        self._name = name
        self._memory = memory
        self._device = device
        self._phase_s = phase_s

    def room(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def bring(self, index: int, flat: Tensor, what: str) -> Callable[[], None]:
        return partial(self._copy, index, flat, what)

    def leave(self) -> None:
        self._memory.close()

    def _copy(self, index: int, flat: Tensor, what: str) -> None:
        found = await_any(self._store, (f"lent/{index}", "stopped"), self._phase_s)
        if found is None:
            raise Broken(f"waited {self._phase_s:.0f} s for {what}")
        if found == "stopped":
            raise ConnectionError(STOPPED)
        flat.copy_(self._memory.flat[: flat.numel()])
        settle(flat)
        put(self._store, f"copied/{index}/{self._name}", None)


def settle_lent() -> None:
    """Frees what was lent, in this transfer or an earlier one, and is open nowhere now."""
    still: list[tuple[Lent, list[int]]] = []
    for memory, looking in _unsettled:
        if any(alive(each) for each in looking):
            still.append((memory, looking))
        else:
            memory.close()
    _unsettled[:] = still
