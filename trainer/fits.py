"""Whether a rank's share of the model fits its device at all, checked before anything is allocated there.

The check uses a lower bound, computed from the config: weights and FP32 gradient sums of the stages that a rank holds,
and its shard of masters and moments. A run that passes may still run out of memory (activations; `dryvine plan` counts
them); one that is refused could never have run, and would end in a traceback of the allocator after minutes.
"""

from __future__ import annotations

import os
import resource

import torch

from dryvine.trainer.config import Config, ConfigError
from dryvine.trainer.model.shape import count_parameters

CPU = torch.device("cpu")
PROCESS = 1e8  # bytes that are a rank's alone before it has a model; 190 MB with torch 2.13 on a CPU


def check_fits(config: Config, device: torch.device) -> None:
    """Raise ConfigError if the device is too small for the run."""
    needed, memory = least_bytes(config, device), memory_of(device)
    if needed > memory:
        raise ConfigError(
            f"weights, gradient sums and optimizer take at least {needed / 1e9:.1f} GB a rank, and {device.type} has "
            f"{memory / 1e9:.1f} GB: raise parallel.pp, dp or ep, or try a small copy with `dryvine train --one-gpu`"
        )


def check_host(config: Config, device: str) -> None:
    """Raise ConfigError if this host is too small for all ranks of the run together, before one is started: thousands
    of processes would leave nothing of it. `device`: as run.device; one rank may find by itself that it has no GPU."""
    world = config.parallel.world
    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    least = world * (least_bytes(config, CPU) + PROCESS)
    on_gpus = gpus > 0 or device == "cuda"
    if on_gpus and world > max(1, gpus):
        need = f"a GPU each, and this host has {gpus}"
    elif not on_gpus and least > memory_of(CPU):
        need = f"at least {least / 1e9:,.1f} GB on a CPU, and this host has {memory_of(CPU) / 1e9:.1f} GB"
    else:
        return
    who = "one rank needs" if world == 1 else f"{world:,} ranks (parallel.pp x dp x ep) need"
    fix = "make [model] smaller" if world == 1 else "start them on several hosts (docs/launch.md), lower the layout"
    raise ConfigError(f"{who} {need}; {fix}, or see what `dryvine train --dry-run` and `--one-gpu` do here")


def least_bytes(config: Config, device: torch.device) -> float:
    """A lower bound of the bytes that each rank holds on its device on average. Only experts are divided by ep; this
    divides all parameters by pp and ep."""
    p, parameters = config.parallel, count_parameters(config.model, mtp=True)[0]
    weight = 4 if config.run.dtype == "fp32" else 2
    moments = 2 * (4 if config.optim.moments == "fp32" else 2)
    state = 0 if config.optim.offload == "cpu" and device.type != "cpu" else 4 + moments
    return parameters * ((weight + 4) / (p.pp * p.ep) + state / p.world)


def memory_of(device: torch.device) -> float:
    """Bytes that a process can allocate there."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return float(whole if limit == resource.RLIM_INFINITY else min(whole, limit))
