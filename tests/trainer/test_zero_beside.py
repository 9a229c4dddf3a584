"""Sums of gradients under the pipeline's tail, gathers under the next forwards: when, in which order, to which bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch

from dryvine.comm import local
from dryvine.comm.pending import Pending
from dryvine.launch.plan.hardware import load_hardware
from dryvine.launch.plan.plan import make
from dryvine.parallel import bucket as module
from dryvine.parallel import buckets
from dryvine.parallel.bucket import Bucket
from dryvine.trainer import adam, verify
from dryvine.trainer.config import Config, load
from dryvine.trainer.optim import Optimizer
from dryvine.trainer.ramps import OptimConfig, gradient_scale, points
from dryvine.trainer.rig import Rig
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.step import accumulate, train_step
from tests.support.rig import rig_of

Tiny = Callable[..., Config]
LAYOUT = ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe", "batch.sequences=16")
TINY = Path(__file__).parents[1] / "tiny.toml"
SMALL = 1 << 12  # elements of a bucket, so that a stage has several


class Told(NamedTuple):
    """What one rank did, in order: a layer is read or summed; a bucket's sum or gather begins, or a gather ends."""

    events: list[tuple[str, str]]
    members: dict[str, tuple[int, ...]]  # the world ranks of each bucket
    layers: dict[str, set[str]]  # that this rank has of each


def two_steps(rank: int, config: Config) -> Told:
    buckets.CUT = SMALL
    rig = rig_of(config)
    events: list[tuple[str, str]] = []
    spy_on(rig, events)
    for _, point in zip(range(2), points(config.batch, config.data.seq_len), strict=False):
        train_step(rig, point)
    rig.optimizer.zero.settle()
    of = [bucket.layout for bucket in rig.optimizer.zero.buckets]
    own = {layer for layers in rig.plan.blocks_of(rig.mesh.pp_rank).values() for layer in layers}
    layers = {layout.name: own & {reader.layer for reader in layout.readers} for layout in of}
    return Told(events, {layout.name: rig.mesh.ranks(*layout.copies) for layout in of}, layers)


def spy_on(rig: Rig, events: list[tuple[str, str]]) -> None:
    zero = rig.optimizer.zero
    for event in ("need", "summed"):
        setattr(zero, event, _noting(event, getattr(zero, event), events))
    for bucket in zero.buckets:
        if bucket.group:
            _spy_on_bucket(bucket, events)


def _noting(event: str, real: Callable[[str], None], events: list[tuple[str, str]]) -> Callable[[str], None]:
    def noted(layer: str) -> None:
        events.append((event, layer))
        real(layer)

    return noted


def _spy_on_bucket(bucket: Bucket, events: list[tuple[str, str]]) -> None:
    sum_, send, name = bucket.sum, bucket.send, bucket.layout.name

    def noted_sum(watch: object, what: str) -> Pending[None]:
        events.append(("sum", name))
        return sum_(None, what)

    def noted_send(watch: object, what: str) -> Pending[None]:
        events.append(("gather", name))
        return send(None, what).then(lambda _: events.append(("gathered", name)))

    bucket.sum, bucket.send = noted_sum, noted_send  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def told(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Told]:
    places = (f'data.source="{corpus}"', f'run.out="{tmp_path_factory.mktemp("run")}"')
    return local.run(two_steps, 4, load(TINY, (*places, *LAYOUT)), deadline=100)


def test_a_sum_begins_when_its_layers_are_complete_and_others_are_not(told: list[Told]) -> None:
    for rank in told:
        step = rank.events[: rank.events.index(("gather", next(n for k, n in rank.events if k == "gather")))]
        begun = [name for kind, name in step if kind == "sum"]
        assert sorted(begun) == sorted(rank.layers) or len(begun) == sum(len(m) > 1 for m in rank.members.values())
        assert len(begun) >= 6
        for name in begun:
            complete = {layer for kind, layer in step[: step.index(("sum", name))] if kind == "summed"}
            assert complete >= rank.layers[name]
        last = max(n for n, (kind, _) in enumerate(step) if kind == "summed")
        assert sum(kind == "sum" for kind, _ in step[:last]) >= len(begun) // 2, "most are under way by then"


def test_gathers_end_when_a_layer_is_read_and_not_before(told: list[Told]) -> None:
    for rank in told:
        first_gather = next(n for n, (kind, _) in enumerate(rank.events) if kind == "gather")
        after = rank.events[first_gather:]
        second_step = after[next(n for n, (kind, _) in enumerate(after) if kind == "need") :]
        second_step = second_step[: next(n for n, (kind, _) in enumerate(second_step) if kind == "summed")]
        reading = ""
        for kind, name in second_step:
            if kind == "need":
                reading = name
            else:
                assert kind == "gathered"
                assert reading in rank.layers[name]
        ended = [name for kind, name in second_step if kind == "gathered"]
        assert len(ended) == len(set(ended)) >= 6


def test_ranks_that_share_buckets_begin_them_in_one_order(told: list[Told]) -> None:
    """Else two ranks wait for each other with kernels that hold a GPU."""
    for kind in ("sum", "gather"):
        for one in told:
            for other in told:
                orders = [[n for k, n in rank.events if k == kind] for rank in (one, other)]
                shared = {n for n in orders[0] if n in other.members and one.members[n] == other.members[n]}
                assert [n for n in orders[0] if n in shared] == [n for n in orders[1] if n in shared]


def _summed(rank: int, config: Config, elements: int) -> dict[tuple[str, int], np.ndarray]:
    buckets.CUT = elements
    rig = rig_of(config)
    point = next(points(config.batch, config.data.seq_len))
    accumulate(rig, point)
    rig.optimizer.reduce(gradient_scale(point))
    return {(p.name, p.start): p.grad.numpy().copy() for p in rig.optimizer.pieces}


def whole(parts: list[dict[tuple[str, int], np.ndarray]]) -> dict[str, np.ndarray]:
    """Pieces of all ranks put together."""
    by_name: dict[str, dict[int, np.ndarray]] = {}
    for (name, start), part in (item for of in parts for item in of.items()):
        by_name.setdefault(name, {})[start] = part
    return {name: np.concatenate([of[start] for start in sorted(of)]) for name, of in by_name.items()}


def test_sums_in_bf16_are_those_in_fp32_rounded_once_by_each_copy(tiny: Tiny) -> None:
    """And not once a hop: the error stays within half a unit of each term."""
    fp32, bf16 = (
        whole(local.run(_summed, 4, tiny(*LAYOUT, f"optim.sums={sums}"), SMALL, deadline=100))
        for sums in ("fp32", "bf16")
    )
    assert fp32.keys() == bf16.keys()
    worst = max(np.abs(bf16[name] - fp32[name]).max() / np.abs(fp32[name]).max() for name in fp32)
    assert 0 < worst < 4 * 2**-8


def _sharded_update(rank: int, config: Config) -> tuple[dict[tuple[str, int], np.ndarray], ...]:
    """Masters, summed gradients, and the masters after an update."""
    buckets.CUT = SMALL
    adam.load_cpu_adam = lambda: "not for this test"
    rig = rig_of(config)
    optimizer = rig.optimizer
    point = next(points(config.batch, config.data.seq_len))
    accumulate(rig, point)
    norm = optimizer.reduce(gradient_scale(point))
    before, grads = ({(p.name, p.start): of(p).numpy().copy() for p in optimizer.pieces} for of in (_master, _grad))
    optimizer.update(1e-2, norm, gradient_scale(point))
    optimizer.zero.settle()
    after = {(p.name, p.start): p.master.numpy().copy() for p in optimizer.pieces}
    return before, grads, after, {("norm", 0): np.array([norm])}


def _master(piece: module.Piece) -> torch.Tensor:
    return piece.master


def _grad(piece: module.Piece) -> torch.Tensor:
    return piece.grad


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_a_sharded_update_has_the_bits_of_an_unsharded_one(tiny: Tiny, offload: str) -> None:
    """From the same summed gradients and clip factor, in one process that holds everything. Offloaded by torch."""
    config = tiny(*LAYOUT, f"optim.offload={offload}")
    found = local.run(_sharded_update, 4, config, deadline=100)
    before, grads, after = (whole([rank[n] for rank in found]) for n in range(3))
    norm = float(found[0][3]["norm", 0][0])
    alone = unsharded(verify.alone(config), before, grads, norm)
    assert alone.keys() == after.keys()
    for name in after:
        np.testing.assert_array_equal(after[name], alone[name], err_msg=name)


def unsharded(
    config: Config, before: dict[str, np.ndarray], grads: dict[str, np.ndarray], norm: float
) -> dict[str, np.ndarray]:
    optimizer: Optimizer = rig_of(config.model_copy(update={"optim": OptimConfig()})).optimizer
    for piece in optimizer.pieces:
        piece.master.copy_(torch.from_numpy(before[piece.name]))
        piece.grad.copy_(torch.from_numpy(grads[piece.name]))
    optimizer.update(1e-2, norm, gradient_scale(next(points(config.batch, config.data.seq_len))))
    return whole([{(p.name, p.start): p.master.numpy() for p in optimizer.pieces}])


def _moved(rank: int, config: Config) -> int:
    """Bytes that a rank hands to others in a step: as it gives them to collectives, all slices but its own."""
    buckets.CUT = SMALL
    rig = rig_of(config)
    sent: list[int] = []

    def counting(name: str, size: Callable[..., int]) -> None:
        real = getattr(module, name)

        def counted(out: torch.Tensor, full: torch.Tensor, group: torch.distributed.ProcessGroup, *more: object):
            sent.append(size(out, full, group.size()))
            return real(out, full, group, *more)

        setattr(module, name, counted)

    counting("reduce_scatter", lambda out, full, copies: full.nbytes * (copies - 1) // copies)
    counting("exchange", lambda out, full, copies: full.nbytes * (copies - 1) // copies)
    counting("all_gather", lambda out, part, copies: part.nbytes * (copies - 1))
    train_step(rig, next(points(config.batch, config.data.seq_len)))
    rig.optimizer.zero.settle()
    return sum(sent)


@pytest.mark.parametrize(("sums", "dtype"), [("fp32", "fp32"), ("bf16", "bf16")])
def test_bytes_of_sums_and_gathers_are_as_planned(tiny: Tiny, sums: str, dtype: str) -> None:
    config = tiny(*LAYOUT, f"optim.sums={sums}", f"run.dtype={dtype}")
    with mock.patch.object(buckets, "CUT", SMALL):
        planned = sum(make(make_plan(config), load_hardware("cpu")).sharding.bytes.values())
    assert max(local.run(_moved, 4, config, deadline=100)) == pytest.approx(planned, rel=0.02)
