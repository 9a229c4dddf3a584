"""What ops and pairs cost. A pair of any two kinds is priced by two lanes: compute and communication.

In each of a stage's `layers`, F is attention, dispatch, experts, combine; I is the mirror; W is arithmetic alone, in
two pieces; B is I with each layer's W at its place. `comm` is the part of F and of I that is all-to-all. A pair is then
two jobs on two machines, and its price is the shortest run of both in which each lane serves one job at a time: the
best that an executor which interleaves phases can do (arXiv 2412.19437, figure 4, is one such run).

One number per pair, as most simulators take, would need ten guesses and none could be wrong in a way one can see.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations_with_replacement
from typing import Literal, NamedTuple

from dryvine.parallel.schedule.ir import Kind, Slot
from dryvine.parallel.schedule.rules import ScheduleError

Lane = Literal["compute", "comm"]
KINDS: tuple[Kind, ...] = ("F", "B", "I", "W")
PAIRS = tuple("".join(sorted(pair)) for pair in combinations_with_replacement(KINDS, 2))


class Phase(NamedTuple):
    lane: Lane
    time: float


@dataclass(frozen=True)
class Costs:
    """Times in any one unit. B is I + W. A pair in `pairs` (letters sorted: "BF") has that price, else the lanes'.

    P2P: from the end of an op to the start of what needs it on another rank. comm: part of F and I, 0 to 1; at 0 a
    pair costs the sum of its ops, for nothing can hide.
    """

    F: float = 1.0
    I: float = 1.0  # noqa: E741
    W: float = 1.0
    P2P: float = 0.0
    comm: float = 0.0
    layers: int = 4
    pairs: Mapping[str, float] = field(default_factory=dict)

    def op(self, kind: Kind) -> float:
        return {"F": self.F, "I": self.I, "W": self.W, "B": self.I + self.W}[kind]

    def slot(self, slot: Slot) -> float:
        return self.op(slot[0].kind) if len(slot) == 1 else self.pair(slot[0].kind, slot[1].kind)

    def pair(self, a: Kind, b: Kind) -> float:
        key = "".join(sorted((a, b)))
        return self.pairs[key] if key in self.pairs else makespan(self.phases(a), self.phases(b))

    def phases(self, kind: Kind) -> tuple[Phase, ...]:
        """The op as a chain over its layers: see the module docstring."""
        pieces = 2 * self.layers
        total, weight = {"F": (self.F, 0.0), "I": (self.I, 0.0), "W": (0.0, self.W), "B": (self.I, self.W)}[kind]
        compute = Phase("compute", (total * (1 - self.comm) + weight) / pieces)
        comm = Phase("comm", total * self.comm / pieces)
        one = (compute, comm) if kind == "F" else (comm, compute)
        return tuple(phase for phase in one * pieces if phase.time > 0)

    @staticmethod
    def parse(text: str) -> Costs:
        """From "F=1,I=1.3,W=0.8,P2P=0.1,COMM=0.33,LAYERS=4", and any pair, such as "FB=2.4"."""
        values = dict(_item(item) for item in text.split(",") if item.strip())
        pairs = {key: values.pop(key) for key in PAIRS if key in values}
        known = {name: values.pop(name) for name in ("F", "I", "W", "P2P") if name in values}
        layers, comm = int(values.pop("LAYERS", 4)), values.pop("COMM", 0.0)
        if values or layers < 1 or not 0 <= comm < 1:
            wrong = ", ".join(values) or "LAYERS or COMM out of range"
            raise ScheduleError(
                f"costs {text!r}: {wrong}; keys are F I W P2P COMM (0 to 1) LAYERS (1 up), or a pair: FB"
            )
        return Costs(**known, comm=comm, layers=layers, pairs=pairs)


def _item(item: str) -> tuple[str, float]:
    key, _, value = item.strip().partition("=")
    key = key.upper()
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ScheduleError(f"cost {item.strip()!r}: write KEY=NUMBER with a number from 0 up, such as F=1 or FB=2.4")
    return "".join(sorted(key)) if "".join(sorted(key)) in PAIRS else key, number


class _Front(NamedTuple):
    """How far two jobs have come: when each may go on, and when each lane is free."""

    a: float
    b: float
    compute: float
    comm: float


@lru_cache(maxsize=256)
def makespan(a: tuple[Phase, ...], b: tuple[Phase, ...]) -> float:
    """The shortest time in which chains `a` and `b` both end, each lane serving one phase at a time, unbroken.

    Exact: at each (phases of a done, phases of b done) all fronts are kept that no other one dominates.
    """
    fronts: dict[tuple[int, int], set[_Front]] = {(0, 0): {_Front(0.0, 0.0, 0.0, 0.0)}}
    for i in range(len(a) + 1):
        for j in range(len(b) + 1):
            here = fronts[i, j] = _best(fronts[i, j])
            for front in here:
                if i < len(a):
                    fronts.setdefault((i + 1, j), set()).add(_advance(front, "a", a[i]))
                if j < len(b):
                    fronts.setdefault((i, j + 1), set()).add(_advance(front, "b", b[j]))
    return min(max(front) for front in fronts[len(a), len(b)])


def _advance(front: _Front, job: Literal["a", "b"], phase: Phase) -> _Front:
    end = max(getattr(front, job), getattr(front, phase.lane)) + phase.time
    return front._replace(**{job: end, phase.lane: end})


def _best(fronts: set[_Front]) -> set[_Front]:
    def dominated(front: _Front) -> bool:
        return any(o != front and all(x <= y for x, y in zip(o, front, strict=True)) for o in fronts)

    return {front for front in fronts if not dominated(front)}
