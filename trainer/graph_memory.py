"""Memory that CUDA graphs add: which runs have graphs, and bytes a rank. Torch-free.

Without graphs, memory is reused by whichever microbatch is in flight, and for the temporaries of one op at a time. A
recorded flight keeps its own (`parallel/graphs.py`): saved tensors, temporaries, inputs and outputs of its ops. So
stages that are full at different times no longer share memory, and each flight has temporaries of its own.
"""

from __future__ import annotations

from dryvine.comm.dispatch.backends import AUTO, NVLINK_RANKS
from dryvine.trainer.activations import DTYPE_BYTES, FlightSizes, flight_sizes, microbatch_size, most_held
from dryvine.trainer.config import Config
from dryvine.trainer.model.shape import blocks
from dryvine.trainer.run_plan import LayoutPlan
from dryvine.trainer.stream_memory import most_running, running_bytes
from dryvine.trainer.temporaries import temporary_bytes


def graphs_refusal(config: Config, cuda: bool, dispatcher: str = "") -> str | None:
    """Why a config's ops cannot be recorded with this dispatcher ("": its own); None if they can."""
    if not cuda:
        return "the device is a cpu"
    name = dispatcher or config.comm.dispatcher
    if not microbatch_size(config, cuda).single_rank and not _sends_between_graphs(config, name):
        return (
            "the host reads how many rows come from other expert-parallel ranks "
            "(not with comm.dispatcher = 'nvlink', for ranks of one node)"
        )
    if config.rl and config.rl.ahead:
        return "rl.ahead samples beside updates, and two threads of a process cannot record at once"
    if config.run.dtype != "bf16":
        return "products of experts in FP32 take them one by one"
    return None


def _sends_between_graphs(config: Config, dispatcher: str) -> bool:
    """Of `auto`, whether it may take one that does."""
    sends = dispatcher == "nvlink" or (dispatcher == AUTO and config.parallel.ep == NVLINK_RANKS)
    return sends and not config.comm.imbalance


def recordable(config: Config, cuda: bool) -> bool:
    """Whether ops are recorded as soon as the dispatcher lets them."""
    return config.parallel.graphs != "off" and graphs_refusal(config, cuda, "nvlink") is None


def may_overflow(config: Config, cuda: bool) -> bool:
    """Whether more rows may come to a rank than graphs have room for."""
    p = config.parallel
    return recordable(config, cuda) and graphs_refusal(config, cuda) is None and p.recorded_room < p.ep


def graph_bytes(plan: LayoutPlan, sizes: FlightSizes, held: list[int], cuda: bool) -> list[int]:
    """Bytes of each pipeline rank beyond `held`, its flights at their peak, and temporaries; 0 without graphs."""
    if plan.config.parallel.graphs == "off" or graphs_refusal(plan.config, cuda):
        return [0] * plan.config.parallel.pp
    room = plan.config.parallel.recorded_room
    sizes = flight_sizes(plan, cuda, room) if room > 1 else sizes
    return [
        max(sum(_recorded(plan, sizes, rank).values()) - most - temporary_bytes(plan, plan.blocks_of(rank), cuda), 0)
        for rank, most in enumerate(held)
    ]


def flights(plan: LayoutPlan, rank: int) -> dict[int, int]:
    """Recorded flights of each stage of a pipeline rank: the most microbatches that are in it at once."""
    stages = range(plan.schedule.stages)
    return {
        stage: plan.footprint.most_held(rank, {s: int(s == stage) for s in stages})
        for stage in plan.schedule.stages_of(rank)
    }


def _recorded(plan: LayoutPlan, sizes: FlightSizes, rank: int) -> dict[int, int]:
    """Bytes of all flights of each stage."""
    config, size = plan.config, microbatch_size(plan.config, cuda=True)
    split = {op.stage for op in plan.schedule.ops(rank) if op.kind == "I"}
    # In and out of the forward, in and out of the backward.
    states = 4 * size.tokens * config.model.hidden * DTYPE_BYTES[config.run.dtype]
    return {
        stage: count
        * (
            sizes.kept[stage]
            + (sizes.left[stage] if stage in split else 0)
            + temporary_bytes(plan, [stage], True, config.parallel.recorded_room)
            + states
            + _sent(plan, stage)
        )
        for stage, count in flights(plan, rank).items()
    }


def _sent(plan: LayoutPlan, stage: int) -> int:
    """Bytes that leave a stage in messages of nvlink: sums for every rank, forward and backward, and gradients of the
    weights of choices."""
    ranks, size, shape = plan.config.parallel.ep, microbatch_size(plan.config, cuda=True), plan.config.model
    if ranks == 1:
        return 0
    kinds = {block.name: block.kind for block in blocks(shape)}
    layers = sum(kinds[name] in ("moe", "mtp") for name in plan.blocks[stage])
    rows = shape.top_k if plan.config.comm.sums == "by_choice" else 1
    return layers * ranks * size.tokens * (2 * rows * shape.hidden * size.dtype_bytes + 4 * shape.top_k)


def graph_line(plan: LayoutPlan) -> str:
    """A line for the start of a run with graphs: the bytes of activations and temporaries with them and without, on the
    rank with the most. Without, rows of other numbers each time leave holes: on two GPUs 42.9 GB in all were reserved
    and 37.2 used; with graphs, where 43.2 were planned, 45.6 and 44.0. So only a bound is given for ops without."""
    sizes = flight_sizes(plan, cuda=True)
    held = most_held(plan, sizes)
    extra = graph_bytes(plan, sizes, held, cuda=True)
    own = [most + temporary_bytes(plan, plan.blocks_of(rank), True) for rank, most in enumerate(held)]
    whole = [sum(both) for both in zip(own, extra, strict=True)]
    rank = whole.index(max(whole))
    least = max(own[rank], most_running(plan, sizes, running_bytes(plan, cuda=True))[rank])
    return (
        f"CUDA graphs hold {whole[rank] / 1e9:.3g} GB of activations and temporaries on pipeline rank {rank}, in "
        f"{sum(flights(plan, rank).values())} flights; ops without hold {least / 1e9:.3g} GB or more"
    )
