"""How many messages are under way: which receives are posted when, and how many sends may wait for theirs.

Both follow from the schedule, so memory does too. Without a bound, a rank that runs ahead of a slow neighbour (GPipe's
last one, in its backwards) holds a gradient for every microbatch of the step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain

from dryvine.comm.mesh import Channel
from dryvine.parallel.schedule.ir import Edge, Program, Schedule, Step
from dryvine.parallel.schedule.lower import lower
from dryvine.parallel.schedule.simulate import Timeline, simulate

Line = tuple[
    Channel, int
]  # a channel and the rank at its far end: what leaves on it in one order arrives in that order


def channel(edge: Edge) -> Channel:
    return edge.route, edge.direction


def posts(steps: Sequence[Step], ahead: int) -> list[tuple[Edge, ...]]:
    """What to post before each slot: the receives of the slot `ahead` further on, and at first all up to there."""
    receives = [step.receives for step in steps]
    later = receives[ahead + 1 :]
    return [tuple(chain(*receives[: ahead + 1])), *later, *[()] * (len(steps) - 1 - len(later))]


def most_under_way(schedule: Schedule, rank: int, ahead: int) -> dict[Line, int]:
    """For each line on which `rank` sends, the most messages at once that have left and whose receive is not posted, in
    a run in which all ops cost the same.

    That run is an order of all sends and posts in which no line ever holds more. So a rank may wait for its oldest
    message wherever there are more, and no circle of waits can close, whatever the ops really cost.
    """
    changes: defaultdict[Line, list[tuple[float, bool]]] = defaultdict(list)
    for time, is_post, edge in _events(simulate(schedule), lower(schedule), rank, ahead):
        changes[channel(edge), edge.target].append((time, is_post))
    return {line: max(accumulate(-1 if post else 1 for _, post in sorted(found))) for line, found in changes.items()}


def _events(run: Timeline, program: Program, rank: int, ahead: int) -> Iterator[tuple[float, bool, Edge]]:
    """(time, whether it is the post of a receive, edge) for all that `rank` sends. At one time, sends come first."""
    for cell, step in zip(run.cells[rank], program[rank], strict=True):
        yield from ((cell.end, False, edge) for edge in step.sends)
    for cells, steps in zip(run.cells, program, strict=True):
        for cell, edges in zip(cells, posts(steps, ahead), strict=True):
            yield from ((cell.start, True, edge) for edge in edges if edge.source == rank)
