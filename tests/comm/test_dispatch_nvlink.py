"""The dispatcher that copies tokens into its peers' memory: `flat`'s rows and sums, however late a rank or a copy is.

Ranks are threads, their memory a file that all map, their copy engines threads (`support.host_links`)."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis.strategies import booleans
from torch import Tensor

from dryvine.comm import local
from dryvine.comm.dispatch import nvlink
from dryvine.comm.dispatch.backends import WINDOW_SLOTS
from dryvine.comm.dispatch.exchange import GroupExchange
from dryvine.comm.dispatch.flat import Flat
from dryvine.comm.dispatch.hierarchical import Hierarchical
from dryvine.comm.dispatch.meter import Meter
from dryvine.comm.dispatch.nvlink import Nvlink
from dryvine.comm.dispatch.setup import Setup
from dryvine.comm.dispatch.token_plan import PlanGroup, RowRoom
from dryvine.comm.dispatch.windows import WindowRows, Windows, word_count
from dryvine.comm.live_steps import LiveStep
from dryvine.comm.mesh import Layout, make_mesh
from dryvine.comm.topology import by_sizes
from tests.support.dispatch import Boards, cases, check_order, on_ranks, there_and_back
from tests.support.host_links import HostLinks, make_room

SLOT = 1 << 17
MOST = 20
CPU = torch.device("cpu")


class Node:
    """The windows of `ranks` threads."""

    def __init__(self, folder: str | Path, ranks: int, slow: dict[int, float] | None = None) -> None:
        self.folder, self.ranks, self.slow = Path(folder), ranks, slow or {}
        self.size, self.words = WINDOW_SLOTS * SLOT, word_count(ranks)
        make_room(self.folder, ranks, self.size, self.words)
        self.expected: list[tuple[str, Any, Any]] = []

    def windows(self, rank: int) -> Windows:
        links = HostLinks(self.folder, self.ranks, self.size, self.words, self.slow.get(rank, 0.0))
        classes: Any = ["self" if other == rank else "intra" for other in range(self.ranks)]
        world = [10 + other for other in range(self.ranks)]
        return Windows(rank, links, SLOT, Meter(), classes, lambda *args: self.expected.append(args), world)

    def run(self, fn: Callable[[int], Any]) -> list[Any]:
        """`fn` on all ranks; where one raises, the others' waits end."""

        def guarded(rank: int) -> Any:
            try:
                return fn(rank)
            except BaseException:
                HostLinks(self.folder, self.ranks, self.size, self.words).words.fulfil(range(self.words))
                raise

        return on_ranks(self.ranks, guarded)

    def nvlink(self, rank: int, experts: int, alignment: int = 1, by_choice: bool = False) -> Nvlink:
        room = RowRoom(inf, torch.zeros(1, dtype=torch.int64))
        return Nvlink(self.windows(rank), PlanGroup(experts, alignment), MOST, room, by_choice)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(cases().filter(lambda case: sum(case[0]) <= 6), booleans())  # each rank has a thread for each rank
def test_it_gives_what_flat_gives(case: tuple[list[int], int, int, list[Tensor], int, int], by_choice: bool) -> None:
    sizes, experts, top_k, chosen, alignment, _ = case
    ranks = sum(sizes)
    boards = Boards(by_sizes([ranks]))
    noise = torch.Generator().manual_seed(0)
    rows = [torch.randn(len(c), 5, generator=noise) for c in chosen]
    grads = [torch.randn(len(c), 5, generator=noise) for c in chosen]
    weights = [torch.rand(len(c), top_k, generator=noise) for c in chosen]

    with tempfile.TemporaryDirectory() as folder:
        node = Node(folder, ranks)

        def both(rank: int) -> Any:
            given_rows = chosen[rank], rows[rank], weights[rank], grads[rank]
            flat = there_and_back(boards.flat(rank, experts, alignment), *given_rows)
            return flat, there_and_back(node.nvlink(rank, experts, alignment, by_choice), *given_rows)

        found = node.run(both)
    for rank, (flat, ours) in enumerate(found):
        assert flat[0].counts == ours[0].counts
        for a, b in zip(flat[1], ours[1], strict=True):
            assert torch.equal(a, b)
        if by_choice:
            assert torch.equal(ours[2], flat[2])
        torch.testing.assert_close(ours[2], flat[2], rtol=1e-6, atol=1e-6)
        assert torch.equal(ours[3], flat[3])
        check_order(ours, rank, experts // ranks, chosen, rows)


def bf16_case(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(MOST, 8, generator=generator).argsort(dim=1)[:, :4].contiguous()
    return chosen, torch.randn(MOST, 16, generator=generator).bfloat16()


def test_partial_sums_are_made_in_fp32_and_rounded_once_a_rank(tmp_path: Path) -> None:
    """In BF16: each rank's sum of a token's rows, rounded; then the ranks' sums in the order of ranks, rounded."""
    node = Node(tmp_path, 2)

    def one(rank: int) -> Any:
        dispatcher, (chosen, rows) = node.nvlink(rank, 8), bf16_case(rank)
        handle = dispatcher.plan_routing(chosen).wait()
        (got,) = dispatcher.dispatch((rows,), None, handle).wait()
        numbers = torch.arange(len(got))[:, None] + 1
        scaled = (got.float() * numbers).bfloat16()
        return dispatcher.combine(scaled, None, handle).wait()[0], handle, scaled

    found = node.run(one)
    for rank, (got, _, _) in enumerate(found):
        partial = torch.zeros(2, MOST, 16)
        for other, (_, handle, scaled) in enumerate(found):
            for row, token in enumerate(handle.plan.token.tolist()):
                if token // MOST == rank:
                    partial[other, token % MOST] += scaled[row].float()
        want = (partial[0].bfloat16().float() + partial[1].bfloat16().float()).bfloat16()
        assert torch.equal(got, want)


def test_fp8_values_and_scales_travel_side_by_side(tmp_path: Path) -> None:
    node = Node(tmp_path, 2)

    def one(rank: int) -> Any:
        dispatcher, (chosen, _) = node.nvlink(rank, 8), bf16_case(rank)
        values = (torch.arange(MOST * 16).view(MOST, 16) + rank).to(torch.uint8)
        scales = torch.arange(MOST, dtype=torch.uint8)[:, None]
        handle = dispatcher.plan_routing(chosen).wait()
        return (handle, *dispatcher.dispatch((values, scales), None, handle).wait())

    for handle, values, scales in node.run(one):
        source, token = handle.plan.token // MOST, handle.plan.token % MOST
        assert torch.equal(scales[:, 0].long(), token)
        assert torch.equal(values[:, 3].long(), (token * 16 + 3 + source) % 256)


@pytest.mark.parametrize("slow", [{}, {0: 0.002}, {1: 0.002}], ids=["even", "first late", "last late"])
def test_more_messages_than_slots_in_any_order_of_waits(tmp_path: Path, slow: dict[int, float]) -> None:
    """Pairs of results, the second waited for first, 3 turns of the ring."""
    node = Node(tmp_path, 3, slow)

    def one(rank: int) -> list[Tensor]:
        windows, found = node.windows(rank), []
        for number in range(0, 3 * WINDOW_SLOTS, 2):
            pending = [
                windows.start(
                    lambda target, n=n: (torch.full((2, 1), 100.0 * n + 10 * rank + target),),
                    (WindowRows(2, (1,), torch.float32),),
                    lambda came: came[0].whole().view(3, 2, 1),
                    f"message {n}",
                )
                for n in (number, number + 1)
            ]
            found.append(pending[1].wait())
            found.append(pending[0].wait())
        return found

    for rank, found in enumerate(node.run(one)):
        for place, came in enumerate(found):
            number = place + 1 if place % 2 == 0 else place - 1
            want = torch.tensor([100.0 * number + 10 * source + rank for source in range(3)])
            assert torch.equal(came, want[:, None, None].expand(3, 2, 1))


def test_no_message_is_overwritten_before_it_is_read(tmp_path: Path) -> None:
    """Rank 0 starts three turns of messages at once; rank 1 reads them one by one, slowly."""
    node = Node(tmp_path, 2)

    def one(rank: int) -> list[list[float]]:
        windows, room = node.windows(rank), WindowRows(1, (), torch.float32)
        pending = []
        found = []
        for number in range(3 * WINDOW_SLOTS):
            sent = torch.tensor([float(number + 100 * rank)])
            pending.append(
                windows.start(
                    lambda _, s=sent: (s,), (room,), lambda came: came[0].whole().tolist(), f"message {number}"
                )
            )
            if rank == 1:
                time.sleep(0.005)
                found.append(pending.pop().wait())
        return found + [each.wait() for each in pending]

    assert node.run(one) == [[[float(number), number + 100.0] for number in range(3 * WINDOW_SLOTS)]] * 2


def test_bytes_are_those_of_tokens_and_not_of_choices(tmp_path: Path) -> None:
    node = Node(tmp_path, 2)

    def one(rank: int) -> list[dict[str, int]]:
        dispatcher, (chosen, rows) = node.nvlink(rank, 8), bf16_case(rank)
        taken = []
        handle = dispatcher.plan_routing(chosen[:7]).wait()
        taken.append(dispatcher.meter.take())
        (got,) = dispatcher.dispatch((rows[:7],), None, handle).wait()
        taken.append(dispatcher.meter.take())
        dispatcher.combine(got, None, handle).wait()
        return [*taken, dispatcher.meter.take()]

    choices, rows, sums = (dict.fromkeys(("self", "intra"), size) for size in (MOST * 4 * 4, 7 * 32, MOST * 32))
    assert node.run(one) == [[choices, rows, sums]] * 2


def test_what_is_awaited_is_noted_by_rank_until_it_has_come(tmp_path: Path) -> None:
    node = Node(tmp_path, 3)
    chosen, _ = bf16_case(0)
    first, second, third = (node.nvlink(rank, 9) for rank in range(3))
    waiting = [first.plan_routing(chosen, "layer 3, microbatch 1")]
    size = MOST * 4 * 4
    assert [(what, due) for what, due, _ in node.expected] == [
        ("routing of layer 3, microbatch 1", ((11, size),)),
        ("routing of layer 3, microbatch 1", ((12, size),)),
    ]
    late, later = (come for _, _, come in node.expected)
    waiting.append(third.plan_routing(chosen))
    until = time.monotonic() + 30
    while not later():
        assert time.monotonic() < until
    assert not late()
    assert not waiting[0].ready()
    waiting.insert(1, second.plan_routing(chosen))
    node.run(lambda rank: waiting[rank].wait())
    assert late()


def test_too_many_tokens_and_a_choice_made_twice_are_refused(tmp_path: Path) -> None:
    node = Node(tmp_path, 2)
    twice = torch.tensor([[0, 1], [3, 3]])

    def one(rank: int) -> str:
        dispatcher = node.nvlink(rank, 8)
        pending = dispatcher.plan_routing(twice if rank == 1 else twice[:1])
        with pytest.raises(ValueError, match="rank 1: a token chose the same expert twice") as refused:
            pending.wait()
        return str(refused.value)

    assert len(set(node.run(one))) == 1
    with pytest.raises(ValueError, match=f"{MOST + 1} tokens are dispatched at once, and there is room for {MOST}"):
        node.nvlink(0, 8).plan_routing(torch.zeros(MOST + 1, 2, dtype=torch.int64))


def test_a_row_too_wide_for_a_slot_is_an_error(tmp_path: Path) -> None:
    windows, room = Node(tmp_path, 2).windows(0), WindowRows(200_000, (), torch.float32)
    with pytest.raises(ValueError, match="dispatch of x: takes 1600000 bytes of a slot of 131072"):
        windows.start(lambda _: (torch.zeros(1),), (room,), lambda came: came, "dispatch of x")


def test_slots_hold_the_widest_message() -> None:
    setup = Setup(experts=8, topology=by_sizes([4]), tokens=1025, row_bytes=20, top_k=3)
    rooms = [
        WindowRows(1025, (5,), torch.float32),
        WindowRows(1025, (3,), torch.float32),
        WindowRows(1025, (1,), torch.uint8),
    ]
    assert nvlink.slot_bytes(setup) >= sum(room.bytes(4) for room in rooms[:2])
    assert nvlink.slot_bytes(setup) >= sum(room.bytes(4) for room in rooms[1:])
    every = (WindowRows(1025 * 3, (5,), torch.float32), rooms[1])
    assert nvlink.slot_bytes(replace(setup, by_choice=True)) >= sum(room.bytes(4) for room in every)


def test_sums_by_choice_over_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match="by_choice: between nodes rows travel as sums"):
        nvlink.build(Setup(experts=8, topology=by_sizes([1, 1]), by_choice=True))


def cannot_share(rank: int) -> list[str]:
    """What was said on this rank."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    for name in ("nvlink", "hop_groups"):
        logging.getLogger(f"dryvine.comm.dispatch.{name}").addHandler(handler)
    mesh = make_mesh(Layout(ep=3), CPU, timedelta(seconds=30))
    one, two = (
        nvlink.build(Setup(experts=6, mesh=mesh, topology=by_sizes(sizes), tokens=4, row_bytes=8))
        for sizes in ([3], [1, 2])
    )
    assert isinstance(one, Flat)
    assert isinstance(two, Hierarchical)
    assert isinstance(two.intra, GroupExchange)
    return said


def test_ranks_that_cannot_share_memory_use_an_all_to_all_and_say_so_once() -> None:
    """In one node flat's, in two that of two hops."""
    flat = "nvlink: no memory that the ranks could share; flat is used instead"
    hop2 = "nvlink: no memory that ranks 1, 2 could share; their hop 2 is an all-to-all instead"
    assert local.run(cannot_share, 3, deadline=60) == [[flat], [hop2], []]


def test_a_recorded_message_is_sent_and_awaited_anew_at_each_replay(tmp_path: Path) -> None:
    """In its slot, beside messages that are sent at once and come to use the same one."""
    node, replays = Node(tmp_path, 2), 2 * WINDOW_SLOTS + 1

    def one(rank: int) -> list[float]:
        windows, room, found = node.windows(rank), WindowRows(1, (1,), torch.float32), []
        sent, steps = torch.zeros(1, 1), list[LiveStep]()
        with windows.live.recorded_by(steps.append):
            view = windows.start(lambda _: (sent,), (room,), lambda came: came[0].rows, "recorded").wait()
        post, wait, release = steps
        assert [step.waits for step in steps] == [False, True, False]
        for number in range(replays):
            windows.live.during = f", microbatch {number}"
            sent.fill_(10 * number + rank)
            post.run()
            negative = torch.full((1, 1), -number - 1.0)
            other = windows.start(
                lambda _, t=negative: (t,), (room,), lambda came: float(came[0].rows[1 - rank]), "at once"
            )
            wait.run()
            found.append(float(view[1 - rank]))
            release.run()
            found.append(float(other.wait()))
        return found

    for rank, found in enumerate(node.run(one)):
        assert found == [value for n in range(replays) for value in (10.0 * n + 1 - rank, -n - 1.0)]
    said = {what for what, _, _ in node.expected if what.startswith("recorded")}
    assert said == {f"recorded, microbatch {number}" for number in range(replays)}


def test_a_slot_is_given_back_where_a_recording_is_cut_anyhow(tmp_path: Path) -> None:
    """Between the read of a message and the next one's start nothing is cut."""
    node, events = Node(tmp_path, 2), list[str]()
    windows, room = node.windows(0), WindowRows(1, (1,), torch.float32)

    def cut(step: LiveStep) -> None:
        events.append("waits" if step.waits else "cut")

    with windows.live.recorded_by(cut):
        for number in range(2):
            pending = windows.start(lambda _: (torch.zeros(1, 1),), (room,), lambda came: events.append("read"), "m")
            pending.wait()
            events.append(f"used {number}")
    assert events == ["cut", "waits", "read", "used 0", "cut", "cut", "waits", "read", "used 1", "cut"]


def test_choices_of_recorded_ops_go_with_their_rows(tmp_path: Path) -> None:
    """One message less than at once, for the same rows, as many bytes, and room behind them."""
    node = Node(tmp_path, 2)

    def one(rank: int) -> list[bool]:
        dispatcher, (chosen, rows), steps = node.nvlink(rank, 8), bf16_case(rank), list[LiveStep]()
        weights = chosen.float()
        planned = dispatcher.plan_routing(chosen).wait()
        want = dispatcher.dispatch((rows,), weights, planned).wait()
        sent = dispatcher.meter.take()

        def cut(step: LiveStep) -> None:
            steps.append(step)
            step.run()

        with dispatcher.windows.live.recorded_by(cut):
            handle = dispatcher.plan_routing(chosen).wait()
            assert not steps
            got = dispatcher.dispatch((rows,), weights, handle).wait()
        assert [step.waits for step in steps] == [False, True, False]
        assert dispatcher.meter.take() == sent
        count = len(want[0])
        assert len(got[0]) == 2 * MOST * 4
        assert not got[0][count:].any()
        return [torch.equal(a[:count], b) for a, b in zip(got, want, strict=True)]

    assert node.run(one) == [[True, True]] * 2
