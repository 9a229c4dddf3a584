"""How long the phases of each kind of block take, and from them every op and pair of a schedule.

`PhaseTimes` come from a roofline over a machine's rates (`roofline`) or from `dryvine profile`; all after them is the
same. An op is a chain of compute and messages in the order in which the executor runs its phases, and a pair costs
the shortest run of both chains on the two resources (`makespan`), as in `schedule.costs`. There every stage costs the
same; here each has its own blocks, so the stage with the head is as slow as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from dryvine.launch.plan.hardware import GIGA, TERA, Machine
from dryvine.launch.plan.traffic import Messages
from dryvine.launch.plan.work import STREAM, Task
from dryvine.parallel.schedule.ir import Kind, Op, Slot
from dryvine.parallel.schedule.makespan import Work, makespan

MOST_LAYERS = 6  # of a chain that is searched for its shortest run; a longer one goes on at the same pace


class OpTimes(NamedTuple):
    """Seconds of a phase's F, I and W."""

    forward: float = 0.0
    inputs: float = 0.0
    weights: float = 0.0

    def plus(self, other: OpTimes) -> OpTimes:
        return OpTimes(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> OpTimes:
        return OpTimes(*(factor * a for a in self))


PhaseTimes = dict[str, OpTimes]  # phase -> seconds, in forward order


def roofline(tasks: list[Task], machine: Machine, fp8: bool) -> PhaseTimes:
    """Seconds of each phase, with each kernel at the machine's rate for it. FP8's casts are a share of all
    arithmetic except the head's, which is not in FP8."""
    found: PhaseTimes = {}
    for task in tasks:
        rate = _rate(task.kernel, machine) * (1 - machine.casts if fp8 and task.phase != "head" else 1)
        seconds = OpTimes(task.forward / rate, task.inputs / rate, task.weights / rate)
        found[task.phase] = found.get(task.phase, OpTimes()).plus(seconds)
    return found


def _rate(kernel: str, machine: Machine) -> float:
    """FLOP/s or bytes/s of a kernel."""
    if kernel == STREAM:
        return machine.memory_bandwidth * machine.streaming * GIGA
    return float(getattr(machine.tflops, kernel)) * TERA


@dataclass(frozen=True)
class StagePrices:
    """Seconds of a schedule's ops and pairs, by stage; `simulate` accepts it in place of `Costs`."""

    stages: tuple[tuple[PhaseTimes, ...], ...]  # of each stage, its blocks' phases
    messages: Messages
    overlap: bool  # pairs are woven; else one op after the other
    beside_comm: float = 1.0  # factor on arithmetic that shares the device with an all-to-all
    whole: float = 1.0  # a B over the sum of its I and its W
    P2P: float = 0.0

    @cached_property
    def _prices(self) -> dict[tuple[tuple[Kind, int], ...], float]:
        return {}

    def slot(self, slot: Slot) -> float:
        """Seconds of a slot. Cached, since a schedule has few kinds of slots."""
        key = tuple(sorted((op.kind, op.stage) for op in slot))
        if key not in self._prices:
            self._prices[key] = self._pair(*slot) if len(slot) == 2 else self.lone(slot[0])
        return self._prices[key]

    def lone(self, op: Op) -> float:
        return sum(work.time for work in self.chain(op.kind, op.stage))

    def compute(self, slot: Slot) -> float:
        """Seconds of a slot's arithmetic when nothing runs beside it."""
        works = (work for op in slot for work in self.chain(op.kind, op.stage))
        return sum(work.time for work in works if work.resource == "compute")

    def exposed(self, slot: Slot) -> float:
        """Seconds of a slot in which messages are under way and no arithmetic is. The slowdown of arithmetic beside
        messages is not counted."""
        if len(slot) == 1 or not self.overlap:
            return self.slot(slot) - self.compute(slot)
        return max(0.0, self.slot(slot) - self._pace(slot) * self.compute(slot))

    def _pace(self, slot: Slot) -> float:
        """Factor on the arithmetic time of a pair."""
        talks = any(work.resource == "comm" for op in slot for work in self.chain(op.kind, op.stage))
        return self.beside_comm if talks else 1.0

    def _pair(self, a: Op, b: Op) -> float:
        if not self.overlap:
            return self.lone(a) + self.lone(b)
        pace = self._pace((a, b))
        one, other = (_slowed(self.chain(op.kind, op.stage), pace) for op in (a, b))
        return _woven(one, other)

    def chain(self, kind: Kind, stage: int) -> tuple[Work, ...]:
        """The phases of an op in order, with neighbours on the same resource merged."""
        blocks = self.stages[stage]
        if kind == "F":
            pieces = [piece for block in blocks for piece in _forward(block, self.messages)]
        elif kind == "W":
            pieces = [Work("compute", sum(t.weights for t in block.values())) for block in blocks]
            return tuple(piece for piece in pieces if piece.time)
        else:
            both = self.whole if kind == "B" else None
            pieces = [piece for block in reversed(blocks) for piece in _backward(block, self.messages, both)]
        return tuple(_merged(pieces))


def _forward(block: PhaseTimes, messages: Messages) -> Iterator[Work]:
    for phase, times in block.items():
        if phase == "experts":
            yield Work("comm", messages.dispatch)
        yield Work("compute", times.forward)
        if phase == "experts":
            yield Work("comm", messages.combine)


def _backward(block: PhaseTimes, messages: Messages, whole: float | None) -> Iterator[Work]:
    """`whole`: the factor of a B; None for an I."""
    for phase, times in reversed(block.items()):
        if phase == "experts":
            yield Work("comm", messages.combine_backward)
        yield Work("compute", times.inputs if whole is None else whole * (times.inputs + times.weights))
        if phase == "experts":
            yield Work("comm", messages.dispatch_backward)


def _merged(pieces: list[Work]) -> Iterator[Work]:
    last: Work | None = None
    for piece in pieces:
        if not piece.time:
            continue
        if last and last.resource == piece.resource:
            last = Work(last.resource, last.time + piece.time)
            continue
        if last:
            yield last
        last = piece
    if last:
        yield last


def _slowed(chain: tuple[Work, ...], pace: float) -> tuple[Work, ...]:
    return tuple(Work(w.resource, w.time * (pace if w.resource == "compute" else 1.0)) for w in chain)


def _woven(a: tuple[Work, ...], b: tuple[Work, ...]) -> float:
    """The shortest run of two chains; of long chains, the run of their first layers, scaled to the rest."""
    most = 4 * MOST_LAYERS
    longest = max(len(a), len(b))
    if longest <= most:
        return makespan(a, b)
    heads = [chain[: max(1, len(chain) * most // longest)] for chain in (a, b)]
    whole, part = (sum(w.time for chain in chains for w in chain) for chains in ((a, b), heads))
    return makespan(*heads) * whole / part
