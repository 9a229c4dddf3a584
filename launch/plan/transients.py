"""Memory that is allocated and freed within a step: the largest sum of tensors that no microbatch keeps.

The peak is in one of two places: inside a block (`trainer.temporaries`), or in the optimizer, when all activations are
free. What counts is a moment's need on top of the activations held then.
"""

from __future__ import annotations

from collections.abc import Iterable

from dryvine.launch.plan.shards import BucketSize
from dryvine.trainer.run_plan import LayoutPlan
from dryvine.trainer.temporaries import temporary_bytes


def transients(plan: LayoutPlan, rank: int, mine: Iterable[BucketSize], held: int, cuda: bool) -> int:
    """Bytes above `held`, the most that the rank's flights keep."""
    return max(temporary_bytes(plan, plan.blocks_of(rank), cuda), _in_optimizer(mine, cuda) - held, 0)


def _in_optimizer(mine: Iterable[BucketSize], cuda: bool) -> int:
    """Bytes of the optimizer's temporaries. On a CPU, norms copy a part of the shards at a time to FP64
    (`zero.NORM_PART`)."""
    part = 1 << 24
    return 0 if cuda else 8 * max(min(part, bucket.shard) for bucket in mine)
