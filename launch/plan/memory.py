"""Peak memory of each pipeline rank, by kind, before anything is built.

Weights, gradient sums, masters and moments follow from ZeRO's buckets and are exact; activations are
`trainer.activations` under the run's schedule. Data and expert ranks of one pipeline rank differ by padding only, so
one of them stands for all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from dryvine.comm.dispatch.backends import WINDOW_SLOTS
from dryvine.comm.integers import ceil_div, round_up
from dryvine.launch.plan.shards import BucketSize, buckets, parameters_of
from dryvine.launch.plan.traffic import Dispatching
from dryvine.launch.plan.transients import transients
from dryvine.parallel.flow_control import AHEAD, most_messages
from dryvine.trainer.activations import (
    DTYPE_BYTES,
    FlightSizes,
    flight_sizes,
    microbatch_size,
    most_held,
)
from dryvine.trainer.graph_memory import graph_bytes
from dryvine.trainer.model.parameters import ParameterSize
from dryvine.trainer.run_plan import LayoutPlan
from dryvine.trainer.stream_memory import Running, most_running, running_bytes
from dryvine.trainer.tensors.tiles import TILE

# Kinds, in the order of tables.
WEIGHTS, COPIES, SUMS, SHARDS = "weights", "FP8 copies of weights", "gradient sums", "summed gradient shards"
MASTERS, MOMENTS, GATES = "FP32 masters", "AdamW moments", "gate biases and loads"
ACTIVATIONS, MESSAGES, STAGING, TRANSIENT = "activations", "pipeline messages", "dispatch buffers", "temporaries"
AVERAGES = "average of masters, and a copy"
GRAPHS, STREAMS = "CUDA graphs", "held by streams"


@dataclass(frozen=True)
class RankMemory:
    """Bytes by kind of one pipeline rank."""

    rank: int
    kinds: dict[str, int]  # on its GPU
    host: dict[str, int]  # in its host's memory: averages, what is offloaded, copies

    @property
    def total(self) -> int:
        return sum(self.kinds.values())

    @property
    def on_host(self) -> int:
        return sum(self.host.values())


class Parts(NamedTuple):
    """What memory is made of; layouts with the same of these share them, whatever their order of ops."""

    buckets: list[list[BucketSize]]  # of each pipeline rank
    flights: FlightSizes
    running: Running


def parts_of(plan: LayoutPlan, cuda: bool) -> Parts:
    return Parts(buckets(plan), flight_sizes(plan, cuda), running_bytes(plan, cuda))


def memory(plan: LayoutPlan, parts: Parts, sent: Dispatching, cuda: bool) -> list[RankMemory]:
    """Peak memory of every pipeline rank. `sent`: what its dispatcher moves."""
    held = most_held(plan, parts.flights)
    running = most_running(plan, parts.flights, parts.running)
    graphs = graph_bytes(plan, parts.flights, held, cuda)
    if plan.config.parallel.ep > 1 and not sent.recorded:
        graphs = [0] * len(held)  # `auto` takes another here
    ranks = zip(parts.buckets, held, running, graphs, strict=True)
    return [
        RankMemory(rank, _kinds(plan, _Rank(rank, mine, *most), sent, cuda), host_state(plan, mine))
        for rank, (mine, *most) in enumerate(ranks)
    ]


class _Rank(NamedTuple):
    number: int  # of the pipeline rank
    buckets: list[BucketSize]
    activations: int  # the most that its flights keep
    running: int  # the same with what ops hold while they run
    graphs: int  # what CUDA graphs hold in addition


def _kinds(plan: LayoutPlan, rank: _Rank, sent: Dispatching, cuda: bool) -> dict[str, int]:
    config, parameters = plan.config, parameters_of(plan, rank.number)
    gates = sum(name.endswith("gate.weight") for name in parameters)
    kinds = state(plan, rank.buckets)
    if config.fp8.fp8:
        ways = 1 if "transposes" in config.model.recompute else 2
        kinds[COPIES] = sum(_copies(one, config.parallel.ep, ways) for one in parameters.values())
    kinds[GATES] = 12 * config.model.routed * gates
    kinds[ACTIVATIONS] = rank.activations
    boundary = microbatch_size(config, cuda).tokens * config.model.hidden * DTYPE_BYTES[config.run.dtype]
    kinds[MESSAGES] = boundary * most_messages(plan.footprint.messages[rank.number], AHEAD)
    kinds[STAGING] = staging(sent) if gates else 0
    kinds[TRANSIENT] = transients(plan, rank.number, rank.buckets, rank.activations, cuda)
    kinds[GRAPHS] = rank.graphs
    # Among what an op needs are its temporaries; and where ops are replayed, only the rehearsal needs it.
    kinds[STREAMS] = max(rank.running - rank.activations - kinds[TRANSIENT] - rank.graphs, 0)
    return kinds


def state(plan: LayoutPlan, mine: Iterable[BucketSize]) -> dict[str, int]:
    """Bytes that stay allocated between steps on the GPU."""
    wide, mine = DTYPE_BYTES[plan.config.run.dtype], list(mine)
    kinds = {
        WEIGHTS: wide * sum(b.padded for b in mine),
        SUMS: 4 * sum(b.padded for b in mine),
        # Where there is one copy, its sums are the shard.
        SHARDS: 4 * sum(b.shard for b in mine if b.copies > 1),
    }
    return kinds if plan.config.optim.offload == "cpu" else kinds | _optimizer(plan, mine)


def host_state(plan: LayoutPlan, mine: Iterable[BucketSize]) -> dict[str, int]:
    """The same in host memory: with offload, the optimizer's state and summed gradients on their way to it; with an
    average, it and the copy of the masters that it takes (`trainer.ema`)."""
    mine, optim = list(mine), plan.config.optim
    owned = 4 * sum(bucket.shard for bucket in mine)
    kinds = _optimizer(plan, mine) | {SHARDS: owned} if optim.offload == "cpu" else {}
    return kinds | ({AVERAGES: 2 * owned} if optim.ema else {})


def _optimizer(plan: LayoutPlan, mine: Iterable[BucketSize]) -> dict[str, int]:
    owned = sum(bucket.shard for bucket in mine)
    return {MASTERS: 4 * owned, MOMENTS: 2 * DTYPE_BYTES[plan.config.optim.moments] * owned}


def _copies(parameter: ParameterSize, ep: int, ways: int) -> int:
    """Blocks for Fprop, and for Dgrad where both `ways` are kept: a byte an element, and FP32 scales of 128x128."""
    if not parameter.linear:
        return 0
    rows, cols = parameter.shape[-2:]
    elements = parameter.elements(ep)
    matrices = elements // (rows * cols)
    scales = [ceil_div(a, TILE) * round_up(ceil_div(b, TILE), 4) for a, b in ((rows, cols), (cols, rows))]
    return ways * elements + 4 * matrices * sum(scales[:ways])


def staging(sent: Dispatching) -> int:
    """Bytes of wire rows, sent and received, of the largest all-to-all; with nvlink, of its slots or rings."""
    copies = WINDOW_SLOTS if sent.recorded else 2
    return sent.rings + copies * max(sum(b.values()) for b in (sent.dispatch, sent.combine, sent.dispatch_backward))
