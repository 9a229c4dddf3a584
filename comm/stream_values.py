"""Streams that wait for a word of memory, or write one: CUDA's stream memory operations, by ctypes.

A wait uses no SM: the GPU's front end polls the word, so a message that is awaited early slows no kernel (NCCL's
receive spins on as many SMs as it has channels). A write happens once all earlier work of its stream is done and
visible to the whole system, copies to peers included. torch 2.11 offers the write but not the wait; packages that wrap
the driver are not in every build of torch, while the driver's library is on every GPU host. The words are in host
memory, so that a host can read how far a device has come, and can release a wait that no device will: a process whose
stream still waits cannot exit (47 s measured on an H100 with driver 580).
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

WAIT_GEQ = 0  # CU_STREAM_WAIT_VALUE_GEQ: cyclic, until int32(word - value) >= 0


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _checked(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"{what} failed with CUDA driver error {code}")


def wait_value(stream: torch.cuda.Stream, address: int, value: int) -> None:
    """Work queued on `stream` from now on starts once the int32 at device address `address` is at least `value`."""
    arguments = ctypes.c_void_p(stream.cuda_stream), ctypes.c_uint64(address), ctypes.c_uint32(value)
    _checked(_driver().cuStreamWaitValue32_v2(*arguments, ctypes.c_uint(WAIT_GEQ)), "cuStreamWaitValue32")


def write_value(stream: torch.cuda.Stream, address: int, value: int) -> None:
    """Store `value` at device address `address` once the work queued on `stream` so far is done and visible."""
    arguments = ctypes.c_void_p(stream.cuda_stream), ctypes.c_uint64(address), ctypes.c_uint32(value)
    _checked(_driver().cuStreamWriteValue32_v2(*arguments, ctypes.c_uint(0)), "cuStreamWriteValue32")


def map_host_memory(address: int, size: int) -> int:
    """Pin `size` bytes of this process at `address`. Returns their address as the current device sees it."""
    _checked(int(torch.cuda.cudart().cudaHostRegister(address, size, 0)), "cudaHostRegister")
    seen = ctypes.c_uint64()
    found = _driver().cuMemHostGetDevicePointer_v2(ctypes.byref(seen), ctypes.c_void_p(address), ctypes.c_uint(0))
    _checked(found, "cuMemHostGetDevicePointer")
    return seen.value
