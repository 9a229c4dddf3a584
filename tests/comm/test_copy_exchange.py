"""Hop 2 by copy engine: the bits of two hops over all-to-alls, whatever the routing, and however small its rings.

Ranks are threads, their memory a file that all map, their copy engines threads (`support.host_links`)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dryvine.comm.dispatch.backends import RING_SLOTS, piece_bytes, ring_bytes
from dryvine.comm.dispatch.copy_exchange import CopyExchange, word_count
from dryvine.comm.dispatch.hierarchical import Hierarchical
from dryvine.comm.dispatch.hop_groups import HopGroups, rail_of
from dryvine.comm.dispatch.meter import Meter
from dryvine.comm.topology import by_sizes
from tests.support.dispatch import Boards, ThreadExchange, cases, on_ranks, there_and_back
from tests.support.host_links import HostLinks, make_room

PIECE = 320  # bytes: two of the widest rows below


class Node:
    """The exchanges of `ranks` threads; `slow` seconds before each copy of a rank."""

    def __init__(self, folder: Path, ranks: int, piece: int = PIECE, slow: dict[int, float] | None = None) -> None:
        self.folder, self.ranks, self.piece, self.slow = folder, ranks, piece, slow or {}
        self.memory, self.words = ranks * RING_SLOTS * piece, word_count(ranks)
        folder.mkdir(exist_ok=True)
        make_room(folder, ranks, self.memory, self.words)
        self.expected: list[tuple[str, Any, Callable[[], bool]]] = []

    def links(self, rank: int) -> HostLinks:
        return HostLinks(self.folder, self.ranks, self.memory, self.words, self.slow.get(rank, 0.0))

    def exchange(self, rank: int) -> CopyExchange:
        classes: Any = ["self" if other == rank else "intra" for other in range(self.ranks)]
        world = [10 + other for other in range(self.ranks)]
        noted: Any = lambda *args: self.expected.append(args)  # noqa: E731
        return CopyExchange(rank, self.links(rank), self.piece, Meter(), classes, noted, world)

    def run(self, fn: Callable[[int], Any]) -> list[Any]:
        """`fn` on all ranks; where one raises, the others' waits end."""

        def guarded(rank: int) -> Any:
            try:
                return fn(rank)
            except BaseException:
                self.links(rank).words.fulfil(range(self.words))
                raise

        return on_ranks(self.ranks, guarded)


class Nodes:
    """Two hops over any nodes, hop 2 by copies."""

    def __init__(self, folder: str, sizes: Sequence[int]) -> None:
        self.topology = by_sizes(sizes)
        self.boards = Boards(self.topology)
        self.nodes = [Node(Path(folder) / str(n), size) for n, size in enumerate(sizes)]

    def dispatcher(self, rank: int, experts: int, alignment: int, chunks: int) -> Hierarchical:
        boards, number = self.boards, self.topology.node_of(rank)
        rail = ThreadExchange(boards.rails[rail_of(self.topology, rank)], rank)
        inside = self.nodes[number].exchange(self.topology.rail_of(rank))
        groups = HopGroups(self.topology, rank, ThreadExchange(boards.all, rank), inside, rail)
        return Hierarchical(groups, experts, None, chunks, alignment)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(cases().filter(lambda case: 1 < sum(case[0]) <= 8), st.sampled_from([1, 2, 3]))
def test_two_hops_by_copies_have_the_bits_of_two_hops(
    case: tuple[list[int], int, int, list[Tensor], int, int], chunks: int
) -> None:
    _equal(case[:5], chunks, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [1, 3])
def test_two_nodes_of_four(dtype: torch.dtype, chunks: int) -> None:
    noise = torch.Generator().manual_seed(chunks)
    chosen = [
        torch.rand(n, 16, generator=noise).argsort(dim=1)[:, :6].contiguous() for n in (40, 0, 1, 37, 9, 40, 3, 8)
    ]
    _equal(([4, 4], 16, 6, chosen, 4), chunks, dtype)


def _equal(case: tuple[list[int], int, int, list[Tensor], int], chunks: int, dtype: torch.dtype) -> None:
    sizes, experts, top_k, chosen, alignment = case
    noise = torch.Generator().manual_seed(0)
    rows, grads = ([torch.randn(len(c), 5, generator=noise).to(dtype) for c in chosen] for _ in range(2))
    weights = [torch.rand(len(c), top_k, generator=noise).to(dtype) for c in chosen]
    boards = Boards(by_sizes(sizes))
    with tempfile.TemporaryDirectory() as folder:
        nodes = Nodes(folder, sizes)

        def both(rank: int) -> Any:
            given_rows = chosen[rank], rows[rank], weights[rank], grads[rank]
            plain = there_and_back(boards.hierarchical(rank, experts, alignment, chunks), *given_rows)
            return plain, there_and_back(nodes.dispatcher(rank, experts, alignment, chunks), *given_rows)

        found = on_ranks(sum(sizes), both)
    for plain, ours in found:
        assert plain[0].counts == ours[0].counts
        for a, b in zip((*plain[1], *plain[2:]), (*ours[1], *ours[2:]), strict=True):
            assert torch.equal(a, b)


def test_fp8_values_and_scales_cross_and_are_handed_on(tmp_path: Path) -> None:
    """Every row of bytes comes to each of its experts with its own scale and weight."""
    nodes = Nodes(str(tmp_path), [2, 2])

    def one(rank: int) -> Any:
        chosen = torch.rand(20, 8, generator=torch.Generator().manual_seed(rank)).argsort(dim=1)[:, :4].contiguous()
        values = (torch.arange(20 * 16).view(20, 16) * (rank + 1) % 256).to(torch.uint8)
        scales = (torch.arange(20) + 20 * rank)[:, None].to(torch.uint8)
        dispatcher = nodes.dispatcher(rank, 8, 1, 2)
        handle = dispatcher.plan_routing(chosen).wait()
        return (chosen, *dispatcher.dispatch((values, scales), chosen.float(), handle).wait())

    found = on_ranks(4, one)
    for rank, (_, values, scales, weights) in enumerate(found):
        want = [
            (20 * source + token, expert)
            for expert in (2 * rank, 2 * rank + 1)
            for source, (chosen, *_) in enumerate(found)
            for token in range(20)
            if expert in chosen[token]
        ]
        assert list(zip(scales[:, 0].tolist(), weights.int().tolist(), strict=True)) == want
        for row, (number, _) in zip(values, want, strict=True):
            source, token = divmod(number, 20)
            assert row.tolist() == [(token * 16 + i) * (source + 1) % 256 for i in range(16)]


@pytest.mark.parametrize("slow", [{}, {0: 0.002}, {2: 0.002}], ids=["even", "first late", "last late"])
def test_rows_that_fill_rings_many_times(tmp_path: Path, slow: dict[int, float]) -> None:
    """Three exchanges are under way at once, of up to 40 pieces a pair in rings of 4; one pair sends nothing. What is
    sent may be written again once it has been waited for."""
    node = Node(tmp_path, 3, piece=16, slow=slow)
    rows = [[30, 41, 0], [7, 0, 80], [1, 5, 2]]  # from, to

    def one(rank: int) -> list[Tensor]:
        exchange, found = node.exchange(rank), []
        receives = [rows[source][rank] for source in range(3)]
        for turn in range(2):
            pending = []
            for number in range(3 * turn, 3 * turn + 3):
                sent = torch.arange(sum(rows[rank]), dtype=torch.int32) + 1000 * rank + 10000 * number
                pending.append((exchange.start(sent[:, None] + torch.zeros(1, 2), rows[rank], receives), sent))
            found += [each.wait() for each, _ in pending]
        return found

    for rank, found in enumerate(node.run(one)):
        for number, came in enumerate(found):
            want = [
                10000 * number + 1000 * source + sum(rows[source][:rank]) + i
                for source in range(3)
                for i in range(rows[source][rank])
            ]
            assert came[:, 0].tolist() == want


def test_what_is_awaited_is_noted_once_an_exchange_until_it_has_come(tmp_path: Path) -> None:
    node = Node(tmp_path, 2)
    first, second = node.exchange(0), node.exchange(1)
    waiting = first.start(torch.zeros(3, 2), [1, 2], [1, 5], what="dispatch hop 2 of layer 3")
    ((what, due, come),) = node.expected
    assert (what, due) == ("dispatch hop 2 of layer 3", ((11, 40),))
    assert not come()
    assert not waiting.ready()
    other = second.start(torch.ones(6, 2), [5, 1], [2, 1])
    assert other.wait().tolist() == [[0.0, 0.0]] * 2 + [[1.0, 1.0]]
    assert waiting.wait().tolist() == [[0.0, 0.0]] + [[1.0, 1.0]] * 5
    assert come()
    assert waiting.ready()
    assert (first.meter.take(), second.meter.take()) == ({"self": 8, "intra": 16}, {"self": 8, "intra": 40})


def test_slots_hold_the_widest_row_and_no_more_than_is_sent(tmp_path: Path) -> None:
    assert piece_bytes(14336, 8, 4096) == 8 << 20
    assert ring_bytes(8, 14336, 8, 4096) == 8 * 4 * (8 << 20)
    assert 10 * (40 + 8 * 3) <= piece_bytes(40, 3, 10) < 10 * (40 + 8 * 3) + 1000
    with pytest.raises(ValueError, match="a row of 400 bytes does not fit a slot of 320"):
        Node(tmp_path, 2).exchange(0).start(torch.zeros(1, 100), [0, 1], [0, 0])
