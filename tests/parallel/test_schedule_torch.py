"""torch.distributed.pipelining as an oracle: its checks accept our schedules, and its tables equal ours cell for cell.

Its private functions are probed for; where a torch has none of them, these tests are skipped.
"""

from types import SimpleNamespace

import pytest

from dryvine.parallel.schedule.ir import Schedule
from dryvine.parallel.schedule.notation import slot_text
from dryvine.parallel.schedule.table import build, legal

oracle = pytest.importorskip("torch.distributed.pipelining.schedules")
needed = ("_Action", "_validate_schedule", "_add_send_recv", "_simulate_comms_compute")
pytestmark = pytest.mark.skipif(not all(hasattr(oracle, n) for n in needed), reason="this torch has no such checks")

SINGLE_ROUTE = ("gpipe", "one_f_one_b", "interleaved", "zb1p", "zbv", "dualpipev")
SIZES = [(1, 2), (2, 4), (2, 7), (4, 8), (4, 13), (5, 10), (8, 16)]


def actions(schedule: Schedule) -> dict[int, list]:
    parse = oracle._Action.from_str
    return {rank: [parse(slot_text(slot)) for slot in row] for rank, row in enumerate(schedule.ranks)}


def accept(schedule: Schedule) -> None:
    table, route = actions(schedule), schedule.routes[0]
    oracle._validate_schedule(table, len(schedule.ranks), schedule.stages, schedule.microbatches)
    singles = {
        rank: [part for a in row for part in (a.sub_actions or (a,))] for rank, row in table.items()
    }  # torch itself runs the two of a pair one after the other
    lowered = oracle._add_send_recv(singles, route.__getitem__, schedule.stages)
    oracle._simulate_comms_compute(lowered, route.__getitem__, schedule.stages)


@pytest.mark.parametrize("name", SINGLE_ROUTE)
def test_torch_accepts_single_routes(name):
    for pp, microbatches in SIZES:
        if legal(name, pp, microbatches) is None:
            accept(build(name, pp, microbatches))


def direction(schedule: Schedule, route: int) -> Schedule:
    """One direction of DualPipe by itself: its ops, its microbatches from 0, its ranks."""
    ranks = tuple(
        tuple(kept for slot in row if (kept := tuple(op for op in slot if op.route == route))) for row in schedule.ranks
    )
    first = min(op.microbatch for row in ranks for slot in row for op in slot)
    renamed = tuple(
        tuple(tuple(op._replace(microbatch=op.microbatch - first, route=0) for op in s) for s in row) for row in ranks
    )
    return Schedule("half", schedule.microbatches // 2, (schedule.routes[route],), renamed)


@pytest.mark.parametrize("route", [0, 1])
def test_torch_accepts_each_direction_of_dualpipe(route):
    for pp, microbatches in ((2, 4), (4, 8), (4, 14), (8, 20)):
        accept(direction(build("dualpipe", pp, microbatches), route))


def torch_rows(name: str, pp: int, microbatches: int, chunks: int) -> list[list[str]]:
    """The table that torch's class computes, without making a process group."""
    cls = getattr(oracle, name)
    stub = SimpleNamespace(
        pp_group_size=pp,
        _n_microbatches=microbatches,
        _num_stages=pp * chunks,
        num_stages=pp * chunks,
        n_local_stages=chunks,
        number_of_rounds=(rounds := max(1, microbatches // pp)),
        microbatches_per_round=microbatches // rounds,
    )
    rows = [cls._calculate_single_rank_operations(stub, rank) for rank in range(pp)]
    return [[str(a) for a in row if a is not None] for row in rows]


@pytest.mark.parametrize(
    ("ours", "theirs", "chunks"),
    [
        ("dualpipev", "ScheduleDualPipeV", 2),
        ("zbv", "ScheduleZBVZeroBubble", 2),
        ("interleaved", "ScheduleInterleaved1F1B", 2),
        ("interleaved", "ScheduleInterleaved1F1B", 4),
    ],
)
def test_tables_equal_torchs(ours, theirs, chunks):
    if not hasattr(oracle, theirs):
        pytest.skip(f"this torch has no {theirs}")
    compared = 0
    for pp, microbatches in SIZES:
        if legal(ours, pp, microbatches, chunks) is None:
            mine = [[slot_text(slot) for slot in row] for row in build(ours, pp, microbatches, chunks).ranks]
            assert mine == torch_rows(theirs, pp, microbatches, chunks)
            compared += 1
    assert compared >= 4
