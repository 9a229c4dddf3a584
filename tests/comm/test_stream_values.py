"""What is handed to CUDA's driver, which no test machine has: calls and the layout of their arguments."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dryvine.comm import stream_values

STREAM: Any = SimpleNamespace(cuda_stream=77)


class Driver:
    def __init__(self, code: int = 0) -> None:
        self.code, self.calls = code, list[tuple[Any, ...]]()

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> int:
            self.calls.append((name, *(bytes(one) if hasattr(one, "_length_") else one for one in given)))
            return self.code

        return call


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(stream_values, "_driver", lambda: made)
    return made


def test_several_words_are_one_call_in_the_drivers_layout(driver: Driver) -> None:
    """CUstreamBatchMemOpParams, 48 bytes: operation, address, value, flags (0: wait until at least), alias."""
    addresses = [1 << 40, 8]
    stream_values.wait_values(STREAM, addresses, 5)
    stream_values.write_values(STREAM, addresses, 6)
    waits, writes = driver.calls
    for call, operation, value in ((waits, 1, 5), (writes, 2, 6)):
        name, stream, count, many, flags = call
        assert (name, stream, count, flags) == ("cuStreamBatchMemOp_v2", 77, 2, 0)
        assert list(struct.iter_unpack("<i4xQQI4xQ8x", many)) == [(operation, at, value, 0, 0) for at in addresses]


def test_one_word_needs_no_batch_and_none_no_call(driver: Driver) -> None:
    stream_values.wait_values(STREAM, [8], 5)
    stream_values.write_values(STREAM, [8], 6)
    stream_values.wait_values(STREAM, [], 5)
    assert driver.calls == [("cuStreamWaitValue32_v2", 77, 8, 5, 0), ("cuStreamWriteValue32_v2", 77, 8, 6, 0)]


def test_a_copy_goes_to_the_target(driver: Driver) -> None:
    stream_values.copy_bytes(STREAM, target=1, source=2, size=3)
    assert driver.calls == [("cuMemcpyDtoDAsync_v2", 1, 2, 3, 77)]


def test_memory_is_pinned_as_long_as_its_owner_lives(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else whatever is mapped at its address next cannot be pinned."""
    runtime, memory = Driver(), np.zeros(6, np.int32)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    owner, address = Driver(), memory.ctypes.data
    stream_values.map_host_memory(memory, owner)
    assert runtime.calls == [("cudaHostRegister", address, 24, 0)]
    del owner
    assert runtime.calls[1:] == [("cudaHostUnregister", address)]


def test_an_error_of_the_driver_is_raised(driver: Driver) -> None:
    driver.code = 700
    with pytest.raises(RuntimeError, match="cuStreamBatchMemOp failed with CUDA driver error 700"):
        stream_values.wait_values(STREAM, [8, 12], 1)
