"""The MPI adapter and MPI's topology, under a real mpirun; skipped where mpi4py or a runtime is missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import torch
from mpi4py import MPI
from dryvine.comm.dispatch.flat import Flat
from dryvine.comm.dispatch.mpi import MpiExchange
from dryvine.comm.topology import by_mpi

rank, world = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
topology = by_mpi()
assert topology.ranks == world, topology
chosen = torch.rand(10 * rank, 12, generator=torch.Generator().manual_seed(rank)).argsort(1)[:, :3].contiguous()
rows, weights = torch.randn(10 * rank, 5).bfloat16(), torch.rand(10 * rank, 3)
flat = Flat(MpiExchange(MPI.COMM_WORLD), 12)
handle = flat.plan_routing(chosen).wait()
got, values = flat.dispatch((rows,), weights, handle).wait()
assert len(got) == sum(handle.counts)
back, again = flat.combine(got, values, handle).wait()
assert torch.equal(back, (rows.float() * 3).bfloat16())
assert torch.equal(again, weights)
print(f"rank {rank} of {world} on {len(topology.nodes)} nodes: fine")
"""


def test_dispatch_over_mpi(tmp_path: Path) -> None:
    mpirun = shutil.which("mpirun")
    if not (mpirun and importlib.util.find_spec("mpi4py")):
        pytest.skip("needs mpi4py and an MPI runtime: pip install mpi4py mpich")
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPIR_CVAR_NUM_CLIQUES": "2"}  # MPICH plays two nodes
    ran = subprocess.run(
        [mpirun, "-n", "3", sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert sorted(line for line in ran.stdout.splitlines() if line) == [
        f"rank {r} of 3 on 2 nodes: fine" for r in range(3)
    ]
