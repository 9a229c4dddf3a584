"""Streams that wait for a word of memory, or write one: CUDA's stream memory operations, by ctypes.

A wait uses no SM: the GPU's front end polls the word, so a message that is awaited early slows no kernel (NCCL's
receive spins on as many SMs as it has channels). A write happens once all earlier work of its stream is done and
visible to the whole system, copies to peers included. torch 2.11 offers the write but not the wait; packages that wrap
the driver are not in every build of torch, while the driver's library is on every GPU host. The words are in host
memory, so that a host can read how far a device has come, and can release a wait that no device will: a process whose
stream still waits cannot exit (47 s measured on an H100 with driver 580).

The host is what these calls cost: several words are one call, and a copy is the driver's own, without torch's change
of the current stream and dispatch around it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from weakref import finalize

import numpy as np
import torch

WAIT_GEQ = 0  # CU_STREAM_WAIT_VALUE_GEQ: cyclic, until int32(word - value) >= 0


WAIT_VALUE_32, WRITE_VALUE_32 = 1, 2  # CUstreamBatchMemOpType


class _MemoryOperation(ctypes.Structure):
    """CUstreamBatchMemOpParams: a union of 48 bytes, here as its member for waits and writes of words."""

    _fields_ = (
        ("operation", ctypes.c_int),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint),
        ("alias", ctypes.c_uint64),
        ("unused", ctypes.c_uint64),
    )


@cache
def _driver() -> ctypes.CDLL:
    """With the arguments' types, so that integers are passed as they are."""
    driver = ctypes.CDLL("libcuda.so.1")
    stream, address, word, flags = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint
    driver.cuStreamWaitValue32_v2.argtypes = driver.cuStreamWriteValue32_v2.argtypes = stream, address, word, flags
    driver.cuStreamBatchMemOp_v2.argtypes = stream, flags, ctypes.c_void_p, flags
    driver.cuMemcpyDtoDAsync_v2.argtypes = address, address, ctypes.c_size_t, stream
    return driver


def _checked(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"{what} failed with CUDA driver error {code}")


def wait_value(stream: torch.cuda.Stream, address: int, value: int) -> None:
    """Work queued on `stream` from now on starts once the int32 at device address `address` is at least `value`."""
    _checked(_driver().cuStreamWaitValue32_v2(stream.cuda_stream, address, value, WAIT_GEQ), "cuStreamWaitValue32")


def write_value(stream: torch.cuda.Stream, address: int, value: int) -> None:
    """Store `value` at device address `address` once the work queued on `stream` so far is done and visible."""
    _checked(_driver().cuStreamWriteValue32_v2(stream.cuda_stream, address, value, 0), "cuStreamWriteValue32")


def wait_values(stream: torch.cuda.Stream, addresses: Sequence[int], value: int) -> None:
    """`wait_value` for several words, in one call."""
    if len(addresses) == 1:
        wait_value(stream, addresses[0], value)
    elif addresses:
        _batch(stream, WAIT_VALUE_32, addresses, value)


def write_values(stream: torch.cuda.Stream, addresses: Sequence[int], value: int) -> None:
    """`write_value` to several words, in one call."""
    if len(addresses) == 1:
        write_value(stream, addresses[0], value)
    elif addresses:
        _batch(stream, WRITE_VALUE_32, addresses, value)


def _batch(stream: torch.cuda.Stream, operation: int, addresses: Sequence[int], value: int) -> None:
    many = (_MemoryOperation * len(addresses))(*(_MemoryOperation(operation, at, value) for at in addresses))
    _checked(_driver().cuStreamBatchMemOp_v2(stream.cuda_stream, len(many), many, 0), "cuStreamBatchMemOp")


def copy_bytes(stream: torch.cuda.Stream, target: int, source: int, size: int) -> None:
    """Copy between device addresses, those of peers included, by a copy engine."""
    _checked(_driver().cuMemcpyDtoDAsync_v2(target, source, size, stream.cuda_stream), "cuMemcpyDtoDAsync")


def map_host_memory(memory: np.ndarray, owner: object) -> int:
    """Pin memory of this process for as long as `owner` lives. Returns its address as the current device sees it."""
    address = memory.ctypes.data
    _checked(int(torch.cuda.cudart().cudaHostRegister(address, memory.nbytes, 0)), "cudaHostRegister")
    # Before it is unmapped: whatever is mapped there next could not be pinned. At exit CUDA may be gone already.
    finalize(owner, _unpin, memory).atexit = False
    seen = ctypes.c_uint64()
    found = _driver().cuMemHostGetDevicePointer_v2(ctypes.byref(seen), ctypes.c_void_p(address), ctypes.c_uint(0))
    _checked(found, "cuMemHostGetDevicePointer")
    return seen.value


def _unpin(memory: np.ndarray) -> None:
    _checked(int(torch.cuda.cudart().cudaHostUnregister(memory.ctypes.data)), "cudaHostUnregister")
