"""Rounds fractions to 0 or 1 so that the sums over two orders of them are rounded too: up or down, never further.

`BlendOrder` needs it at the edges of its blocks: which sources are one sequence ahead of their share there. The
fractions, sums along the first order and sums along the second are flows in one network (each fraction leaves the
second chain and joins the first), and a network with integer ends has an integer flow between the floor and the ceiling
of every arc (Hoffman 1960; the same argument as controlled rounding of tables). It is found by pushing flow around
cycles of fractional arcs until none is left. A linear program would find it too, in floating point.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence


class _Arc:
    def __init__(self, tail: int, head: int, flow: int) -> None:
        self.tail, self.head, self.flow = tail, head, flow


def round_along(orders: tuple[Sequence[int], Sequence[int]], parts: Sequence[int], whole: int) -> list[int]:
    """Round each parts[i] / whole, in [0, 1), to 0 or 1.

    `orders` are two permutations of the indexes. Every sum over the first j of an order is rounded to its floor or
    ceiling. The parts must add up to a multiple of `whole`.
    """
    first, second = ({index: place for place, index in enumerate(order)} for order in orders)
    count = len(parts)
    # Nodes 0..count-1 are places of the second order, count..2 count-1 those of the first.
    own = [_Arc(second[i], count + first[i], part) for i, part in enumerate(parts)]
    sums = [_Arc(place + 1, place, flow) for place, flow in enumerate(_sums(orders[1], parts))]
    sums += [_Arc(count + place, count + place + 1, flow) for place, flow in enumerate(_sums(orders[0], parts))]
    arcs = [*own, *sums]
    while fractional := [arc for arc in arcs if arc.flow % whole]:
        _push(_cycle(fractional), whole)
    return [arc.flow // whole for arc in own]


def _sums(order: Sequence[int], parts: Sequence[int]) -> list[int]:
    """Prefix sums of an order, without the sum of all, which is whole anyway."""
    total, sums = 0, []
    for index in order[:-1]:
        total += parts[index]
        sums.append(total)
    return sums


def _cycle(arcs: Sequence[_Arc]) -> list[tuple[_Arc, bool]]:
    """A cycle among fractional arcs, each with whether it is passed from tail to head. There always is one: flow is
    conserved, so no node has a single fractional arc."""
    at: defaultdict[int, list[_Arc]] = defaultdict(list)
    for arc in arcs:
        at[arc.tail].append(arc)
        at[arc.head].append(arc)
    node, last, path, seen = arcs[0].tail, None, [], {arcs[0].tail: 0}
    while True:
        last = next(arc for arc in at[node] if arc is not last)
        forward = last.tail == node
        path.append((last, forward))
        node = last.head if forward else last.tail
        if node in seen:
            return path[seen[node] :]
        seen[node] = len(path)


def _push(cycle: Sequence[tuple[_Arc, bool]], whole: int) -> None:
    """Push as much flow around the cycle as it takes until the first arc is whole."""
    most = min(whole - arc.flow % whole if forward else arc.flow % whole for arc, forward in cycle)
    for arc, forward in cycle:
        arc.flow += most if forward else -most
