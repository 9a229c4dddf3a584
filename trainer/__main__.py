"""What each rank runs: `torchrun --nproc-per-node N -m dryvine.trainer CONFIG [table.key=value ...]`, or the same under
mpirun, srun or deepspeed.

A rank first checks what it can alone, then compares config, code and data with the other ranks through the launcher's
store, and only then joins a process group. Environment variables are read and set here and nowhere below.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch.distributed import Store

from dryvine.comm.agreement import Disagreement
from dryvine.comm.host import PARENT, stop_with
from dryvine.comm.nvml import probe, refined
from dryvine.comm.place import LaunchedRank, find_place
from dryvine.comm.topology import Topology, discover
from dryvine.comm.watch import Watch
from dryvine.comm.world import in_world, rendezvous, set_environment, share_refusal
from dryvine.trainer.checkpoint.attempts import check_folder
from dryvine.trainer.checkpoint.manifest import CannotSave, CheckpointError
from dryvine.trainer.checks import REFUSED, open_checked
from dryvine.trainer.config import Config, ConfigError, check_world
from dryvine.trainer.cpu_adam import load_cpu_adam
from dryvine.trainer.data.splits import Data
from dryvine.trainer.exit_codes import ExitCode
from dryvine.trainer.facts import facts
from dryvine.trainer.faults import FAULTS, in_a_line
from dryvine.trainer.fits import check_fits
from dryvine.trainer.loop import train
from dryvine.trainer.nonfinite import Diverged
from dryvine.trainer.rig import mesh_of
from dryvine.trainer.rl.loop import reinforce
from dryvine.trainer.run_lock import RunLock
from dryvine.trainer.run_plan import RunPlan, load_plan
from dryvine.trainer.say import say

CODES = {CannotSave: ExitCode.FAULT, CheckpointError: ExitCode.REFUSED, Diverged: ExitCode.DIVERGED}


def main(words: Sequence[str]) -> int:
    """Train as one of the ranks that the launcher started. Returns an ExitCode."""
    set_environment(os.environ)
    if PARENT in os.environ:
        stop_with(int(os.environ[PARENT]))
    place = LaunchedRank()
    try:
        place = find_place(os.environ)
        ready = _ready(words, place)
        with RunLock(ready.plan.config.run.folder).held() if place.rank == 0 else nullcontext():
            store = rendezvous(place, facts(ready.plan, ready.data))
            return run(ready, (place, store) if store else None)
    except REFUSED as error:
        return _refuse(place, error)
    except FAULTS as error:  # of a single process: `in_world` ends those of several, by `_show`
        if (line := in_a_line(error)) is None:
            raise
        say(line)
        return ExitCode.FAULT


def _show(error: BaseException) -> None:
    if (line := in_a_line(error)) is None:
        traceback.print_exception(error)
    else:
        say(line)


@dataclass(frozen=True)
class Ready:
    """A checked run, before the rendezvous with other ranks."""

    plan: RunPlan
    data: Data
    device: torch.device
    topology: Topology


def _ready(words: Sequence[str], place: LaunchedRank) -> Ready:
    """Check what this rank can check alone. Raises one of REFUSED."""
    # DeepSpeed's launcher puts --local_rank=N before the user's words; it is in LOCAL_RANK too.
    words = [word for word in words if not word.startswith("--local_rank=")]
    if not words:
        raise ConfigError("no config: torchrun --nproc-per-node N -m dryvine.trainer CONFIG [table.key=value ...]")
    plan = load_plan(words[0], words[1:])
    config = plan.config
    check_world(config, place.world)
    device = _device(config, place.local_rank)
    check_fits(config, device)
    topology, data = _topology(config, place, device), open_checked(config, device, place.rank == 0, place.world)
    check_folder(config.run)
    if config.optim.offload == "cpu":
        load_cpu_adam()  # compiled now, while no other rank waits with a deadline
    return Ready(plan, data, device, topology)


def _refuse(place: LaunchedRank, error: ValueError) -> int:
    """Print once why the run cannot start, and end all ranks. Returns an ExitCode."""
    error = share_refusal(place, error)
    if place.rank == 0 or not isinstance(error, Disagreement):
        say(error)
    return ExitCode.REFUSED


def run(ready: Ready, world: tuple[LaunchedRank, Store] | None) -> int:
    """Train in the world of all ranks (None: of this process alone), and destroy the process groups. Returns an
    ExitCode."""
    plan, device = ready.plan, ready.device

    def body(watch: Watch | None) -> int:
        mesh = replace(mesh_of(plan, device), watch=watch)
        try:
            finished = (reinforce if plan.config.rl else train)(plan, mesh, ready.data, ready.topology)
        except (CheckpointError, Diverged) as error:
            if mesh.rank == 0:  # all ranks have the same message
                say(error)
            return code_of(error)
        return ExitCode.FINISHED if finished else ExitCode.STOPPED

    return in_world(body, plan.config.comm.deadline, device, world, _show) if world else body(None)


def code_of(error: CheckpointError | Diverged) -> ExitCode:
    """The exit code of a run that ended with this error on all ranks."""
    return next(code for kind, code in CODES.items() if isinstance(error, kind))


def _topology(config: Config, place: LaunchedRank, device: torch.device) -> Topology:
    """Which ranks share a node, and for GPUs the links that NVML and sysfs report. CPU ranks use gloo over sockets."""
    given = config.comm.topology
    try:
        topology = discover(place.world, given, os.environ, place.topology)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return refined(topology, probe(), given) if device.type == "cuda" else topology


def _device(config: Config, local_rank: int) -> torch.device:
    wanted = config.run.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError('run.device = "cuda", but torch sees no GPU; set it to "cpu", or install CUDA torch')
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    seen = torch.cuda.device_count()
    # With a launcher that binds GPUs to ranks, such as srun --gpus-per-task, each rank sees one GPU.
    index = 0 if seen == 1 else local_rank
    if index >= seen:
        raise ConfigError(f"local rank {local_rank} has no GPU: this host has {seen}; launch {seen} ranks a host")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
