"""Memory that is used again: staging buffers of a dispatcher, and results under way."""

from __future__ import annotations

import threading

import torch

from dryvine.comm.dispatch.buffers import StagingBuffers
from dryvine.comm.dispatch.worker import Worker
from dryvine.comm.pending import Pending

CPU = torch.device("cpu")


def place(buffer: torch.Tensor) -> int:
    return buffer.untyped_storage().data_ptr()


def test_the_smallest_free_buffer_is_taken_that_does_not_waste_half() -> None:
    buffers = StagingBuffers()
    sizes = {rows: buffers.take(rows, 2, CPU) for rows in (10, 16, 40)}
    places = {rows: place(buffer) for rows, buffer in sizes.items()}
    buffers.give(*sizes.values())
    taken = buffers.take(9, 2, CPU)
    assert place(taken) == places[10]
    assert taken.shape == (9, 2)
    assert place(buffers.take(9, 2, CPU)) == places[16]  # the first is in use
    assert place(buffers.take(19, 2, CPU)) not in places.values()  # 40 rows would waste more than half
    assert place(buffers.take(5, 8, CPU)) == places[40]  # as many words


def test_a_buffer_comes_back_at_its_full_size() -> None:
    buffers = StagingBuffers()
    first = buffers.take(10, 2, CPU)
    at = place(first)
    buffers.give(first)
    part = buffers.take(6, 2, CPU)
    buffers.give(part)
    assert place(buffers.take(10, 2, CPU)) == at


def test_beyond_the_limit_the_smallest_are_dropped() -> None:
    buffers = StagingBuffers(limit=2)
    made = [buffers.take(rows, 1, CPU) for rows in (4, 64, 16)]
    places = [place(buffer) for buffer in made]
    buffers.give(*made)
    assert place(buffers.take(64, 1, CPU)) == places[1]
    assert place(buffers.take(16, 1, CPU)) == places[2]
    assert not buffers._free


def test_scratch_comes_back_at_the_end() -> None:
    buffers = StagingBuffers()
    with buffers.scratch(4, CPU) as take:
        taken = {place(take(8)) for _ in range(3)}
    assert {place(buffers.take(8, 4, CPU)) for _ in range(3)} == taken


def test_a_worker_runs_its_steps_in_order_beside_the_caller() -> None:
    worker, gate, log = Worker(CPU), threading.Event(), []

    def first() -> int:
        gate.wait()
        log.append("first")
        return 1

    def second() -> bool:
        log.append("second")
        return torch.is_grad_enabled()

    one, two = worker.run(first), worker.run(second)
    assert not one.ready()
    assert log == []
    gate.set()
    assert two.wait() is False
    assert log == ["first", "second"]
    assert (one.ready(), one.wait()) == (True, 1)


def test_a_result_is_made_when_it_is_waited_for() -> None:
    log: list[str] = []
    pending = Pending(lambda: log.append("finished") or 2, lambda: False).then(lambda n: n + 1)
    assert log == []
    assert not pending.ready()
    assert pending.wait() == 3
    assert Pending.done(5).ready()
