"""Whether a run's ops can be replayed as CUDA graphs, and what memory they then take.

A graph cannot contain a read of the device by the host, and those of `parallel/graphs.py` contain no communication. So
each rank must hold all experts, or its dispatcher read nothing and send between graphs; and the grouped GEMMs must read
the experts' row counts on the device.
"""

from __future__ import annotations

import torch

from dryvine.comm.dispatch.api import AnyDispatcher
from dryvine.comm.dispatch.nvlink import Nvlink
from dryvine.comm.live_steps import LiveSteps
from dryvine.parallel.graphs import CudaRecorder, Graphs
from dryvine.trainer.config import Config, ConfigError
from dryvine.trainer.fp8.fp8 import FP8
from dryvine.trainer.graph_memory import graphs_refusal
from dryvine.trainer.model.grouped import reads_counts
from dryvine.trainer.model.phases import LossWeights


def make_graphs(
    config: Config, device: torch.device, dispatcher: AnyDispatcher, fp8: FP8 | None, weights: LossWeights
) -> tuple[Graphs | None, str]:
    """Graphs, or None, and a line for the log. Raises ConfigError if they are required and cannot be recorded."""
    asked = config.parallel.graphs
    if asked == "off":
        return None, "parallel.graphs: off, as asked"
    if why := obstacle(config, device, dispatcher, fp8):
        if asked == "on":
            raise ConfigError(f"parallel.graphs = 'on': {why}; set parallel.graphs = 'auto'")
        return None, f"parallel.graphs: auto takes none: {why}"
    # Others that can be recorded send nothing.
    live = dispatcher.windows.live if isinstance(dispatcher, Nvlink) else LiveSteps()
    graphs = Graphs(CudaRecorder(device, live), dispatcher.meter, lambda: weights.mtp)
    return graphs, f"parallel.graphs: {asked} replays ops"


def obstacle(config: Config, device: torch.device, dispatcher: AnyDispatcher, fp8: FP8 | None) -> str | None:
    """Why a training step cannot be recorded; None if it can."""
    if why := graphs_refusal(config, device.type == "cuda"):
        return why
    if config.parallel.ep > 1 and not isinstance(dispatcher, Nvlink):
        return (
            "the host reads how many rows come from other ranks: they are on several nodes, auto took flat, or nvlink "
            "found no shared memory"
        )
    if fp8 is not None and fp8.engine.reads_counts:
        return "the engine of [fp8] takes experts one by one"
    if fp8 is None and reads_counts(device, training=True):
        return "products of experts take them one by one on GPUs other than Hopper"
    return None
