"""Memory of a GPU that other processes can look at, by the driver's own calls (CUDA driver API, Memory Management).

torch lends parts of its own pool instead, and counts who looks: what a process that was killed had borrowed is then
never freed. The driver is asked without a library between, since its C interface is the one that stays the same.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

HANDLE_BYTES = 64
"""CU_IPC_HANDLE_SIZE"""

LAZY_PEER_ACCESS = 1
"""CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, the only flag that is allowed"""


class IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


class _View:
    """What torch takes for a tensor that lies where `pointer` says (CUDA array interface, version 3)."""

    def __init__(self, pointer: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (pointer, False), "version": 3}


def allocate(size: int) -> int:
    """Memory of the current device, which is not torch's; its address. Raises RuntimeError where there is none left."""
    pointer = ctypes.c_uint64()
    _done("cuMemAlloc", _driver().cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(size)))
    return pointer.value


def free(pointer: int) -> None:
    """Of memory that another process has still open the driver says that what follows is undefined."""
    _done("cuMemFree", _driver().cuMemFree_v2(ctypes.c_uint64(pointer)))


def handle_of(pointer: int) -> bytes:
    """What another process needs to open it."""
    handle = IpcHandle()
    _done("cuIpcGetMemHandle", _driver().cuIpcGetMemHandle(ctypes.byref(handle), ctypes.c_uint64(pointer)))
    return bytes(handle)


def opened(handle: bytes) -> int:
    """The address here of another process's memory, until `closed`. Raises RuntimeError, ValueError."""
    pointer = ctypes.c_uint64()
    asked = IpcHandle.from_buffer_copy(handle)
    _done("cuIpcOpenMemHandle", _driver().cuIpcOpenMemHandle_v2(ctypes.byref(pointer), asked, LAZY_PEER_ACCESS))
    return pointer.value


def closed(pointer: int) -> None:
    _done("cuIpcCloseMemHandle", _driver().cuIpcCloseMemHandle(ctypes.c_uint64(pointer)))


def tensor_at(pointer: int, size: int, device: torch.device) -> Tensor:
    """[size] bytes (uint8), where they lie."""
    return torch.as_tensor(_View(pointer, size), device=device)


@cache
def _driver() -> Any:
    """The driver; torch has made its context for the device."""
    return ctypes.CDLL("libcuda.so.1")


def _done(call: str, result: int) -> None:
    if result:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(result, ctypes.byref(name))
        raise RuntimeError(f"{call}: {(name.value or b'error').decode()} ({result})")
