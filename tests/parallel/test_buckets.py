"""Which parameters share a bucket, where they lie, and in which turns buckets travel."""

from __future__ import annotations

from unittest import mock

import pytest

from dryvine.parallel import buckets
from dryvine.parallel.buckets import (
    LANES,
    BucketEntry,
    BucketLayout,
    Holders,
    ReadingLayer,
    equal_times,
    layouts,
    turns,
)
from dryvine.parallel.executor import last_gradients
from dryvine.parallel.flow_control import RankProgram, rank_program
from dryvine.parallel.schedule.ir import Op, ProgramStep
from dryvine.parallel.schedule.lower import lower
from dryvine.parallel.schedule.table import SCHEDULES, build

BOTH = Holders((0, 1), None)


def entry(
    name: str, elements: int, place: int, stage: int = 0, matrix: bool = True, copies: Holders = BOTH
) -> BucketEntry:
    return BucketEntry(name, elements, matrix, copies, (ReadingLayer(place, stage, f"layers.{place}"),), "fp32")


def cut(elements: int, *entries: BucketEntry) -> list[list[str]]:
    with mock.patch.object(buckets, "CUT", elements):
        return [list(layout.starts) for layout in layouts(entries)]


def test_a_bucket_ends_with_a_layer_once_it_is_large_enough() -> None:
    three = [entry(f"{layer}.{part}", 40, layer) for layer in range(3) for part in "ab"]
    assert cut(1, *three) == [["0.a", "0.b"], ["1.a", "1.b"], ["2.a", "2.b"]]
    assert cut(81, *three) == [["0.a", "0.b", "1.a", "1.b"], ["2.a", "2.b"]]
    assert cut(1000, *reversed(three)) == [["0.a", "0.b", "1.a", "1.b", "2.a", "2.b"]]


def test_stages_copies_and_dtypes_do_not_mix() -> None:
    others = [
        entry("stage", 40, 1, stage=1),
        entry("slice", 40, 0, copies=Holders((0, 1), 1)),
        entry("home", 40, 0, copies=Holders((0,), None)),
        entry("half", 40, 0)._replace(dtype="bf16"),
    ]
    assert sorted(cut(1000, entry("one", 40, 0), *others)) == [["half"], ["home"], ["one"], ["slice"], ["stage"]]


def test_no_call_of_a_kernel_ends_within_a_vector() -> None:
    (made,) = layouts([entry("m", 37, 0), entry("v", 5, 0, matrix=False), entry("n", 11, 0)])
    assert made.starts == {"m": 0, "n": 37, "v": 48}
    assert (made.vectors, made.end, made.elements) == (48, 53, 53)
    for copies in (1, 2, 3, 8):
        assert made.padded(copies) % (copies * LANES) == 0
        assert 0 <= made.padded(copies) - made.end < copies * LANES


def of_stages(*stages: int, first: int = 0) -> BucketLayout:
    readers = tuple(ReadingLayer(first + n, stage, f"{first + n}") for n, stage in enumerate(stages))
    return BucketLayout(BOTH, "fp32", readers, {}, 0, 0, 0)


def test_sums_go_by_their_last_copy_and_gathers_by_their_first_read() -> None:
    """DualPipe on two ranks: both hold both stages, and end them in opposite orders. Shared by both stages: last."""
    schedule = build("dualpipe", 2, 4, 1)
    made = [of_stages(0), of_stages(0, first=1), of_stages(1, first=2), of_stages(0, 1, first=3)]
    order = turns(equal_times(schedule), made)
    assert sorted(order.sums) == sorted(order.gathers) == [0, 1, 2, 3]
    assert order.sums.index(1) < order.sums.index(0), "a backward ends with the first layer"
    one_f_one_b = turns(equal_times(build("one_f_one_b", 2, 4, 1)), made)
    assert one_f_one_b.sums[:1] == (2,), "the last stage is complete first"
    assert one_f_one_b.gathers[0] == 0
    assert one_f_one_b.gathers[-1] == 2


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_tells_the_end_of_every_stage(name: str) -> None:
    """Its last op that adds gradients stands alone in its slot among those of the stage."""
    schedule = build(name, 4, 8, 2 if name in ("interleaved",) else 1)
    program = lower(schedule)
    for rank in range(4):
        ended = last_gradients(rank_program(program, rank))
        assert sorted(stage for stage, _ in ended) == list(schedule.stages_of(rank))
        for stage, microbatch in ended:
            of_stage = [op for op in schedule.ops(rank) if op.stage == stage and op.kind in "BW"]
            assert of_stage[-1].microbatch == microbatch


def test_two_ends_in_one_slot_tell_nothing() -> None:
    """Which of them adds last is not known; `reduce` sums that stage after the schedule."""
    pair = (Op("W", 0, 0), Op("B", 0, 1))
    steps = tuple(ProgramStep(slot, (None,) * len(slot), (None,) * len(slot)) for slot in (pair[:1], pair))
    assert last_gradients(RankProgram(steps, ((),) * 2, {})) == frozenset()
    assert last_gradients(RankProgram(steps[:1], ((),), {})) == {(0, 0)}
