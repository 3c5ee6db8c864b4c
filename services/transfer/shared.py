"""A buffer of one process that others on the same memory look at: on a GPU by CUDA IPC, in a host's memory by a file
without a name.

What a process needs to look at it goes through the transfer's store as a text. The memory has no name that could stay:
it ends with the processes that use it.
"""

import base64
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from services.transfer import cuda_memory
from services.transfer.offer import Broken, short

NAME = "attune-weights"
"""Of the files without a name, as the kernel shows them."""


def machine() -> str:
    """Names this machine for all processes that can look at each other's memory; "" where none can.

    Those are of one user, in one kernel's process and IPC namespaces: not of two pods that share a GPU.
    """
    proc = Path("/proc")
    try:
        spaces = [(proc / "self" / "ns" / name).stat().st_ino for name in ("pid", "ipc")]
        boot = (proc / "sys" / "kernel" / "random" / "boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
    # Machines that were restored from one image may have the rest in common.
    return f"{os.uname().nodename}/{boot}/{os.geteuid()}/{spaces[0]}/{spaces[1]}"


def alive(process: int) -> bool:
    """Whether a process of this machine is there, and not only its entry."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def gpu_of(device: torch.device) -> str:
    """The GPU's own number, whatever it is called in this process."""
    cuda: Any = torch.cuda
    return str(cuda.get_device_properties(device).uuid)


def settle(flat: Tensor) -> None:
    """What was asked of the GPU for this tensor is done: another process may look."""
    if flat.is_cuda:
        torch.cuda.synchronize(flat.device)


class Memory(Protocol):
    """A buffer of this process, or one that it looks at: `flat`, [size] bytes, until `close`."""

    @property
    def flat(self) -> Tensor: ...

    def close(self) -> None: ...


class Lent(Memory, Protocol):
    def handle(self) -> str:
        """What others need to look at it."""
        ...


def lent(size: int, device: torch.device) -> Lent:
    """A buffer for others to look at. Raises RuntimeError where there is no memory for it."""
    return _LentFile(size) if device.type == "cpu" else _LentOnGpu(size, device)


def borrowed(handle: str, size: int, device: torch.device) -> Memory:
    """A `lent` buffer of another process; nothing is to be written to it.

    Raises:
        Broken: it cannot be looked at from here.
    """
    try:
        return _BorrowedFile(handle, size) if device.type == "cpu" else _BorrowedOnGpu(handle, size, device)
    except (OSError, RuntimeError, ValueError) as error:
        raise Broken(
            f"the sender's buffer cannot be looked at from here ({short(error)}); cluster.transfer_backend: gloo does "
            "without"
        ) from error


class _LentFile:
    def __init__(self, size: int) -> None:
        self._file = os.memfd_create(NAME)
        try:
            os.truncate(self._file, size)
            self.flat = torch.from_file(f"/proc/self/fd/{self._file}", shared=True, size=size, dtype=torch.uint8)
        except BaseException:
            self.close()
            raise

    def handle(self) -> str:
        return f"{os.getpid()}/{self._file}"

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class _BorrowedFile:
    """Opened to be read, and mapped only if it is what it should be: by the time that this process comes to it, the
    number may be that of another file.
    """

    def __init__(self, handle: str, size: int) -> None:
        process, number = (int(part) for part in handle.split("/"))
        file = os.open(f"/proc/{process}/fd/{number}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            here = f"/proc/self/fd/{file}"
            name = str(Path(here).readlink())
            if not name.startswith(f"/memfd:{NAME}") or os.fstat(file).st_size != size:
                raise ValueError(f"{name} of {os.fstat(file).st_size} bytes is not a buffer of {size}")
            # A private mapping that is only read shows what its owner writes, on Linux.
            self.flat = torch.from_file(here, shared=False, size=size, dtype=torch.uint8)
        finally:
            os.close(file)

    def close(self) -> None:
        self.flat = torch.empty(0, dtype=torch.uint8)


class _OnGpu:
    """Memory that the driver gives, and takes back by `close`."""

    def __init__(self, size: int, device: torch.device, take: Callable[[], int], give_back: Callable[[int], None]):
        self._device = device
        self._give_back = give_back
        with torch.cuda.device(device):
            torch.cuda.synchronize(device)  # the driver's calls need the thread to have the device's context
            self._pointer = take()
        try:
            self.flat = cuda_memory.tensor_at(self._pointer, size, device)
        except BaseException:
            give_back(self._pointer)
            raise

    def close(self) -> None:
        if self._pointer:
            self.flat = torch.empty(0, dtype=torch.uint8)
            pointer, self._pointer = self._pointer, 0
            with torch.cuda.device(self._device):
                self._give_back(pointer)


class _LentOnGpu(_OnGpu):
    """Whoever looks at it must have closed it before it is closed here."""

    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__(size, device, partial(cuda_memory.allocate, max(size, 1)), cuda_memory.free)

    def handle(self) -> str:
        with torch.cuda.device(self._device):
            return base64.b64encode(cuda_memory.handle_of(self._pointer)).decode("ascii")


class _BorrowedOnGpu(_OnGpu):
    def __init__(self, handle: str, size: int, device: torch.device) -> None:
        super().__init__(size, device, partial(cuda_memory.opened, base64.b64decode(handle)), cuda_memory.closed)
