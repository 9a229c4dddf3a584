"""Deviations between the training of two layouts: the comparison behind `dryvine verify`.

The deviation of a tensor is |a - b| / |a| in the L2 norm, taken in FP64: relative to the whole tensor, since Adam's
first steps divide rounding noise by its own size. Tensors of a kind, one per layer, share a line of the table.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

TOLERANCE = 1e-5  # relative, in FP32
COMPARED = ("gradient", "weight")

Array = NDArray[np.float32]
Whole = dict[str, Array]  # parameter -> all its elements, flat
Part = dict[tuple[str, int], Array]  # (parameter, first element) -> the elements that one rank owns


Arrays = TypeVar("Arrays")


@dataclass(frozen=True)
class Computed(Generic[Arrays]):
    """Per step the loss and gradient norm; gradients of the last step; weights after it."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    grads: Arrays
    weights: Arrays


Run = Computed[Whole]  # of a layout
RankRun = Computed[Part]  # of one rank: its share of each loss, and the pieces that it owns


@dataclass(frozen=True)
class Deviation:
    """The largest relative deviation among the tensors of a kind, and which tensor has it."""

    kind: str
    largest: float
    where: str
    tolerance: float = TOLERANCE

    @property
    def fine(self) -> bool:
        # False for NaN.
        return self.largest <= self.tolerance


def assembled(parts: Sequence[Part]) -> Whole:
    """Each parameter, joined from the pieces of all ranks. Raises AssertionError unless every element is owned once."""
    pieces: defaultdict[str, list[tuple[int, Array]]] = defaultdict(list)
    for (name, start), values in chain(*(part.items() for part in parts)):
        pieces[name].append((start, values))
    return {name: _joined(name, sorted(own, key=lambda piece: piece[0])) for name, own in pieces.items()}


def _joined(name: str, pieces: Sequence[tuple[int, Array]]) -> Array:
    """The values of (first element, values) in ascending order. An overlap or a gap does not line up."""
    ends = [0, *(start + len(values) for start, values in pieces)]
    if [start for start, _ in pieces] != ends[:-1]:
        raise AssertionError(f"{name}: its pieces do not cover it once: {[(s, len(v)) for s, v in pieces]}")
    return np.concatenate([values for _, values in pieces])


def deviations(one: Run, many: Run, tolerance: float = TOLERANCE) -> list[Deviation]:
    """The largest deviation of each kind of figure and tensor: losses, norms, gradients, weights."""
    found = (
        _worst("loss", _by_step(one.losses, many.losses)),
        _worst("gradient norm", _by_step(one.norms, many.norms)),
        *_of_tensors("gradient", one.grads, many.grads),
        *_of_tensors("weight", one.weights, many.weights),
    )
    return [replace(deviation, tolerance=tolerance) for deviation in found]


def _by_step(one: Sequence[float], many: Sequence[float]) -> dict[str, float]:
    return {f"step {i + 1}": _relative(a, b) for i, (a, b) in enumerate(zip(one, many, strict=True))}


def _of_tensors(what: str, one: Whole, many: Whole) -> Iterator[Deviation]:
    """By kind of tensor: layers.3.attention.q_a.weight and layers.4.attention.q_a.weight are of one kind."""
    if one.keys() != many.keys():
        raise AssertionError(f"the layouts hold other parameters: {sorted(one.keys() ^ many.keys())}")
    kinds: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for name in one:
        kinds[re.sub(r"\.\d+\.", ".N.", name)][name] = _relative(one[name], many[name])
    return (_worst(f"{what} {kind}", kinds[kind]) for kind in sorted(kinds))


def _relative(one: float | Array, many: float | Array) -> float:
    a, b = np.asarray(one, np.float64), np.asarray(many, np.float64)
    # Where `one` is zero, the deviation is absolute.
    return float(np.linalg.norm(a - b) / (np.linalg.norm(a) or 1.0))


def _worst(kind: str, by_name: Mapping[str, float]) -> Deviation:
    # A NaN is worse than any number.
    where = max(by_name, key=lambda name: (np.isnan(by_name[name]), by_name[name]))
    return Deviation(kind, by_name[where], where)


def table(found: Sequence[Deviation], title: str) -> Table:
    """A row per kind of tensor, with the deviations of its gradient and of its weight; loss and norm have one."""
    rows: defaultdict[str, dict[str, Deviation]] = defaultdict(dict)
    for d in found:
        what, _, kind = d.kind.partition(" ")
        if d.kind in ("loss", "gradient norm"):
            rows[d.kind][COMPARED[0]] = d
        else:
            rows[kind][what] = d
    out = Table(title=title)
    out.add_column("what", no_wrap=True)
    for what in COMPARED:
        out.add_column(what, justify="right", no_wrap=True)
    for kind, cells in rows.items():
        out.add_row(kind, *(_cell(cells.get(what)) for what in COMPARED))
    return out


def _cell(d: Deviation | None) -> str:
    if d is None:
        return ""
    return f"[green]{d.largest:.1e}[/]" if d.fine else f"[bold red]{d.largest:.1e} in {d.where}[/]"
