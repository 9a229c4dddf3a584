"""Memory that comes and goes within a step: the largest sum of tensors that no microbatch keeps.

Two moments can be the fullest: inside a block (`trainer.temporaries`), or in the optimizer, when all activations are
gone. What counts is how much a moment needs above the activations held then.
"""

from __future__ import annotations

from collections.abc import Iterable

from dryvine.launch.plan.shards import BucketSize
from dryvine.trainer.run_plan import RunPlan
from dryvine.trainer.temporaries import temporary_bytes


def transients(plan: RunPlan, rank: int, mine: Iterable[BucketSize], held: int, cuda: bool) -> int:
    """Bytes above the most that flights of the rank keep, `held`."""
    return max(temporary_bytes(plan, plan.blocks_of(rank), cuda), _in_optimizer(mine, cuda) - held, 0)


def _in_optimizer(mine: Iterable[BucketSize], cuda: bool) -> int:
    """A CPU takes norms of FP64 copies, a part of the shards at a time (`zero.NORM_PART`)."""
    part = 1 << 24
    return 0 if cuda else 8 * max(min(part, bucket.shard) for bucket in mine)
