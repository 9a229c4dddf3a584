"""How many messages are under way: which receives are posted when, and how many sends may wait for theirs; and how much
streams may lie behind one another.

All follow from the schedule, so memory does too. Without a bound, a rank that runs ahead of a slow neighbour (GPipe's
last rank, in its backwards) holds a gradient for every microbatch of the step.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TypeVar

from dryvine.comm.lines import Channel, Line
from dryvine.parallel.schedule.footprint import SlotMessages
from dryvine.parallel.schedule.ir import Edge, Program, ProgramStep
from dryvine.parallel.schedule.simulate import Timeline, simulate

T = TypeVar("T")
# A channel and the rank at its far end: messages that leave for it in one order arrive in that order.
SendQueue = tuple[Channel, int]

AHEAD = 1  # slots that a receive is posted before it is needed; more costs buffers and gains nothing
STEPS_HELD = 3  # compute steps until what a GPU's streams have read is let go: with the one that runs, two MoE layers
SLACK = 2  # messages that a rank may be further ahead than simulated, at equal costs, before it waits


@dataclass(frozen=True)
class RankProgram:
    """What one rank runs: its steps, the receives to post before each of them, and how many messages may be under way
    in each send queue."""

    steps: tuple[ProgramStep, ...]
    posts: tuple[tuple[Edge, ...], ...]
    limits: dict[SendQueue, int]


def rank_program(program: Program, rank: int) -> RankProgram:
    """The part of `program` that `rank` runs. Simulates the whole schedule once, for the limits."""
    limits = {queue: most + SLACK for queue, most in most_under_way(program, rank, AHEAD).items()}
    return RankProgram(program.ranks[rank], posts(program.ranks[rank], AHEAD), limits)


def channel(edge: Edge) -> Channel:
    return edge.route, edge.direction


def queue(edge: Edge) -> SendQueue:
    return channel(edge), edge.target


def posts(steps: Sequence[ProgramStep], ahead: int) -> tuple[tuple[Edge, ...], ...]:
    """What to post before each slot: the receives of the slot `ahead` further on, and at first all up to there."""
    return _posts([step.receives for step in steps], ahead)


def most_messages(slots: Sequence[SlotMessages], ahead: int) -> int:
    """The most messages in a rank's memory at once: posted receives, and sends of the previous slot that may not have
    completed."""
    now = most = before = 0
    for slot, posted in zip(slots, _posts([slot.receives for slot in slots], ahead), strict=True):
        now += len(posted)
        most = max(most, now + before)
        now -= len(slot.receives)
        before = slot.sends
    return most


def _posts(receives: Sequence[tuple[T, ...]], ahead: int) -> tuple[tuple[T, ...], ...]:
    later = receives[ahead + 1 :]
    return (tuple(chain(*receives[: ahead + 1])), *later, *[()] * (len(receives) - 1 - len(later)))


def line(edge: Edge) -> Line:
    return Line(edge.source, edge.target, channel(edge))


def slots_by_line(programs: Iterable[Program]) -> dict[Line, int]:
    """For each line, the slots that its receiver needs: room for every receive that may be posted and not yet taken,
    so that a message whose receive is posted always gets through (what `most_under_way` relies on), and one to be
    filled meanwhile."""
    slots: dict[Line, int] = {}
    for program in programs:
        for steps in program.ranks:
            for key, most in _most_posted(steps).items():
                slots[key] = max(slots.get(key, 0), most + 1)
    return slots


def _most_posted(steps: Sequence[ProgramStep]) -> Counter[Line]:
    """For each line into a rank, the most receives at once that are posted and not yet taken by their slot."""
    now: Counter[Line] = Counter()
    most: Counter[Line] = Counter()
    for step, edges in zip(steps, posts(steps, AHEAD), strict=True):
        now.update(line(edge) for edge in edges)
        most |= now
        now.subtract(line(edge) for edge in step.receives)
    return most


def most_under_way(program: Program, rank: int, ahead: int) -> dict[SendQueue, int]:
    """For each queue of `rank`, the most messages at once that have left and whose receive is not posted, in a run in
    which all ops cost the same.

    That run is an order of all sends and posts in which no queue ever holds more. So a rank may wait for its oldest
    message wherever there are more, and no circle of waits can close, whatever the ops really cost.
    """
    changes: defaultdict[SendQueue, list[tuple[float, bool]]] = defaultdict(list)
    for time, is_post, edge in _events(simulate(program.schedule), program, rank, ahead):
        changes[queue(edge)].append((time, is_post))
    return {key: max(accumulate(-1 if post else 1 for _, post in sorted(events))) for key, events in changes.items()}


def _events(run: Timeline, program: Program, rank: int, ahead: int) -> Iterator[tuple[float, bool, Edge]]:
    """(time, whether it is the post of a receive, edge) for all that `rank` sends. At one time, sends come first."""
    for cell, step in zip(run.cells[rank], program.ranks[rank], strict=True):
        yield from ((cell.end, False, edge) for edge in step.sends)
    for cells, steps in zip(run.cells, program.ranks, strict=True):
        for cell, edges in zip(cells, posts(steps, ahead), strict=True):
            yield from ((cell.start, True, edge) for edge in edges if edge.source == rank)
