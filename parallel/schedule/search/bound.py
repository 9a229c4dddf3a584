"""A span that no schedule of a pipe can undercut: what any search could still save, and a check of every search.

A rank's first backward cannot start before the first microbatch has been through all stages and back to it. Until then
the rank can only run forwards, as many as its memory holds; the rest of its work comes after, and however it is paired,
an op takes at least its arithmetic.
"""

from __future__ import annotations

from dryvine.parallel.schedule.costs import KINDS
from dryvine.parallel.schedule.search.fold import Pipe


def lower_bound(pipe: Pipe) -> float:
    """The largest of one bound per rank and one for the first microbatch; see docs/schedules.md for the formula."""
    least = _least_work(pipe)
    own_work = 2 * pipe.share * (least["F"] + least["I"] + least["W"])
    forward, backward, hop = _least_time(pipe, "F"), _least_time(pipe, "I"), pipe.costs.P2P
    # The turn of a V is on one rank; that of a mirrored pipe is a message.
    hops = pipe.stages - (1 if pipe.mirrored else 2)
    # One microbatch through all stages and back, and the W of its first stage.
    bounds = [pipe.stages * (forward + backward) + least["W"]]
    for rank in range(pipe.ranks):
        first_forward = rank * (forward + hop)
        first_backward = pipe.stages * forward + hops * hop + rank * (backward + hop)
        # Forwards that fit into the memory and into the time before the first backward.
        before = min(min(pipe.memory, 2 * pipe.share) * least["F"], first_backward - first_forward)
        bounds.append(first_backward + own_work - before)
    return max(bounds)


def _least_time(pipe: Pipe, kind: str) -> float:
    """The shortest slot with an op of this kind (B is no shorter than I)."""
    return min(price for slot, price in pipe.prices.items() if any(letter[0] == kind for letter in slot))


def _least_work(pipe: Pipe) -> dict[str, float]:
    """What each kind adds to its rank's time at least: its arithmetic, less if a given pair price is below the sum."""
    costs = pipe.costs
    arithmetic = {kind: sum(work.time for work in costs.chain(kind) if work.resource == "compute") for kind in KINDS}
    shares = [costs.pair(a, b) / (arithmetic[a] + arithmetic[b]) for a in KINDS for b in KINDS]
    return {kind: arithmetic[kind] * min(1.0, *shares) for kind in KINDS}
