"""A buffer of one process that others on the same memory look at: on a GPU by CUDA IPC, in a host's memory by a file
without a name.

What a process needs to look at it is a handle of plain values, which goes through the transfer's store. Nothing is left
where a process is killed: the kernel, or the driver of the GPU, ends the memory with the last that uses it.
"""

import base64
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.transfer.offer import Broken, short

Handle = list[int | str]
"""Numbers, and bytes in base64."""


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
    return f"{boot}/{os.geteuid()}/{spaces[0]}/{spaces[1]}"


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


class Lent:
    """A buffer of `size` bytes on `device`, for others to look at until `close`."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._file: int | None = None
        if device.type == "cpu":
            self._file = os.memfd_create("attune-weights")
            os.truncate(self._file, size)
            self.flat = _mapped(f"/proc/self/fd/{self._file}", size)
        else:
            self.flat = torch.zeros(size, dtype=torch.uint8, device=device)

    def handle(self) -> Handle:
        """What one receiver needs, as JSON can carry it; on a GPU torch counts who looks, so each needs its own."""
        if self._file is not None:
            return [os.getpid(), self._file]
        storage: Any = self.flat.untyped_storage()
        return [_text(part) for part in storage._share_cuda_()[1:]]  # the first is the device's number over there

    def close(self) -> None:
        """The memory ends when the last that looks at it has let go of it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def borrowed(handle: Handle, size: int, device: torch.device) -> Tensor:
    """The `Lent` buffer of another process, [size] bytes.

    Raises:
        Broken: it cannot be looked at from here.
    """
    try:
        if device.type == "cpu":
            pid, file = handle
            return _mapped(f"/proc/{int(pid)}/fd/{int(file)}", size)
        made: Any = torch.UntypedStorage
        with torch.cuda.device(device):
            here = torch.cuda.current_device()
            storage = made._new_shared_cuda(here, *(_bytes(part) for part in handle))
            return torch.empty(0, dtype=torch.uint8, device=torch.device("cuda", here)).set_(storage)[:size]
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise Broken(
            f"the sender's buffer cannot be looked at from here ({short(error)}); cluster.transfer_backend: gloo does "
            "without"
        ) from error


def settle(flat: Tensor) -> None:
    """What was asked of the GPU for this tensor is done: another process may look."""
    if flat.is_cuda:
        torch.cuda.synchronize(flat.device)


def _mapped(path: str, size: int) -> Tensor:
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


def _text(part: int | bytes) -> int | str:
    return base64.b64encode(part).decode("ascii") if isinstance(part, bytes) else part


def _bytes(part: int | str) -> int | bytes:
    return base64.b64decode(part) if isinstance(part, str) else part
