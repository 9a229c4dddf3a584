"""Dispatch over MPI: flat's rows, carried by mpi4py's Ialltoallv instead of torch.distributed.

For clusters whose MPI knows their fabric better than NCCL or gloo do. Tensors are passed by pointer: on a GPU that
needs a CUDA-aware MPI, and the stream is synchronised first, since MPI knows no streams. MPI itself ends the job when a
rank is lost, so there is no deadline here. Importing mpi4py calls MPI_Init, so only this module does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from mpi4py import MPI
from torch import Tensor

from dryvine.comm.dispatch.api import Dispatcher
from dryvine.comm.dispatch.exchange import own_links
from dryvine.comm.dispatch.flat import Flat, FlatHandle
from dryvine.comm.dispatch.meter import Meter
from dryvine.comm.dispatch.payload import WORD
from dryvine.comm.dispatch.setup import Setup
from dryvine.comm.extras import LibraryMissing
from dryvine.comm.pending import Pending
from dryvine.comm.topology import LinkClass


def build(setup: Setup) -> Dispatcher[FlatHandle]:
    """Over this rank's expert-parallel part of COMM_WORLD, whose ranks must be numbered as the mesh's."""
    world, size = MPI.COMM_WORLD, setup.group_topology.ranks
    part = world.Split(world.rank // size, world.rank)
    return Flat(MpiExchange(part, setup.links, setup.meter), setup.experts, setup.alignment)


def check(world: int | None) -> None:
    """Raise LibraryMissing unless MPI knows all ranks of the run: alone, each would take all experts for its own."""
    if world is not None and MPI.COMM_WORLD.size != world:
        raise LibraryMissing(
            f"comm.dispatcher = mpi: MPI has started {MPI.COMM_WORLD.size} of the {world} ranks; start them by mpirun, "
            "or choose another dispatcher"
        )


class MpiExchange:
    """An Exchange over an MPI communicator. Rows must be 64-bit integers, as wire rows and counts are."""

    def __init__(self, communicator: MPI.Comm, links: Sequence[LinkClass] = (), meter: Meter | None = None) -> None:
        self.communicator, self.size, self.rank = communicator, communicator.size, communicator.rank
        self.links = links or own_links(self.size, self.rank)
        self.meter = meter or Meter()

    def start(
        self, rows: Tensor, sends: Sequence[int], receives: Sequence[int], into: Tensor | None = None, what: str = ""
    ) -> Pending[Tensor]:
        assert rows.dtype == WORD, rows.dtype
        rows = rows.contiguous()
        arrived = rows.new_empty((sum(receives), *rows.shape[1:])) if into is None else into
        words = rows.shape[1:].numel()
        self.meter.add(self.links, sends, words * WORD.itemsize)
        if rows.is_cuda:
            torch.cuda.current_stream().synchronize()
        request = self.communicator.Ialltoallv(_buffer(rows, sends, words), _buffer(arrived, receives, words))

        def finish() -> Tensor:
            request.Wait()
            rows.size()  # the closure holds what is being sent until it has left
            return arrived

        return Pending(finish)


def _buffer(rows: Tensor, counts: Sequence[int], words: int) -> list[object]:
    """mpi4py's [data, (counts, displacements), type]; counts are in words, so 2^31 of them are 16 GiB."""
    data = rows if rows.is_cuda else rows.numpy()
    scaled = [count * words for count in counts]
    return [data, (scaled, list(accumulate(scaled, initial=0))[:-1]), MPI.INT64_T]
