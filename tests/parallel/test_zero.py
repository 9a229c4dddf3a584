"""Gradients summed over copies and state sharded over them, on four ranks, against sums by hand."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dryvine.comm import local
from dryvine.comm.mesh import Layout, Mesh, make_mesh
from dryvine.parallel import buckets, zero
from dryvine.parallel.zero import Zero

CPU = torch.device("cpu")
# name -> (the whole shape, pipeline ranks that hold it); pp 2 x dp 1 x ep 2, so world rank = 2 * pp + ep
WHOLE = {
    "both.matrix": ((3, 5), (0, 1)),
    "both.vector": ((7,), (0, 1)),
    "experts": ((4, 2, 3), (0, 1)),  # two of the four on each ep rank
    "first": ((5,), (0,)),
    "last.experts": ((2, 3), (1,)),  # one on each ep rank of the last stage: a single copy
    "last.half": ((2, 2), (1,)),  # BF16
    "last": ((3,), (1,)),
}


@dataclass
class Piece:
    """A `zero.Piece` as it crosses processes."""

    name: str
    start: int
    matrix: bool
    master: np.ndarray
    grad: np.ndarray
    places: np.ndarray  # the numbers of its elements in the shard


@dataclass
class Report:
    """What one rank saw."""

    pieces: list[Piece]
    norm: float
    published: dict[str, np.ndarray]
    from_shards: dict[str, np.ndarray]
    dtypes: list[torch.dtype]


def whole(name: str) -> Tensor:
    """A value for each element that no other has."""
    number, size = list(WHOLE).index(name), int(np.prod(WHOLE[name][0]))
    return torch.arange(size, dtype=torch.float32).view(WHOLE[name][0]) + 30 * number


def gradient(name: str, rank: int) -> Tensor:
    return (rank + 1) * (whole(name) / 64 - 3)


def part(name: str, tensor: Tensor, rank: int) -> Tensor:
    return tensor.chunk(2)[rank % 2] if "experts" in name else tensor


def parameters(rank: int) -> dict[str, nn.Parameter]:
    """What `rank` holds, in an order of its own."""
    held = {}
    for name in sorted(WHOLE, reverse=rank % 2 == 0):
        if rank // 2 in WHOLE[name][1]:
            value = part(name, whole(name), rank).clone()
            held[name] = nn.Parameter(value.bfloat16() if name == "last.half" else value)
            if "experts" in name:
                held[name].expert = True  # type: ignore[attr-defined]
    return held


def mesh_of(rank: int) -> Mesh:
    return make_mesh(Layout(pp=2, ep=2), CPU, timedelta(seconds=60))


def step(rank: int) -> Report:
    """Fill gradients, reduce, take the norm, change the masters, publish."""
    zero.NORM_PART = 4  # a shard in several parts
    buckets.LANES = 1  # no padding but to equal shards
    held = parameters(rank)
    sharded = Zero(held, mesh_of(rank))
    for parameter in held.values():
        parameter.main_grad.fill_(torch.nan)  # type: ignore[attr-defined]
    sharded.zero_grads()
    for name, parameter in held.items():
        parameter.main_grad.add_(part(name, gradient(name, rank), rank))  # type: ignore[attr-defined]
    sharded.reduce()
    norm = float(sharded.grad_norm())
    pieces = []
    for bucket in sharded.buckets:
        numbers = torch.arange(len(bucket.master))
        for p in bucket.pieces():
            arrays = (t.numpy().copy() for t in (p.master, p.grad, numbers[p.in_shard]))
            pieces.append(Piece(p.name, p.start, p.matrix, *arrays))
    for p in sharded.pieces():
        p.master.add_(0.3)
    sharded.publish()
    published = {name: parameter.detach().float().numpy().copy() for name, parameter in held.items()}
    sharded.publish([bucket.master - 1 for bucket in sharded.buckets])
    from_shards = {name: parameter.detach().float().numpy() for name, parameter in held.items()}
    return Report(pieces, norm, published, from_shards, [b.values.dtype for b in sharded.buckets])


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    return local.run(step, 4, deadline=60)


def holders(name: str, element: int) -> list[int]:
    """The world ranks that hold an element of the whole parameter."""
    ranks = [2 * pp + ep for pp in WHOLE[name][1] for ep in (0, 1)]
    if "experts" in name:
        ranks = [rank for rank in ranks if rank % 2 == 2 * element // whole(name).numel()]
    return ranks


def test_every_element_is_owned_once_by_a_rank_that_holds_it(reports: list[Report]) -> None:
    for name in WHOLE:
        owners: dict[int, int] = {}
        for rank, report in enumerate(reports):
            for piece in (p for p in report.pieces if p.name == name):
                for element in range(piece.start, piece.start + piece.master.size):
                    assert element not in owners
                    owners[element] = rank
        assert sorted(owners) == list(range(whole(name).numel()))
        assert all(owner in holders(name, element) for element, owner in owners.items())


def test_the_copies_share_a_bucket_equally(reports: list[Report]) -> None:
    """22 elements on four ranks: 6 each, the last padded."""
    owned = [sum(p.master.size for p in report.pieces if p.name.startswith("both")) for report in reports]
    assert owned == [6, 6, 6, 4]


def test_a_piece_has_the_values_and_the_summed_gradient_of_its_elements(reports: list[Report]) -> None:
    for piece in (piece for report in reports for piece in report.pieces):
        elements = range(piece.start, piece.start + piece.master.size)
        np.testing.assert_array_equal(piece.master, whole(piece.name).flatten()[piece.start :][: len(elements)])
        summed = [sum(float(gradient(piece.name, r).flatten()[e]) for r in holders(piece.name, e)) for e in elements]
        np.testing.assert_allclose(piece.grad, summed, rtol=1e-6)
        assert piece.matrix == (len(WHOLE[piece.name][0]) > 1)


def test_pieces_lie_in_the_shard_one_after_the_other(reports: list[Report]) -> None:
    for report in reports:
        for before, piece in zip(report.pieces, report.pieces[1:], strict=False):
            assert piece.places[0] in (before.places[-1] + 1, 0)
        assert all(len(piece.places) == piece.master.size for piece in report.pieces)


def test_the_norm_counts_each_element_once(reports: list[Report]) -> None:
    square = sum(
        sum(float(gradient(name, r).flatten()[e]) for r in holders(name, e)) ** 2
        for name in WHOLE
        for e in range(whole(name).numel())
    )
    for report in reports:
        assert report.norm == pytest.approx(square**0.5, rel=1e-6)


def test_every_copy_gets_the_new_values_in_its_dtype(reports: list[Report]) -> None:
    for rank, report in enumerate(reports):
        assert report.published.keys() == parameters(rank).keys()
        for name in report.published:
            for values, less in ((report.published, 0), (report.from_shards, 1)):
                expected = part(name, whole(name) + 0.3 - less, rank)
                expected = expected.bfloat16().float() if name == "last.half" else expected
                np.testing.assert_array_equal(values[name], expected, err_msg=name)


def test_dtypes_and_copies_do_not_mix(reports: list[Report]) -> None:
    """What both stages hold, and experts; then the first stage's own; or the last's own, its experts, and in BF16."""
    assert [len(report.dtypes) for report in reports] == [3, 3, 5, 5]
    assert [report.dtypes.count(torch.bfloat16) for report in reports] == [0, 0, 1, 1]
