"""When sums begin, what a layer waits for, what is begun anew in the next step, on one rank whose buckets note what is
asked of them. And what a sum in BF16 rounds, to the bit."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from dryvine.comm import local
from dryvine.comm.mesh import Layout, make_mesh
from dryvine.comm.pending import Pending
from dryvine.parallel import stalls
from dryvine.parallel.bucket import BucketMemory
from dryvine.parallel.buckets import BucketTurns, ReadingLayer, stage_times
from dryvine.parallel.schedule.simulate import simulate
from dryvine.parallel.schedule.table import SCHEDULES, build
from dryvine.parallel.stalls import Stalls
from dryvine.parallel.zero import Zero, ZeroHooks

CPU = torch.device("cpu")
TURNS = BucketTurns((2, 0, 1), (1, 2, 0))
STEP = ["begin 2", "begin 0", "begin 1", "summed 2", "summed 0", "summed 1"]


class Noted:
    """A Zero of three buckets, of layers a and b, of c, and of d and e; and what its buckets were asked, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        names = {layer: ReadingLayer(place, place, layer) for place, layer in enumerate("abcde")}
        together = {"a": 0, "b": 0, "c": 1, "d": 2, "e": 2}  # of one stage each
        readers = {name: (reader._replace(stage=together[name]),) for name, reader in names.items()}
        parameters = {name: nn.Parameter(torch.ones(4, 4)) for name in names}
        self.zero = Zero(parameters, make_mesh(Layout(), CPU, timedelta(seconds=9)), readers)
        for number, bucket in enumerate(self.zero.buckets):
            bucket.sum = self._sum(number)  # type: ignore[method-assign]
            bucket.send = self._send(number)  # type: ignore[method-assign]

    def _pending(self, word: str, number: int) -> Pending[None]:
        return Pending(lambda: self.events.append(f"{word} {number}"))

    def _sum(self, number: int):  # type: ignore[no-untyped-def]
        def asked(watch: object, what: str) -> Pending[None]:
            self.events.append(f"begin {number}")
            return self._pending("summed", number)

        return asked

    def _send(self, number: int):  # type: ignore[no-untyped-def]
        def asked(watch: object, what: str) -> Pending[None]:
            self.events.append(f"send {number}")
            return self._pending("sent", number)

        return asked

    def take(self) -> list[str]:
        taken, self.events = self.events, []
        return taken


def test_a_sum_begins_in_its_turn_once_all_of_its_layers_are_complete() -> None:
    noted = Noted()
    for _ in range(2):  # and so in every step
        noted.zero.begin(TURNS)
        begun = {layer: (noted.zero.summed(layer), noted.take())[1] for layer in "cbdea"}
        assert begun == {"c": [], "b": [], "d": [], "e": ["begin 2"], "a": ["begin 0", "begin 1"]}
        noted.zero.reduce()
        assert noted.take() == STEP[3:]


def test_reduce_begins_what_has_not_begun_and_waits_for_all_in_every_step() -> None:
    noted = Noted()
    noted.zero.begin(TURNS)
    for _ in range(2):  # without a schedule that tells of layers
        noted.zero.reduce()
        assert noted.take() == STEP


def test_a_layer_waits_for_all_of_its_gathers_and_for_no_others() -> None:
    noted = Noted()
    noted.zero._layers[1] = frozenset("ca")  # layer a reads from two buckets
    for number in range(3):
        noted.zero.send(number)
    noted.take()
    noted.zero.need("b")
    assert noted.take() == ["sent 0"]
    noted.zero.send(0)
    noted.take()
    noted.zero.need("a")
    assert sorted(noted.take()) == ["sent 0", "sent 1"]
    noted.zero.settle()
    assert noted.take() == ["sent 2"]
    noted.zero.need("e")
    assert noted.take() == []


def test_weights_are_not_sent_while_they_still_travel() -> None:
    noted = Noted()
    noted.zero.send(1)
    noted.zero.send(1)
    assert noted.take() == ["send 1", "sent 1", "send 1"]


def test_gathers_take_their_own_turns() -> None:
    noted = Noted()
    noted.zero.begin(TURNS)
    assert tuple(noted.zero.gathers_turn) == TURNS.gathers
    noted.zero.publish()
    assert noted.take()[:3] == ["send 1", "send 2", "send 0"]


@pytest.mark.parametrize("turns", [None, TURNS])
def test_hooks_tell_of_sums_where_they_have_turns(turns: BucketTurns | None) -> None:
    zero = mock.Mock()
    hooks = ZeroHooks(zero, turns)
    hooks.begin()
    hooks.need("a")
    hooks.summed("b")
    need, begin, summed = mock.call.need("a"), mock.call.begin(turns), mock.call.summed("b")
    assert zero.mock_calls == ([begin, need, summed] if turns else [need])


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_stage_is_complete_with_its_last_weight_gradient_and_read_with_its_first_forward(name: str) -> None:
    schedule = build(name, 4, 8, 2 if name in ("interleaved",) else 1)
    timeline = simulate(schedule)
    first, last = stage_times(timeline)
    for stage in range(schedule.stages):
        of = [(op.kind, cell) for row in timeline.cells for cell in row for op in cell.slot if op.stage == stage]
        assert first[stage] == min(cell.start for kind, cell in of if kind == "F")
        assert last[stage] == max(cell.end for kind, cell in of if kind != "F")


def _rounded(rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A rank's gradients, and its shard of their sum in BF16."""
    parameters = {"w": nn.Parameter(torch.zeros(6, 16))}
    zero = Zero(parameters, make_mesh(Layout(dp=3), CPU, timedelta(seconds=60)), memory=BucketMemory(sums="bf16"))
    grads = torch.randn(96, generator=torch.Generator().manual_seed(rank))
    zero.buckets[0].grads[:96] = grads
    zero.reduce()
    return grads.numpy(), zero.buckets[0].grad_shard.numpy()


def test_a_sum_in_bf16_rounds_what_travels_once_and_the_owners_own_not_at_all() -> None:
    """In FP32, in the order of ranks."""
    found = local.run(_rounded, 3, deadline=60)
    grads = [torch.from_numpy(own) for own, _ in found]
    for owner, (_, shard) in enumerate(found):
        terms = [own if rank == owner else own.bfloat16().float() for rank, own in enumerate(grads)]
        total = (terms[0] + terms[1]) + terms[2]
        assert torch.equal(torch.from_numpy(shard), total.view(3, 32)[owner])


def test_stalls_are_counted_once() -> None:
    clock = iter((1.0, 3.0, 10.0, 10.5))
    with mock.patch.object(stalls, "time", SimpleNamespace(perf_counter=lambda: next(clock))):
        counted = Stalls(CPU)
        with counted.noted():
            pass
        assert counted.take() == 2.0
        with counted.noted():
            pass
        assert counted.take() == 0.5
        assert counted.take() == 0.0


def test_stalls_of_a_stream_are_counted_once() -> None:
    event = mock.Mock(elapsed_time=lambda after: 250.0)
    with mock.patch.object(stalls.torch, "cuda", mock.Mock(Event=lambda enable_timing: event)):
        counted = Stalls(torch.device("cuda", 0))
        with counted.noted():
            pass
        assert (counted.take(), counted.take()) == (0.25, 0.0)
