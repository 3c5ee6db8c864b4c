"""What both sides of a transfer use of torch.distributed: a store to meet at, a process group of their own, and waits
that end.

Neither torch's default group nor vLLM's has a part in it: a party may have one of these, or none.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from services.transfer.offer import Broken, short

T = TypeVar("T")
LOST: tuple[type[Exception], ...] = (dist.DistError, RuntimeError, ConnectionError)
"""What torch raises where a peer is gone or does not answer."""

POLL_S = 0.005
PIECE_POLL_S = 0.0005


def listen(host: str, key: str, seconds: float) -> tuple[Any, int]:
    """A store that others join, and its port; it listens at `host` alone.

    `seconds` bounds its calls, but for those to a process that is there and stands still: they last as long as it does.
    """
    listening = socket.create_server((host, 0))
    port = int(listening.getsockname()[1])
    return _store(host, port, key, seconds, is_master=True, master_listen_fd=listening.detach()), port


def join(host: str, port: int, key: str, seconds: float) -> Any:
    """The store that listens there. Raises one of LOST, or OSError at once where nobody listens."""
    socket.create_connection((host, port), timeout=seconds).close()  # torch would go on trying until its timeout
    return _store(host, port, key, seconds, is_master=False)


def own_address(host: str, port: int, seconds: float) -> str:
    """This host's address on the way to that one. Raises OSError where nobody listens there."""
    with socket.create_connection((host, port), timeout=seconds) as probe:
        return str(probe.getsockname()[0])


def new_group(store: Any, backend: str, rank: int, size: int, host: str, phase_s: float) -> Any:
    """A process group of `size` parties, once all are there; gloo listens at `host`. Raises one of LOST, or Broken."""

    def make() -> Any:
        if backend == "gloo":
            kind: Any = dist.ProcessGroupGloo
            options = kind._Options()
            options._timeout = timedelta(seconds=phase_s)
            options._devices = [kind.create_device(hostname=host)]
            return kind(store, rank, size, options)
        from torch.distributed import ProcessGroupNCCL  # only in builds for GPUs

        nccl: Any = ProcessGroupNCCL
        options = nccl.Options()
        # NCCL's own watchdog ends the process: our deadline comes first, and ends the transfer alone.
        options._timeout = timedelta(seconds=10 * phase_s + 600)
        return nccl(store, rank, size, options)

    return _within(2 * phase_s, f"{size} parties to form a group", make)


def broadcast(group: Any, flat: Tensor, seconds: float, what: str) -> Any:
    """Begins to bring rank 0's bytes to all others; `finish` waits for it. Raises one of LOST, or Broken."""
    options: Any = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    options.timeout = timedelta(seconds=seconds)

    def begin() -> Any:
        if flat.is_cuda:  # whichever streams the bytes were written on, or will be read on
            torch.cuda.set_device(flat.device)
            torch.cuda.synchronize(flat.device)
        return group.broadcast([flat], options)

    return _within(seconds, what, begin)


def _store(host: str, port: int, key: str, seconds: float, **how: Any) -> Any:
    module: Any = dist
    timeout = timedelta(seconds=seconds)
    return module.PrefixStore(key, module.TCPStore(host, port, wait_for_workers=False, timeout=timeout, **how))


def _within(seconds: float, what: str, call: Callable[[], T]) -> T:
    """The call's result. It gets a thread of its own: NCCL's first meeting blocks for ever where a peer has died.

    Raises:
        Broken: no result after `seconds`; the thread is left behind.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return result.result(seconds)
    except TimeoutError as error:
        raise Broken(f"waited {seconds:.0f} s for {what}") from error


def finish(work: Any, seconds: float, what: str) -> None:
    """Waits for a piece of the group's work.

    NCCL's own wait returns before the work is done, and has no end where a peer is dead: it is asked instead.

    Raises:
        Broken: not done after `seconds`.
        One of LOST: the group is broken.
    """
    end = time.monotonic() + seconds
    while not work.is_completed():
        if time.monotonic() > end:
            raise Broken(f"waited {seconds:.0f} s for {what}")
        time.sleep(PIECE_POLL_S)
    work.wait()


def leave(group: Any) -> None:
    """Ends this party's part in the group; the others notice if they are not done with it."""
    try:
        group.abort()
    except LOST:  # it is broken already
        return


def await_any(store: Any, keys: Sequence[str], seconds: float, *, also: Callable[[], bool] | None = None) -> str | None:
    """The first of `keys` that is in the store; None after `seconds`, or once `also` says so. Raises one of LOST."""
    end = time.monotonic() + seconds
    while True:
        for key in keys:
            if store.check([key]):
                return key
        if time.monotonic() > end or (also is not None and also()):
            return None
        time.sleep(POLL_S)


def put(store: Any, key: str, value: Any) -> None:
    store.set(key, json.dumps(value))


def get(store: Any, key: str) -> Any:
    """What is there; `await_any` says that it is."""
    return json.loads(store.get(key))


def try_put(store: Any, key: str, value: Any) -> str | None:
    """`put`; what went wrong where the other side is gone."""
    try:
        put(store, key, value)
    except LOST as error:
        return short(error)
    return None
