"""A pipeline schedule as a value: which op runs on which rank, in which order.

One value feeds the checker, the simulator, the pictures and the executor, so what is drawn is what runs. The
alternative, a schedule fused with its execution (the DualPipe release, Megatron), can be neither printed nor proven
before a GPU is held.

`routes[r][s]` is the rank of stage `s` on route `r`. 1F1B has one route; DualPipe has two opposite ones, so every
stage lives on two ranks; DualPipeV has one route that turns back, so every rank holds two stages. A microbatch
travels exactly one route, and its number is unique in the step.

A slot holds one op, or a pair of ops of different microbatches that the executor interleaves phase by phase
(DeepSeek-V3, arXiv 2412.19437, section 3.2.1). The order of slots on a rank is all the timing there is: an op starts
when its rank reaches it and what it `needs` has ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "I", "W"]


class Op(NamedTuple):
    """F = forward, B = whole backward, I = backward for inputs only, W = the weight gradients that I left."""

    kind: Kind
    stage: int
    microbatch: int
    route: int = 0


Slot = tuple[Op, ...]


@dataclass(frozen=True)
class Schedule:
    """`ranks[p]` is the list of slots of pipeline rank p, each a tuple of one op or of two that run as a pair."""

    name: str
    microbatches: int
    routes: tuple[tuple[int, ...], ...]
    ranks: tuple[tuple[Slot, ...], ...]

    @property
    def stages(self) -> int:
        return len(self.routes[0])

    def rank_of(self, op: Op) -> int:
        return self.routes[op.route][op.stage]

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages whose weights `rank` holds, ascending."""
        return tuple(sorted({s for route in self.routes for s, r in enumerate(route) if r == rank}))

    def copies(self, stage: int) -> tuple[int, ...]:
        """The ranks that hold `stage`, ascending; their gradients are summed."""
        return tuple(sorted({route[stage] for route in self.routes}))

    def ops(self, rank: int) -> Iterator[Op]:
        return (op for slot in self.ranks[rank] for op in slot)

    def needs(self, op: Op) -> tuple[tuple[Op, ...], ...]:
        """What must have ended before `op` may start: every group, by any one op of it.

        This is the one dependency rule; the checker, the lowering, the simulator and the search all read it.
        """
        s, m, r = op.stage, op.microbatch, op.route
        if op.kind == "F":
            return ((Op("F", s - 1, m, r),),) if s else ()
        if op.kind == "W":
            return ((Op("I", s, m, r),),)
        own: tuple[tuple[Op, ...], ...] = ((Op("F", s, m, r),),)
        if s + 1 < self.stages:
            own += ((Op("B", s + 1, m, r), Op("I", s + 1, m, r)),)
        return own


class Edge(NamedTuple):
    """One tensor bundle from stage to stage. Its communicator is (route, direction): FIFO between each two ranks."""

    direction: Literal["down", "up"]  # down: activations, stage s to s+1; up: their gradients, s to s-1
    route: int
    stage: int  # the stage that receives
    microbatch: int
    source: int  # pipeline ranks
    target: int


@dataclass(frozen=True)
class Step:
    """A slot with the messages that it waits for and those that it sends as soon as its ops have made them."""

    slot: Slot
    receives: tuple[Edge, ...]
    sends: tuple[Edge, ...]


Program = tuple[tuple[Step, ...], ...]  # per pipeline rank
