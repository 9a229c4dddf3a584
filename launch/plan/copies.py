"""Host memory of copies of a rank's state: the buffer from which checkpoints are written, and those that
`run.buddy_every` keeps of its own and of ranks of another node.

A copy holds the tensors of a rank's state; headers and manifests, some kilobytes, are not counted. While one is
written the one before is still there, and the state lies in a buffer from which it is written, so a rank with one ward
takes five times its state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dryvine.comm.topology import Topology, wards_of
from dryvine.launch.plan.memory import RankMemory
from dryvine.launch.plan.shards import BucketSize, parameters_of
from dryvine.trainer.activations import DTYPE_BYTES
from dryvine.trainer.config import Config
from dryvine.trainer.run_plan import LayoutPlan

SAVES = "buffer of checkpoints"
BUFFER, IN_MEMORY = "buffer of copies in memory", "copies in memory, old and new"
STEP = 4  # bytes of a piece's count of updates


def with_saves(plan: LayoutPlan, ranks: Sequence[RankMemory], every: Sequence[list[BucketSize]]) -> list[RankMemory]:
    """`ranks` with the buffer of checkpoints in their host memory. What ranks hold alike, the first of them stores."""
    gates, found = set[str](), list[RankMemory]()
    for rank, mine in zip(ranks, every, strict=True):
        own = {name for name in parameters_of(plan, rank.rank) if name.endswith("gate.weight")}
        stored = state_bytes(plan, rank.rank, mine) - _bias_bytes(plan, len(own & gates))
        gates |= own
        found.append(replace(rank, host=rank.host | {SAVES: stored}))
    return found


def with_copies(
    plan: LayoutPlan, ranks: Sequence[RankMemory], every: Sequence[list[BucketSize]], topology: Topology
) -> list[RankMemory]:
    """`ranks` with the peak of these copies in their host memory. `every`: buckets of each pipeline rank."""
    p = plan.config.parallel
    states = [state_bytes(plan, rank, mine) for rank, mine in enumerate(every)]
    wards = (
        wards_of(topology, rank.rank * p.dp * p.ep) if len(topology.nodes) > 1 else () for rank in ranks
    )  # of the first rank of each pipeline rank
    return [
        replace(
            rank, host=rank.host | {BUFFER: own, IN_MEMORY: 2 * (own + sum(states[w // (p.dp * p.ep)] for w in of))}
        )
        for rank, own, of in zip(ranks, states, wards, strict=True)
    ]


def state_bytes(plan: LayoutPlan, pp_rank: int, mine: Sequence[BucketSize]) -> int:
    """Bytes of the tensors that a checkpoint holds of the first rank of a pipeline rank."""
    gates = sum(name.endswith("gate.weight") for name in parameters_of(plan, pp_rank))
    pieces = [span.elements for one in mine for span in one.layout.spans(_first_copy(one, pp_rank), one.shard)]
    return element_bytes(plan.config) * sum(pieces) + STEP * len(pieces) + _bias_bytes(plan, gates)


def _first_copy(bucket: BucketSize, pp_rank: int) -> int:
    """The number of the copy that the first rank of a pipeline rank has."""
    return bucket.homes.index(pp_rank) * bucket.copies // len(bucket.homes)


def _bias_bytes(plan: LayoutPlan, gates: int) -> int:
    return 4 * plan.config.model.routed * gates


def element_bytes(config: Config) -> int:
    """Master, two moments, and the average where there is one."""
    return 4 + 2 * DTYPE_BYTES[config.optim.moments] + (4 if config.optim.ema else 0)
