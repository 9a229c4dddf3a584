"""Dispatch over MPI: Flat's rows, carried by mpi4py's Ialltoallv instead of torch.distributed.

For clusters whose MPI knows their fabric better than NCCL or gloo do. Tensors are passed by pointer: on a GPU that
needs a CUDA-aware MPI, and the stream is synchronised first, since MPI knows no streams. Importing mpi4py calls
MPI_Init, so it is imported only here and only when this dispatcher is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dryvine.comm.dispatch.exchange import Meter
from dryvine.comm.dispatch.payload import WORD
from dryvine.comm.pending import Pending


class MpiExchange:
    """An Exchange over an MPI communicator (None: COMM_WORLD). Rows must be 64-bit integers, as wire rows are."""

    def __init__(self, communicator: Any = None, links: Sequence[str] = (), meter: Meter | None = None) -> None:
        from mpi4py import MPI

        self.communicator = communicator or MPI.COMM_WORLD
        self.size, self.rank = self.communicator.size, self.communicator.rank
        self.links = links or ["self" if r == self.rank else "intra" for r in range(self.size)]
        self.meter = meter or Meter()

    def start(
        self, rows: Tensor, sends: Sequence[int], receives: Sequence[int], into: Tensor | None = None, what: str = ""
    ) -> Pending[Tensor]:
        assert rows.dtype == WORD, rows.dtype
        rows = rows.contiguous()
        came = rows.new_empty((sum(receives), *rows.shape[1:])) if into is None else into
        words = rows.shape[1:].numel()
        self.meter.add(self.links, sends, words * WORD.itemsize)
        if rows.is_cuda:
            torch.cuda.current_stream().synchronize()
        request = self.communicator.Ialltoallv(_buffer(rows, sends, words), _buffer(came, receives, words))

        def finish() -> Tensor:
            request.Wait()
            rows.size()  # the closure holds what is being sent until it has left
            return came

        return Pending(finish)


def _buffer(rows: Tensor, counts: Sequence[int], words: int) -> list[Any]:
    """mpi4py's [data, (counts, displacements), type]; counts are in words, so 2^31 of them are 16 GiB."""
    from mpi4py import MPI

    data = rows if rows.is_cuda else rows.numpy()
    scaled = [count * words for count in counts]
    begin = [sum(scaled[:i]) for i in range(len(scaled))]
    return [data, (scaled, begin), MPI.INT64_T]
