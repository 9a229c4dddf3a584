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
from functools import cached_property
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

    @cached_property
    def all_ops(self) -> frozenset[Op]:
        return frozenset(op for rank in range(len(self.ranks)) for op in self.ops(rank))

    def needs(self, op: Op) -> tuple[Op, ...]:
        """The ops that must have ended before `op` may start.

        This is the one dependency rule. The checker, the simulator, `lower` and the pictures call it; the executor and
        the searches read the edges that `lower` makes of it.
        """
        s, m, r = op.stage, op.microbatch, op.route
        if op.kind == "F":
            return (Op("F", s - 1, m, r),) if s else ()
        if op.kind == "W":
            return (Op("I", s, m, r),)
        own = (Op("F", s, m, r),)
        if s + 1 == self.stages:
            return own
        whole, inputs = Op("B", s + 1, m, r), Op("I", s + 1, m, r)
        return (*own, inputs if inputs in self.all_ops else whole)


class Edge(NamedTuple):
    """The tensors that go from an op to an op of a neighbouring stage.

    Between two ranks it is a message on the communicator (route, direction), which is FIFO from rank to rank. Between
    two stages of one rank (the turn of a V) the tensors stay in memory.
    """

    direction: Literal["down", "up"]  # down: activations, stage s to s+1; up: their gradients, s to s-1
    route: int
    stage: int  # the stage that receives
    microbatch: int
    source: int  # pipeline ranks
    target: int

    @property
    def is_message(self) -> bool:
        return self.source != self.target


@dataclass(frozen=True)
class ProgramStep:
    """A slot and the edges of its ops: `inputs[i]` enters and `outputs[i]` leaves op i, None where there is none."""

    slot: Slot
    inputs: tuple[Edge | None, ...]
    outputs: tuple[Edge | None, ...]

    @property
    def receives(self) -> tuple[Edge, ...]:
        """The messages that the slot waits for, in op order."""
        return tuple(edge for edge in self.inputs if edge and edge.is_message)

    @property
    def sends(self) -> tuple[Edge, ...]:
        """The messages that leave as soon as the slot has ended, in op order."""
        return tuple(edge for edge in self.outputs if edge and edge.is_message)


@dataclass(frozen=True)
class Program:
    """A lowered schedule: `ranks[p]` are the steps of pipeline rank p."""

    schedule: Schedule
    ranks: tuple[tuple[ProgramStep, ...], ...]
