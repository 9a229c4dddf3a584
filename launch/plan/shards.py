"""ZeRO's buckets of a layout, counted instead of built: how many elements, over how many copies.

The same rule as `parallel.zero`: parameters held by the same ranks share one flat bucket, padded to a multiple of their
number. So bytes of weights, sums, masters and moments are exact, padding included.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from dryvine.comm.integers import round_up
from dryvine.trainer.model.parameters import ParameterSize, parameters
from dryvine.trainer.run_plan import RunPlan


@dataclass(frozen=True)
class BucketSize:
    """A bucket of one rank."""

    homes: tuple[int, ...]  # pipeline ranks that hold its parameters
    one_slice: bool  # of the experts, so that copies are those of one expert-parallel rank
    elements: int
    copies: int

    @property
    def padded(self) -> int:
        return round_up(self.elements, self.copies)

    @property
    def shard(self) -> int:
        return self.padded // self.copies

    def owned(self, index: int = 0) -> int:
        """Elements that are no padding in the shard of the copy of that number. The first copy owns most."""
        return max(0, min(self.elements - index * self.shard, self.shard))


def held(plan: RunPlan, pp_rank: int) -> dict[str, ParameterSize]:
    """The parameters of a pipeline rank, by name."""
    names = [name for blocks in plan.blocks_of(pp_rank).values() for name in blocks]
    return parameters(plan.config.model, names)


def buckets(plan: RunPlan) -> list[list[BucketSize]]:
    """Those of each pipeline rank."""
    p = plan.config.parallel
    by_rank = [held(plan, rank) for rank in range(p.pp)]
    homes: defaultdict[str, list[int]] = defaultdict(list)
    for rank, names in enumerate(by_rank):
        for name in names:
            homes[name].append(rank)
    return [_of_rank(names, homes, p.dp, p.ep) for names in by_rank]


def _of_rank(names: dict[str, ParameterSize], homes: dict[str, list[int]], dp: int, ep: int) -> list[BucketSize]:
    sizes: Counter[tuple[tuple[int, ...], bool]] = Counter()
    for name, parameter in names.items():
        sizes[tuple(homes[name]), parameter.expert and ep > 1] += parameter.elements(ep)
    return [
        BucketSize(ranks, one_slice, elements, len(ranks) * dp * (1 if one_slice else ep))
        for (ranks, one_slice), elements in sizes.items()
    ]
