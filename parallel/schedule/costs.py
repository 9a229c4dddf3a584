"""What ops and pairs cost. A pair of any two kinds is priced as a run on two resources: compute and communication.

In each of a stage's `layers`, F is attention, dispatch, experts, combine; I is the mirror; W is arithmetic alone, in
two pieces; B is I with each layer's W at its place. `comm` is the part of F and of I that is all-to-all. The price of a
pair is the `makespan` of its two chains: the best that an executor which interleaves phases can do (arXiv 2412.19437,
figure 4, is one such run).

One number per pair, as most simulators take, would need ten guesses, and a wrong one could not be seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations_with_replacement

from dryvine.parallel.schedule.ir import Kind, Slot
from dryvine.parallel.schedule.makespan import Work, makespan
from dryvine.parallel.schedule.rules import ScheduleError

KINDS: tuple[Kind, ...] = ("F", "B", "I", "W")
PAIRS = tuple("".join(sorted(pair)) for pair in combinations_with_replacement(KINDS, 2))


@dataclass(frozen=True)
class Costs:
    """Times in any one unit. B is I + W if not given. A pair in `pairs` (letters sorted: "BF") has that price, any
    other the makespan of its ops.

    P2P: from the end of an op to the start of what needs it on another rank. comm: part of F and I, 0 to 1; at 0 a
    pair costs the sum of its ops, because nothing can hide.
    """

    F: float = 1.0
    I: float = 1.0  # noqa: E741
    W: float = 1.0
    B: float | None = None
    P2P: float = 0.0
    comm: float = 0.0
    layers: int = 4
    pairs: Mapping[str, float] = field(default_factory=dict)

    def op(self, kind: Kind) -> float:
        whole = self.I + self.W if self.B is None else self.B
        return {"F": self.F, "I": self.I, "W": self.W, "B": whole}[kind]

    def slot(self, slot: Slot) -> float:
        return self.op(slot[0].kind) if len(slot) == 1 else self.pair(slot[0].kind, slot[1].kind)

    def pair(self, a: Kind, b: Kind) -> float:
        a, b = sorted((a, b))
        return self.pairs[a + b] if a + b in self.pairs else makespan(self.chain(a), self.chain(b))

    def chain(self, kind: Kind) -> tuple[Work, ...]:
        """The op as a chain of pieces over its layers: see the module docstring."""
        pieces = 2 * self.layers
        total, weight = {"F": (self.F, 0.0), "I": (self.I, 0.0), "W": (0.0, self.W), "B": (self.I, self.W)}[kind]
        compute = Work("compute", (total * (1 - self.comm) + weight) / pieces)
        comm = Work("comm", total * self.comm / pieces)
        # Forward, each message follows the compute that made it; backward, it comes before.
        piece = (compute, comm) if kind == "F" else (comm, compute)
        return tuple(work for work in piece * pieces if work.time > 0)

    def of_a_part(self, part: float) -> Costs:
        """Costs of stages that are `part` as large. A message stays as long: it is one microbatch's activations."""
        pairs = {key: value * part for key, value in self.pairs.items()}
        whole = None if self.B is None else self.B * part
        return replace(self, F=self.F * part, I=self.I * part, W=self.W * part, B=whole, pairs=pairs)

    @staticmethod
    def parse(text: str) -> Costs:
        """From "F=1,I=1.3,W=0.8,P2P=0.1,COMM=0.33,LAYERS=4", and any pair, such as "FB=2.4"."""
        values = dict(_item(item) for item in text.split(",") if item.strip())
        pairs = {key: values.pop(key) for key in PAIRS if key in values}
        known = {name: values.pop(name) for name in ("F", "I", "W", "B", "P2P") if name in values}
        layers, comm = int(values.pop("LAYERS", 4)), values.pop("COMM", 0.0)
        if values or layers < 1 or not 0 <= comm < 1:
            wrong = ", ".join(values) or "LAYERS or COMM out of range"
            raise ScheduleError(
                f"costs {text!r}: {wrong}; keys are F I W B P2P COMM (0 to 1) LAYERS (1 up), or a pair: FB"
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
