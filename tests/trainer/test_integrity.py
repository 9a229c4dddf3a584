"""A flipped bit is found, with its rank and tensor: of copies of weights, and of what an optimizer keeps."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any
from unittest import mock

import pytest
import torch

from dryvine.comm import local
from dryvine.trainer import adam, witness
from dryvine.trainer.__main__ import code_of
from dryvine.trainer.adam import Operands
from dryvine.trainer.bit_sums import sums
from dryvine.trainer.config import Config
from dryvine.trainer.exit_codes import ExitCode
from dryvine.trainer.integrity import Corrupt, Integrity, check_copies
from dryvine.trainer.ramps import points
from dryvine.trainer.rig import Rig
from dryvine.trainer.step import train_step
from tests.support.rig import rig_of

Tiny = Callable[..., Config]


def flip(values: torch.Tensor, element: int) -> None:
    """The lowest bit of an element."""
    raw = values.detach().view(-1)[element : element + 1].view(torch.uint8)
    raw[0] ^= 1


def _found(rig: Rig) -> str:
    try:
        check_copies(rig.optimizer.zero)
    except Corrupt as error:
        return str(error)
    return ""


def _flip_everywhere(rank: int, config: Config, name: str) -> dict[str, str]:
    """What is said of sound copies; then of one flipped bit, in each rank's copy in turn; then in the masters."""
    rig = rig_of(config)
    said = {"sound": _found(rig)}
    weight = dict(rig.model.named_parameters()).get(name)
    for culprit in range(rig.mesh.size):
        for element in (0, -2):
            if rank == culprit and weight is not None:
                flip(weight, element % weight.numel())
            said[f"{culprit}, {element}"] = _found(rig)
            rig.publish()
    bucket = rig.optimizer.zero.buckets[0]
    if rank == rig.mesh.size - 1:
        bucket.master[0] += 1
    said["masters"] = _found(rig)
    rig.publish()
    said["restored"] = _found(rig)
    return said


@pytest.mark.parametrize(
    ("layout", "name", "holders"),
    [
        (("parallel.dp=3", "batch.sequences=3", "run.dtype=bf16"), "layers.2.attention.o.weight", (0, 1, 2)),
        (("parallel.pp=2", "parallel.schedule=dualpipe"), "layers.2.attention.o.weight", (0, 1)),
        (("parallel.ep=2",), "layers.2.attention.o.weight", (0, 1)),
        ((), "layers.2.experts.down", (0,)),
    ],
)
def test_a_flipped_bit_is_named_wherever_it_is(
    tiny: Tiny, layout: tuple[str, ...], name: str, holders: tuple[int, ...]
) -> None:
    config = tiny(*layout, "model.layers=3")
    said, *others = local.run(_flip_everywhere, config.parallel.world, config, name, deadline=100)
    assert all(other == said for other in others)
    assert said["sound"] == said["restored"] == ""
    for rank in range(config.parallel.world):
        for element in (0, -2):
            assert f"differ: {name} on rank {rank} (" in said[f"{rank}, {element}"], (rank, element)
            assert said[f"{rank}, {element}"].count(" on rank ") == 1
    assert f"on rank {config.parallel.world - 1} (" in said["masters"]
    assert "masters of " in said["masters"] or config.parallel.world == 1
    assert holders == tuple(range(config.parallel.world))


def _one_run(rank: int, config: Config, culprit: int, field: str, when: str) -> str:
    """What a run says in which one bit of the state of `culprit` flips: once it is at rest, or while it is stepped."""
    witness.PART = 1 << 8  # several parts a shard
    rig = rig_of(config)
    if rank == culprit:
        _break(rig, field, when)
    try:
        for point in islice(points(config.batch, config.data.seq_len), 4):
            train_step(rig, point)
            rig.integrity.check(point.step + 1)
    except Corrupt as error:
        return f"step {point.step + 1}: {error}"
    rig.optimizer.zero.settle()
    return ""


def _break(rig: Rig, field: str, when: str) -> None:
    """After the first update, or in the second, between its arithmetic and its end."""
    optimizer = rig.optimizer
    update, step = rig.update, optimizer.step_shard

    def forgetful(*given: Any) -> None:
        update(*given)
        if float(optimizer.step) == 1:
            flip(getattr(optimizer.operands(0), field), 3)

    def wrongly(on: Operands, *given: Any) -> None:
        step(on, *given)
        if float(optimizer.step) == 1 and on.master.data_ptr() == optimizer.operands(0).master.data_ptr():
            flip(getattr(on, field), 3)

    if when == "at rest":
        rig.update = forgetful  # type: ignore[method-assign]
    else:
        optimizer.step_shard = wrongly  # type: ignore[method-assign]


TWICE = ("run.integrity_every=2", "run.steps=4", "model.layers=3")


@pytest.mark.parametrize("when", ["at rest", "stepped"])
@pytest.mark.parametrize(
    ("layout", "culprit", "field"),
    [
        (("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe", "batch.sequences=8"), 2, "exp_avg"),
        (("parallel.dp=3", "batch.sequences=3", "optim.moments=bf16", "run.dtype=bf16"), 1, "exp_avg_sq"),
        ((), 0, "master"),
    ],
    ids=["dualpipe", "data", "alone"],
)
def test_a_bit_of_the_optimizer_is_named(
    tiny: Tiny, layout: tuple[str, ...], culprit: int, field: str, when: str
) -> None:
    config = tiny(*layout, *TWICE)
    said, *others = local.run(_one_run, config.parallel.world, config, culprit, field, when, deadline=100)
    assert all(other == said for other in others)
    assert said.startswith(f"step 2: copies of the same weights or optimizer state differ: {field} of ")
    first = said.partition(";")[0]
    assert f" on rank {culprit} (" in first
    how = {"at rest": "which changed between two updates", "stepped": "update"}[when]
    assert how in first


@pytest.mark.parametrize("optim", [("optim.offload=cpu",), ("optim.moments=bf16", "optim.sums=bf16")])
def test_a_sound_run_is_watched_in_silence_and_to_the_same_bits(tiny: Tiny, optim: tuple[str, ...]) -> None:
    """Also what is loaded between two watched steps, and steps that update nothing."""
    layout = ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe", "batch.sequences=8", *optim)
    watched = tiny(*layout, *TWICE)
    plain = tiny(*layout, *TWICE[1:])
    masters = [local.run(_trained, 4, config, deadline=100) for config in (watched, plain)]
    for ours, theirs in zip(*masters, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _trained(rank: int, config: Config) -> dict[tuple[str, int], torch.Tensor]:
    adam.load_cpu_adam = lambda: "not for this test"
    rig = rig_of(config)
    for point in islice(points(config.batch, config.data.seq_len), 4):
        train_step(rig, point)
        rig.integrity.check(point.step + 1)
        if point.step == 2:  # as a checkpoint that is loaded
            for piece in rig.optimizer.pieces:
                piece.master.mul_(1.5)
            rig.restored()
    rig.optimizer.zero.settle()
    return {(piece.name, piece.start): piece.master.clone() for piece in rig.optimizer.pieces}


def test_steps_that_are_saved_are_watched(tiny: Tiny) -> None:
    run = tiny("run.integrity_every=5", "run.checkpoint_every=4", "run.steps=11").run
    integrity = Integrity(mock.Mock(), run)
    assert [step for step in range(1, 12) if integrity._due(step)] == [4, 5, 8, 10, 11]
    never = Integrity(mock.Mock(), run.model_copy(update={"integrity_every": None}))
    assert not any(never._due(step) for step in range(1, 12))


def test_sums_see_one_bit_and_an_exchange_of_two_words() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        values = torch.arange(7 if dtype is torch.uint8 else 6).to(dtype)
        before = sums(values)
        assert sums(values.clone()) == before
        assert sums(values.flip(0)) != before
        flip(values, 3)
        assert sums(values) != before
    assert sums(torch.zeros(0)) == (0, 0)


def test_parts_do_not_change_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(1000)
    whole = sums(values)
    monkeypatch.setattr("dryvine.trainer.bit_sums.PART", 7)
    assert sums(values) == whole


def test_a_run_that_finds_damage_does_not_say_finished() -> None:
    assert code_of(Corrupt("x")) == ExitCode.DIVERGED
