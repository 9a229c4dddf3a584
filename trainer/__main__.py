"""What each rank runs: `torchrun --nproc-per-node N -m dryvine.trainer CONFIG [table.key=value ...]`.

The config is checked before the process group is made. Environment variables are read and set here and nowhere below.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from dryvine.comm.host import PARENT, stop_with
from dryvine.comm.nvml import probe, refined
from dryvine.comm.topology import Topology, discover
from dryvine.comm.watch import Watch
from dryvine.comm.world import in_world, prepare
from dryvine.trainer.begin import check_source
from dryvine.trainer.checkpoint.manifest import CannotSave, CheckpointError
from dryvine.trainer.config import Config, ConfigError, check_world
from dryvine.trainer.data.atomic import CannotWrite
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.splits import Data, open_data
from dryvine.trainer.exit_codes import ExitCode
from dryvine.trainer.fp8.choose import CannotRun, check
from dryvine.trainer.journal import same_run
from dryvine.trainer.loop import train
from dryvine.trainer.nonfinite import Diverged
from dryvine.trainer.rig import mesh_of
from dryvine.trainer.run_lock import RunLock
from dryvine.trainer.run_plan import RunPlan, load_plan
from dryvine.trainer.wandb_board import check_wandb

CODES = {CannotSave: ExitCode.FAULT, CheckpointError: ExitCode.REFUSED, Diverged: ExitCode.DIVERGED}


def main(words: Sequence[str]) -> int:
    """Train as one rank of as many as the launcher started. Returns an ExitCode."""
    prepare(os.environ)
    if PARENT in os.environ:
        stop_with(int(os.environ[PARENT]))
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    try:
        if not words:
            raise ConfigError("no config: torchrun --nproc-per-node N -m dryvine.trainer CONFIG [table.key=value ...]")
        plan = load_plan(words[0], words[1:])
        config = plan.config
        check_world(config, int(os.environ.get("WORLD_SIZE", "1")))
        device = _device(config, local_rank)
        check(config.fp8, device, (config.model.ffn, config.model.expert_ffn))
        topology = _topology(config, device)
        data = open_data(config)
        same_run(config, data.identity)
        check_wandb(config)
        check_source(config)
        with RunLock(config.run.folder).held() if rank == 0 else nullcontext():
            return run(plan, data, device, topology)
    except (ConfigError, DataError, CannotRun, CheckpointError) as error:
        if local_rank == 0:  # of each host: hosts may differ in what they lack
            _say(error)
        return ExitCode.REFUSED
    except CannotWrite as error:  # of one process; in a world, the rank that raises it tells the others
        _say(error)
        return ExitCode.FAULT


def run(plan: RunPlan, data: Data, device: torch.device, topology: Topology) -> int:
    """Train in a world of `topology.ranks`, and leave no process group behind. Returns an ExitCode."""

    def body(watch: Watch | None) -> int:
        mesh = replace(mesh_of(plan, device), watch=watch)
        try:
            finished = train(plan, mesh, data, topology)
        except (CheckpointError, Diverged) as error:
            if mesh.rank == 0:  # all ranks have the same message
                _say(error)
            return code_of(error)
        return ExitCode.FINISHED if finished else ExitCode.STOPPED

    return body(None) if topology.ranks == 1 else in_world(body, plan.config.comm.deadline, device)


def code_of(error: CheckpointError | Diverged) -> ExitCode:
    """Of a run that ended with this on all ranks."""
    return next(code for kind, code in CODES.items() if isinstance(error, kind))


def _say(error: Exception) -> None:
    print(f"dryvine: {error}", file=sys.stderr, flush=True)


def _topology(config: Config, device: torch.device) -> Topology:
    """Who shares a node; of GPUs also the links as NVML and sysfs report them. CPU ranks talk over gloo's sockets."""
    given = config.comm.topology
    try:
        topology = discover(config.parallel.world, given, os.environ)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return refined(topology, probe(), given) if device.type == "cuda" else topology


def _device(config: Config, local_rank: int) -> torch.device:
    wanted = config.run.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError('run.device = "cuda", but torch sees no GPU; set it to "cpu", or install CUDA torch')
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
