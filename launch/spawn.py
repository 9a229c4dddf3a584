"""Start a run on this machine: torchrun's agent in this process, without its tracebacks.

`torchrun ... -m dryvine.trainer CONFIG` does the same by hand. What is added is the end: a signal that stopped the run
cleanly is no error, and a rank that failed has already said why, so what is left to say is one line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from dryvine.comm.host import MALLOC


def spawn(world: int, words: Sequence[str]) -> int:
    """Run `dryvine.trainer` with `words` on `world` ranks and give the exit code. One OpenMP thread set per core."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world)))
    if not torch.cuda.is_available():
        os.environ.update(MALLOC)
    try:
        torchrun(["--standalone", "--nproc-per-node", str(world), "-m", "dryvine.trainer", *words])
    except SignalException:
        return 0  # every rank has saved and left
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(
            f"dryvine: rank {rank} failed first, with exit code {failure.exitcode}; see its words above",
            file=sys.stderr,
        )
        return 1
    return 0
