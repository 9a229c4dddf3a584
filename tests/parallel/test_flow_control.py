"""How many messages are under way: bounded by the schedule, and never so tightly that it stops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dryvine.comm.copy_wire import Line
from dryvine.parallel.executor import Batch, EdgeWire, Executor
from dryvine.parallel.flow_control import SendQueue, most_under_way, posts, queue, rank_program, slots_by_line
from dryvine.parallel.overlap import ORDERS
from dryvine.parallel.schedule.ir import Op, Program
from dryvine.parallel.schedule.lower import lower
from dryvine.parallel.schedule.table import SCHEDULES, build
from dryvine.parallel.stage import Compute, Flight, Outcome, Stage
from dryvine.parallel.streams import CpuStreams
from dryvine.parallel.wgrad import WGrad
from tests.support.pipeline import Deaf


def meet(program: Program, most: list[dict[SendQueue, int]], ahead: int) -> bool:
    """Whether all ranks get to the end when a send blocks while more than `most` in its queue lack a posted receive."""
    schedule = program.schedule
    sent: Counter[tuple[int, SendQueue]] = Counter()
    posted: Counter[tuple[int, SendQueue]] = Counter()
    ended: set[Op] = set()

    def blocked(rank: int) -> Iterator[bool]:
        """This rank's run, which yields whenever it cannot go on."""
        steps = program.ranks[rank]
        for step, edges in zip(steps, posts(steps, ahead), strict=True):
            for edge in edges:
                posted[edge.source, queue(edge)] += 1
            while not ended.issuperset(need for op in step.slot for need in schedule.needs(op)):
                yield True
            ended.update(step.slot)
            for edge in step.sends:
                key = queue(edge)
                sent[rank, key] += 1
                while sent[rank, key] - posted[rank, key] > most[rank][key]:
                    yield True

    runs = {rank: blocked(rank) for rank in range(len(schedule.ranks))}
    while runs:
        before = (len(ended), sent.total(), posted.total(), len(runs))
        runs = {rank: rest for rank, rest in runs.items() if next(rest, None)}
        if before == (len(ended), sent.total(), posted.total(), len(runs)):
            return False
    return True


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(SCHEDULES)), st.sampled_from([2, 4, 6]), st.integers(2, 4), st.integers(0, 3))
def test_bounded_sends_cannot_stop_a_schedule(name: str, pp: int, times: int, ahead: int) -> None:
    program = lower(build(name, pp, times * pp))
    assert meet(program, [most_under_way(program, rank, ahead) for rank in range(pp)], ahead)


def test_one_less_can_stop_a_schedule() -> None:
    """So the property above can fail. DualPipe's ends send several forwards before their neighbour takes any."""
    program = lower(build("dualpipe", 4, 8))
    tight = [{key: n - 1 for key, n in most_under_way(program, rank, 1).items()} for rank in range(4)]
    assert not meet(program, tight, 1)


def test_gpipe_by_hand() -> None:
    """Rank 0 sends at 1, 2, 3 and 4. Rank 1 posts two receives when it starts at 1, and one more at 2 and at 3."""
    program = lower(build("gpipe", 2, 4))
    forward = ((0, "down"), 1)
    assert most_under_way(program, 0, 1) == {forward: 1}
    assert rank_program(program, 0).limits == {forward: 1 + 2}
    assert [len(edges) for edges in rank_program(program, 1).posts] == [2, 1, 1, 0, 0, 0, 0, 0]
    # Two are posted and not yet taken, and one more is filled.
    assert slots_by_line([program, lower(build("gpipe", 2, 1))])[Line(0, 1, (0, "down"))] == 3


def test_sends_to_a_late_rank_are_held_within_the_bound() -> None:
    def double(state: Any, flight: Flight) -> Outcome:
        return Outcome((), {"loss": state[0].sum()})

    wgrad, wire, schedule = WGrad(), Deaf(), build("gpipe", 2, 16)
    stage = Stage(1, [Compute("head", "head", double, wgrad)])
    shape = (torch.empty(2, 2, device="meta"),)
    program = rank_program(lower(schedule), 1)
    executor = Executor(program, {1: stage}, EdgeWire(wire, lambda edge: shape), CpuStreams, ORDERS["cpu"])
    executor.run(Batch([torch.empty(0)] * 16, 1.0))
    assert wire.under_way == 0
    assert wire.peak <= max(program.limits.values()) + 1 < 6
