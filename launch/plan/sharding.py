"""The time that ZeRO-1 adds to a step: gradient sums under the pipeline's tail, the update, and gathers under the next
forwards.

Each rank's buckets are sent one after the other in the order that the run uses (`parallel.buckets`). A bucket's sum can
start when its last copy has all its gradients, and is exposed for the part that ends after the step's last slot; a
gather is exposed for the part that ends after the first forward that reads it would have started.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from dryvine.comm.topology import LinkClass, Topology
from dryvine.launch.plan import traffic
from dryvine.launch.plan.hardware import GIGA, Machine
from dryvine.launch.plan.shards import BucketSize, buckets
from dryvine.launch.plan.traffic import LinkBytes, topology_of
from dryvine.parallel.buckets import StageTimes, equal_times, stage_times, turns
from dryvine.parallel.schedule.simulate import Timeline
from dryvine.trainer.activations import DTYPE_BYTES
from dryvine.trainer.config import Config
from dryvine.trainer.run_plan import LayoutPlan


class Transfers(NamedTuple):
    """Of the rank that sends most, in a step."""

    bytes: LinkBytes
    seconds: float  # alone
    exposed: float  # exposed: not hidden by compute, for the rank with most


class Sharding(NamedTuple):
    sums: Transfers
    gathers: Transfers
    update_seconds: float  # norm, clip and AdamW, of the slowest rank; with offload, new weights to the GPU too

    @property
    def bytes(self) -> LinkBytes:
        """Sums and gathers."""
        links: tuple[LinkClass, ...] = ("intra", "inter")
        return Counter({link: self.sums.bytes[link] + self.gathers.bytes[link] for link in links})


class _Times(NamedTuple):
    equal: StageTimes  # if all ops cost the same, which sets the order of buckets
    planned: StageTimes  # in seconds from the start of a step
    end: float  # of the step's last slot


def shard(run: LayoutPlan, machine: Machine, timeline: Timeline, per_element: float | None) -> Sharding:
    """ZeRO's transfers and update. `per_element`: measured seconds of the update; None: by memory bandwidth."""
    config, every, topology = run.config, buckets(run), topology_of(run.config, machine)
    end = max(cell.end for row in timeline.cells for cell in row)
    times = _Times(equal_times(run.schedule), stage_times(timeline), end)
    sums, gathers = (
        [[_moved(run, one, topology, width) for one in mine] for mine in every]
        for width in (sum_bytes(config), DTYPE_BYTES[config.run.dtype])
    )
    update = update_seconds(config, every, machine, per_element)
    if config.parallel.overlap == "off":
        return Sharding(_transfers(machine, sums, None), _transfers(machine, gathers, None), update)
    ranks = zip(every, sums, gathers, strict=True)
    exposed = [_exposed(run, machine, mine, times, _each(machine, s), _each(machine, g)) for mine, s, g in ranks]
    return Sharding(
        _transfers(machine, sums, max(late for late, _ in exposed)),
        _transfers(machine, gathers, max(late for _, late in exposed)),
        update,
    )


def sum_bytes(config: Config) -> int:
    """Bytes of one gradient element on its way to its owner."""
    return DTYPE_BYTES[config.optim.sums]


def _transfers(machine: Machine, by_rank: Sequence[Sequence[LinkBytes]], exposed: float | None) -> Transfers:
    """Totals over buckets. `exposed` None: nothing is hidden."""
    worst = max((sum(moved, Counter()) for moved in by_rank), key=lambda sent: traffic.send_seconds(sent, machine))
    seconds = traffic.send_seconds(worst, machine)
    return Transfers(worst, seconds, seconds if exposed is None else exposed)


def _each(machine: Machine, moved: Iterable[LinkBytes]) -> list[float]:
    return [traffic.send_seconds(sent, machine) for sent in moved]


def _exposed(
    run: LayoutPlan, machine: Machine, mine: list[BucketSize], times: _Times, sums: list[float], gathers: list[float]
) -> tuple[float, float]:
    """Exposed seconds of a rank: of its sums after the last slot, and of its gathers after the first reads."""
    made = [one.layout for one in mine]
    order = turns(times.equal, made)
    fetch = [_fetch_seconds(run.config, one, machine) for one in mine]
    sent = fetched = 0.0
    for number in order.sums:
        sent = max(sent, *(times.planned.summed[stage] for stage in made[number].stages)) + sums[number]
        fetched = max(fetched, sent) + fetch[number]
    arrived = accumulate(gathers[number] for number in order.gathers)
    read = [min(times.planned.read[stage] for stage in made[number].stages) for number in order.gathers]
    late = (there - needed for there, needed in zip(arrived, read, strict=True))
    return max(fetched - times.end, 0.0), max(0.0, *late)


def _moved(run: LayoutPlan, bucket: BucketSize, topology: Topology, width: int) -> LinkBytes:
    """Bytes by link class of a ring reduce-scatter or all-gather: between nodes all but the node's own part, once
    for all its members; the rest inside the node. `width`: bytes of an element."""
    together = bucket.copies if len(topology.nodes) == 1 else _in_node(bucket, run, topology)
    nodes, size = bucket.copies / together, width * bucket.padded
    moved = {
        "inter": round(size * (nodes - 1) / nodes / together),
        "intra": round(size * (together - 1) / together),
    }
    return Counter(moved)  # type: ignore[arg-type]


def _in_node(bucket: BucketSize, run: LayoutPlan, topology: Topology) -> int:
    """How many copies of a bucket are on the node of the first."""
    p = run.config.parallel
    ranks = [
        (home * p.dp + d) * p.ep + e
        for home in bucket.homes
        for d in range(p.dp)
        for e in (range(1) if bucket.one_slice else range(p.ep))
    ]
    node = frozenset(topology.nodes[topology.node_of(ranks[0])])
    return sum(rank in node for rank in ranks)


def _fetch_seconds(config: Config, bucket: BucketSize, machine: Machine) -> float:
    """Seconds to copy a summed shard to host memory."""
    return 4 * bucket.shard / (machine.host.link * GIGA) if config.optim.offload == "cpu" else 0.0


def update_seconds(
    config: Config, every: Iterable[list[BucketSize]], machine: Machine, per_element: float | None
) -> float:
    """Seconds of the update, of the slowest rank."""
    return max(_update_seconds(config, mine, machine, per_element) for mine in every)


def _update_seconds(config: Config, mine: Iterable[BucketSize], machine: Machine, per_element: float | None) -> float:
    """Seconds of the update: as profiled, else by the memory traffic of norm and AdamW (gradients zeroed and read
    twice, masters and moments read and written, weights written). With offload it is the host's memory, where the clip
    is a pass of its own, and weights are copied back meanwhile."""
    state = 4 * 5 + 2 * 2 * DTYPE_BYTES[config.optim.moments]
    owned = sum(bucket.shard for bucket in mine)
    if config.optim.offload == "cpu":
        back = owned * DTYPE_BYTES[config.run.dtype] / (machine.host.link * GIGA)
        return max(owned * (state + 4 * 2) / (machine.host.bandwidth * GIGA), back)
    if per_element is not None:
        return owned * per_element
    touched = state + DTYPE_BYTES[config.run.dtype]
    return owned * touched / (machine.memory_bandwidth * machine.streaming * GIGA)
