"""ZeRO's buckets of a layout, computed without building them: how many elements, over how many copies.

They follow the rule of `parallel.buckets`, which the run uses too, so bytes of weights, sums, masters and moments are
exact, with padding.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from dryvine.parallel.buckets import BucketEntry, BucketLayout, Holders, ReadingLayer, layouts
from dryvine.trainer.model.parameters import ParameterSize, parameters
from dryvine.trainer.run_plan import LayoutPlan


@dataclass(frozen=True)
class BucketSize:
    """A bucket of one rank."""

    layout: BucketLayout
    copies: int

    @property
    def homes(self) -> tuple[int, ...]:
        """The pipeline ranks that hold its parameters."""
        return self.layout.copies.homes

    @property
    def one_slice(self) -> bool:
        """Whether only one expert-parallel rank holds these elements, as with experts."""
        return self.layout.copies.ep is not None

    @property
    def padded(self) -> int:
        return self.layout.padded(self.copies)

    @property
    def shard(self) -> int:
        return self.padded // self.copies


def parameters_of(plan: LayoutPlan, pp_rank: int) -> dict[str, ParameterSize]:
    """The parameters of a pipeline rank, by name."""
    names = [name for blocks in plan.blocks_of(pp_rank).values() for name in blocks]
    return parameters(plan.config.model, names)


def buckets(plan: LayoutPlan) -> list[list[BucketSize]]:
    """The buckets of each pipeline rank, for its first expert-parallel rank."""
    p = plan.config.parallel
    by_rank = [parameters_of(plan, rank) for rank in range(p.pp)]
    homes: defaultdict[str, list[int]] = defaultdict(list)
    for rank, names in enumerate(by_rank):
        for name in names:
            homes[name].append(rank)
    entries = _entries(plan, homes)
    return [_of_rank([entries[name] for name in names], p.dp, p.ep) for names in by_rank]


def _entries(plan: LayoutPlan, homes: dict[str, list[int]]) -> dict[str, BucketEntry]:
    ep, readers = plan.config.parallel.ep, defaultdict[str, list[ReadingLayer]](list)
    sizes: dict[str, ParameterSize] = {}
    layers = [(stage, layer) for stage, names in enumerate(plan.blocks) for layer in names]
    for place, (stage, layer) in enumerate(layers):
        for name, size in parameters(plan.config.model, [layer]).items():
            readers[name].append(ReadingLayer(place, stage, layer))
            sizes[name] = size
    return {
        name: BucketEntry(
            name,
            size.elements(ep),
            len(size.shape) > 1,
            Holders(tuple(homes[name]), 0 if size.expert and ep > 1 else None),
            tuple(readers[name]),
            plan.config.run.dtype,
        )
        for name, size in sizes.items()
    }


def _of_rank(entries: list[BucketEntry], dp: int, ep: int) -> list[BucketSize]:
    made = layouts(entries)
    return [BucketSize(of, len(of.copies.homes) * dp * (1 if of.copies.ep is not None else ep)) for of in made]
