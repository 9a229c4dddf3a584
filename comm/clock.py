"""The offset of this rank's clock from rank 0's, so that timelines of several hosts can be overlaid.

`time.perf_counter` has an arbitrary zero. Of a few pings the one with the shortest round trip is used: rank 0 answered
at its middle, to within half the trip (Cristian's algorithm). NTP would do as well, but is not ours to set up.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from dryvine.comm.mesh import Mesh

PINGS = 8


def offset(mesh: Mesh) -> float:
    """Seconds to add to this rank's `time.perf_counter` to read rank 0's. Collective, a few milliseconds a rank."""
    ours = 0.0
    for rank in range(1, mesh.size):
        if mesh.rank == rank:
            ours = min(_ping() for _ in range(PINGS))[1]  # of the shortest round trip
        elif mesh.rank == 0:
            for _ in range(PINGS):
                _answer(rank)
    return ours


def _ping() -> tuple[float, float]:
    """(round trip, offset) of one ping."""
    theirs = torch.zeros(1, dtype=torch.float64)
    sent = time.perf_counter()
    dist.send(theirs, 0)
    dist.recv(theirs, 0)
    back = time.perf_counter()
    return back - sent, float(theirs) - (sent + back) / 2


def _answer(rank: int) -> None:
    dist.recv(torch.zeros(1, dtype=torch.float64), rank)
    dist.send(torch.tensor([time.perf_counter()], dtype=torch.float64), rank)
