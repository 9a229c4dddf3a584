"""Messages through slots in the receiver's memory: right in every schedule, however late a rank or a link is; and the
order in which communicators are connected."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dryvine.comm import local
from dryvine.comm.copy_wire import CopyWire, layout_rings, slot_bytes
from dryvine.comm.lines import Line
from dryvine.comm.pipeline_wire import connection_order
from dryvine.comm.words import share_words
from dryvine.parallel.flow_control import line, posts, slots_by_line
from dryvine.parallel.schedule.ir import Program, Schedule
from dryvine.parallel.schedule.lower import forward_only, lower
from dryvine.parallel.schedule.table import SCHEDULES, build, legal
from tests.support.host_links import HostLinks, make_room
from tests.support.pipeline import Report, Toy, reference, tokens, total

DOWN = (0, "down")
CHUNKS = {"interleaved": 2}
CPU = torch.device("cpu")
Waiting = list[tuple[str, tuple[tuple[int, int], ...], Callable[[], bool]]]


def wire_of(rank: int, ranks: int, slots: dict[Line, int], size: int, folder: Path, slow: float = 0.0) -> CopyWire:
    rings, memory = layout_rings(slots, size)
    links = HostLinks(folder, ranks, memory, 2 * len(rings), slow)
    return CopyWire(rank, links, rings, size, lambda *_: None, lambda peer: peer)


def room(folder: Path, ranks: int, slots: dict[Line, int], size: int) -> Path:
    rings, memory = layout_rings(slots, size)
    make_room(folder, ranks, memory, 2 * len(rings))
    return folder


def play(rank: int, schedule: Schedule, batches: list[list[Tensor]], folder: Path, late: tuple[int, float]) -> Report:
    """For `local.run`: the schedule over a copy wire, once for each batch. Rank `late[0]` starts each message late."""
    slots = slots_by_line([lower(schedule)])
    wire = wire_of(rank, len(schedule.ranks), slots, 1 << 14, folder, late[1] if rank == late[0] else 0.0)
    toy = Toy(schedule, rank, wire=wire)
    for batch in batches:
        report = toy.run(batch)
    return report


@pytest.mark.parametrize("late", [(0, 0.0), (0, 0.003), (1, 0.003)], ids=["even", "first rank late", "second late"])
@pytest.mark.parametrize("pp", [2, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_trains_the_same_over_copies(
    name: str, pp: int, late: tuple[int, float], tmp_path: Path
) -> None:
    schedule = build(name, pp, 2 * pp, CHUNKS.get(name, 1))
    batches = [tokens(2 * pp, rows, rows) for rows in (2, 5)]
    room(tmp_path, pp, slots_by_line([lower(schedule)]), 1 << 14)
    got = total(local.run(play, pp, schedule, batches, tmp_path, late, deadline=60))
    _, expected = reference(schedule.stages, batches[-1])
    assert got.keys() == expected.keys()
    for weight, gradient in expected.items():
        np.testing.assert_allclose(got[weight], gradient, rtol=1e-4, atol=1e-6 * abs(gradient).max())


def pair(tmp_path: Path, slots: dict[Line, int], size: int = 1 << 12) -> tuple[CopyWire, CopyWire]:
    """Both ends of a pipeline of two, in this process."""
    room(tmp_path, 2, slots, size)
    one, two = (wire_of(rank, 2, slots, size, tmp_path) for rank in range(2))
    return one, two


def message(n: int) -> tuple[Tensor, ...]:
    return torch.full((7, 3), float(n)), torch.arange(n, n + 5)


LIKE = tuple(tensor.to("meta") for tensor in message(0))


def test_messages_of_several_tensors_arrive_in_order(tmp_path: Path) -> None:
    one, two = pair(tmp_path, {Line(0, 1, DOWN): 3})
    for n in range(20):
        one.send(message(n), 1, DOWN).wait()
        arrived = two.receive(LIKE, 0, DOWN).wait()
        for got, sent in zip(arrived, message(n), strict=True):
            assert torch.equal(got, sent)
            assert got.dtype == sent.dtype


def test_a_slot_is_not_filled_again_before_it_is_read(tmp_path: Path) -> None:
    """The sender is far ahead: what it sends waits for credit, in order, and nothing that was not read is lost."""
    one, two = pair(tmp_path, {Line(0, 1, DOWN): 2})
    sent = [one.send(message(n), 1, DOWN) for n in range(9)]
    time.sleep(0.1)
    assert [pending.ready() for pending in sent[:2]] == [True, True]
    assert not any(pending.ready() for pending in sent[2:])
    for n in range(9):
        assert torch.equal(two.receive(LIKE, 0, DOWN).wait()[0], message(n)[0])
    sent[-1].wait()


def test_what_arrived_stays_when_its_slot_is_filled_again(tmp_path: Path) -> None:
    one, two = pair(tmp_path, {Line(0, 1, DOWN): 1})
    arrived = []
    for n in range(4):
        one.send(message(n), 1, DOWN)
        arrived.append(two.receive(LIKE, 0, DOWN).wait()[0])
    assert [float(a[0, 0]) for a in arrived] == [0, 1, 2, 3]


def test_a_line_without_credit_holds_up_no_other(tmp_path: Path) -> None:
    other = (1, "down")
    one, two = pair(tmp_path, {Line(0, 1, DOWN): 1, Line(0, 1, other): 1})
    for n in range(3):  # the second waits for a receive that does not come
        one.send(message(n), 1, DOWN)
    one.send(message(7), 1, other)
    assert torch.equal(two.receive(LIKE, 0, other).wait()[0], message(7)[0])
    for n in range(3):
        assert torch.equal(two.receive(LIKE, 0, DOWN).wait()[0], message(n)[0])


def test_slots_are_apart_and_large_enough() -> None:
    """No two lines of a receiver share a byte, and no two lines share a word."""
    slots = {Line(0, 1, DOWN): 3, Line(2, 1, DOWN): 2, Line(1, 0, (0, "up")): 4}
    assert slot_bytes((torch.empty(3, dtype=torch.uint8), torch.empty(100, dtype=torch.float32))) == 256 + 512
    rings, memory = layout_rings(slots, 1000)
    assert memory == 5 * 1000
    assert sorted(rings[key].start for key in slots if key.target == 1) in ([0, 2000], [0, 3000])
    words = [word for ring in rings.values() for word in (ring.flag, ring.credit)]
    assert sorted(words) == list(range(6))


def test_what_is_awaited_is_done_when_the_other_end_has_it(tmp_path: Path) -> None:
    slots = {Line(0, 1, DOWN): 2}
    room(tmp_path, 2, slots, 1 << 12)
    awaited: Waiting = []
    rings, memory = layout_rings(slots, 1 << 12)
    links = [HostLinks(tmp_path, 2, memory, 2) for _ in range(2)]
    one, two = (
        CopyWire(rank, links[rank], rings, 1 << 12, lambda *a: awaited.append(a), lambda peer: 10 + peer)
        for rank in range(2)
    )
    came = two.receive(LIKE, 0, DOWN, "stage 1, microbatch 4")
    what, due, done = awaited[0]
    assert what == "receiving activations of route 0, stage 1, microbatch 4 from rank 10"
    assert due == ((10, sum(t.nbytes for t in message(0))),)
    assert not done()
    one.send(message(0), 1, DOWN).wait()
    assert awaited[1][2]()  # sent
    assert not done()  # not yet taken
    came.wait()
    assert done()


@pytest.mark.timeout(20)
def test_a_wait_that_nothing_will_end_is_ended_by_the_host(tmp_path: Path) -> None:
    _, two = pair(tmp_path, {Line(0, 1, DOWN): 1})
    came = two.receive(LIKE, 0, DOWN)
    waiting = threading.Thread(target=came.wait)
    waiting.start()
    time.sleep(0.05)
    assert waiting.is_alive()
    two.links.words.fulfil(range(2 * len(two.rings)))
    waiting.join()


def shared(rank: int) -> tuple[list[int], bool]:
    """For `local.run`: words that all ranks write and read."""
    import torch.distributed as dist

    words = share_words(dist.group.WORLD, 4, CPU)
    assert words is not None
    words.values[rank] = rank + 1
    dist.barrier()
    return words.values.tolist(), words.reached(1, 2) and not words.reached(1, 3)


def test_words_are_shared_by_the_ranks_of_a_node() -> None:
    before = set(Path("/dev/shm").glob("dryvine-words-*"))
    assert local.run(shared, 3) == [([1, 2, 3, 0], True)] * 3
    assert set(Path("/dev/shm").glob("dryvine-words-*")) == before


def elsewhere(rank: int) -> bool:
    """For `local.run`: rank 1 is on another node, where the file is not."""
    import torch.distributed as dist

    from dryvine.comm import words

    if rank == 1:
        words._open = lambda *_: None
    return words.share_words(dist.group.WORLD, 4, CPU) is None


def test_no_words_for_anyone_where_one_rank_cannot_map_them() -> None:
    assert local.run(elsewhere, 2) == [True, True]


def uses(program: Program, rank: int) -> Iterator[Line]:
    """The lines in the order in which a rank's host first uses them."""
    steps = program.ranks[rank]
    for step, edges in zip(steps, posts(steps, 1), strict=True):
        yield from (line(edge) for edge in edges)
        yield from (line(edge) for edge in step.sends)


def all_connect(orders: list[list[Line]]) -> bool:
    """As NCCL does: who uses a line for the first time stands still until the rank at its other end uses it too."""
    orders = [list(dict.fromkeys(order)) for order in orders]
    while any(orders):
        ready = [
            o[0] for rank, o in enumerate(orders) if o for other in [_other(o[0], rank)] if orders[other][:1] == o[:1]
        ]
        if not ready:
            return False
        for order in orders:
            if order[:1] == ready[:1]:
                order.pop(0)
    return True


def _other(key: Line, rank: int) -> int:
    return key.target if key.source == rank else key.source


@pytest.mark.parametrize("pp", range(2, 9))
@pytest.mark.parametrize("name", SCHEDULES)
def test_communicators_are_connected_in_an_order_that_ends(name: str, pp: int) -> None:
    chunks = CHUNKS.get(name, 1)
    if legal(name, pp, 2 * pp, chunks) is not None:
        pytest.skip("not a size of this schedule")
    program = lower(build(name, pp, 2 * pp, chunks))
    order = connection_order(slots_by_line([program]))
    assert all_connect([[key for key in order if rank in (key.source, key.target)] for rank in range(pp)])


def test_dualpipe_connected_at_first_use_stands_still() -> None:
    """What happened on two GPUs: each rank begins with a channel of its own."""
    program = lower(build("dualpipe", 2, 4, 1))
    assert not all_connect([list(uses(program, rank)) for rank in range(2)])


def test_slots_cover_validation_too() -> None:
    schedule = build("dualpipe", 2, 8, 1)
    both = slots_by_line([lower(schedule), lower(forward_only(schedule))])
    for program in (lower(schedule), lower(forward_only(schedule))):
        assert all(both[key] >= count for key, count in slots_by_line([program]).items())
