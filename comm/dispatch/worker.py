"""Runs a dispatcher's steps in order beside its caller: a thread on CPUs, a stream on a GPU.

A two-hop dispatch has work between its collectives (wait for a chunk, sort it, send it on). Done in `wait` it would
leave the wire idle until the caller comes back; done in the call it would make the caller wait for the first hop. On a
GPU a stream of its own queues all of it at once; gloo has no queue, so a thread takes its place. It is one thread with
a first-in-first-out queue, so the collectives of every rank keep the order in which the dispatcher was called.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from dryvine.comm.pending import Pending

V = TypeVar("V")


class Worker:
    """Runs steps one after the other; a step's tensors may be used after `wait`, by the stream that waited."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # A new thread does not inherit the caller's limit on OpenMP threads.
        self._thread = ThreadPoolExecutor(1, "comm", torch.set_num_threads, (torch.get_num_threads(),))

    def run(self, step: Callable[[], V]) -> Pending[V]:
        """Start `step`, which must hold (close over) the tensors that it reads."""
        if self._stream is None:
            future = self._thread.submit(torch.no_grad()(step))
            return Pending(future.result, future.done)
        return self._on_stream(self._stream, step)

    @staticmethod
    def _on_stream(stream: torch.cuda.Stream, step: Callable[[], V]) -> Pending[V]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            value = step()
        event = stream.record_event()

        def finish() -> V:
            current = torch.cuda.current_stream()
            current.wait_event(event)
            for tensor in value if isinstance(value, tuple) else ():
                if isinstance(tensor, Tensor):
                    tensor.record_stream(current)  # since it was allocated on the worker's stream
            return value

        # The Pending holds `step` until then: the tensors it reads must not be reused while the worker's stream does.
        return Pending(lambda held=step: finish())  # type: ignore[misc]
