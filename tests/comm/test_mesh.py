"""Places and groups of a mesh, worked out by hand for 2 x 2 x 2; and ranks on this machine."""

from __future__ import annotations

import multiprocessing
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dryvine.comm import clock, local
from dryvine.comm.collectives import all_gather, reduce_scatter
from dryvine.comm.local import RankFailed, run
from dryvine.comm.mesh import Layout, make_mesh

CPU, MINUTE = torch.device("cpu"), timedelta(seconds=60)


def places(rank: int) -> dict[str, Any]:
    mesh = make_mesh(Layout(2, 2, 2, 2), CPU, MINUTE)
    members = {key: dist.get_process_group_ranks(group) for key, group in mesh.channels.items()}
    families = [(0, 3), (1,), (2, 3, 7)]
    return {
        "place": (mesh.pp_rank, mesh.ep_rank, mesh.data_rank),
        "experts": dist.get_process_group_ranks(mesh.experts),
        "pipelines": set(map(tuple, members.values())),
        "channels": (set(members), len({id(group) for group in mesh.channels.values()})),
        "neighbours": (mesh.global_rank(0), mesh.global_rank(1)),
        "more": {ranks: dist.get_process_group_ranks(group) for ranks, group in mesh.new_groups(families).items()},
        "sum": mesh.sum(torch.tensor([rank]), "ranks").item(),
        "max": mesh.max(torch.tensor([rank]), "ranks").item(),
        "gather": mesh.gather(str(rank), "ranks"),
        "copies": (mesh.ranks([1, 0]), mesh.ranks([1], ep_rank=1)),
    }


def test_places_and_groups_of_a_mesh() -> None:
    keys = {((route, way), rising) for route in (0, 1) for way in ("down", "up") for rising in (False, True)}
    for rank, seen in enumerate(run(places, 8, deadline=60)):
        assert seen["place"] == (rank // 4, rank % 2, rank % 4)
        assert seen["experts"] == [rank // 2 * 2, rank // 2 * 2 + 1]
        assert seen["pipelines"] == {(rank % 4, rank % 4 + 4)}
        assert seen["channels"] == (keys, 8)
        assert seen["neighbours"] == (rank % 4, rank % 4 + 4)
        assert seen["more"] == {ranks: list(ranks) for ranks in [(0, 3), (2, 3, 7)] if rank in ranks}
        assert (seen["sum"], seen["max"]) == (28, 7)
        assert seen["gather"] == list("01234567")
        assert seen["copies"] == (tuple(range(8)), (5, 7))


def test_one_process_has_no_groups() -> None:
    mesh = make_mesh(Layout(), CPU, MINUTE)
    assert (mesh.experts, mesh.channels, mesh.sms) == (None, {}, None)
    assert mesh.gather("x", "ranks") == ["x"]
    assert mesh.sum(torch.tensor([3]), "ranks").item() == 3


def slices(rank: int) -> tuple[list[float], list[float]]:
    """Rank r has r + 1 times 0..5."""
    part, every = torch.zeros(2), torch.zeros(6)
    reduce_scatter(part, torch.arange(6.0) * (rank + 1), dist.group.WORLD, None, "slices").wait()
    all_gather(every, part, dist.group.WORLD, None, "slices").wait()
    return part.tolist(), every.tolist()


def test_slices_are_in_rank_order() -> None:
    for rank, (part, every) in enumerate(run(slices, 3)):
        assert part == [6 * 2 * rank, 6 * (2 * rank + 1)]
        assert every == [0, 6, 12, 18, 24, 30]


def late(rank: int) -> float:
    """The clock of rank r is 100 r seconds ahead."""
    mesh, now = make_mesh(Layout(ep=3), CPU, MINUTE), clock.time.perf_counter
    clock.time = SimpleNamespace(perf_counter=lambda: now() + 100 * rank)
    return clock.offset(mesh)


def test_clocks_are_read_as_that_of_rank_0() -> None:
    for rank, seconds in enumerate(run(late, 3)):
        assert seconds == pytest.approx(-100 * rank, abs=0.5)


def test_the_offset_is_the_middle_of_the_shortest_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    pings = iter([(3.0, 1.0), (1.0, 5.0), (2.0, 9.0), *[(4.0, 0.0)] * (clock.PINGS - 3)])
    monkeypatch.setattr(clock, "_ping", lambda: next(pings))
    mesh: Any = SimpleNamespace(size=2, rank=1)
    assert clock.offset(mesh) == 5.0
    ticks = iter([10.0, 14.0])
    monkeypatch.undo()
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(dist, "send", lambda tensor, peer: None)
    monkeypatch.setattr(dist, "recv", lambda tensor, peer: tensor.fill_(52.0))
    assert clock._ping() == (4.0, 40.0)  # rank 0 read 52 when this rank read 12


def one_fails(rank: int) -> int:
    if rank == 1:
        raise ValueError("of rank 1")
    return rank


def test_a_rank_that_fails_is_named_with_its_traceback() -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1 of 2 failed:.*ValueError: of rank 1"):
        run(one_fails, 2)


def numbers(rank: int) -> torch.Tensor:
    return torch.arange(3) + rank


def test_tensors_of_ranks_that_have_ended_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(pipes: list[Connection], timeout: float) -> list[Any]:
        for process in multiprocessing.active_children():
            process.join(30)
        return connection.wait(pipes, timeout)

    monkeypatch.setattr(local, "wait", late)
    assert [found.tolist() for found in run(numbers, 2)] == [[0, 1, 2], [1, 2, 3]]


def sleeps(rank: int) -> None:
    clock.time.sleep(rank * 60)


def test_ranks_that_overrun_the_deadline_are_named() -> None:
    with pytest.raises(RankFailed, match=r"ranks \[1\] of 2 had not finished"):
        run(sleeps, 2, deadline=8.0)
