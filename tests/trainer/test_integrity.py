"""A bit that differs between copies of the weights is found, with its rank and tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dryvine.comm import local
from dryvine.trainer.__main__ import code_of
from dryvine.trainer.config import Config
from dryvine.trainer.exit_codes import ExitCode
from dryvine.trainer.integrity import CorruptWeights, check_copies, sums
from dryvine.trainer.rig import Rig
from tests.support.rig import rig_of

Tiny = Callable[..., Config]


def flip(values: torch.Tensor, element: int) -> None:
    """The lowest bit of an element."""
    raw = values.detach().view(-1)[element : element + 1].view(torch.uint8)
    raw[0] ^= 1


def _found(rig: Rig) -> str:
    try:
        check_copies(rig.optimizer.zero)
    except CorruptWeights as error:
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
    said["mended"] = _found(rig)
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
    assert said["sound"] == said["mended"] == ""
    for rank in range(config.parallel.world):
        for element in (0, -2):
            assert f"differ: {name} on rank {rank} (" in said[f"{rank}, {element}"], (rank, element)
            assert said[f"{rank}, {element}"].count(" on rank ") == 1
    assert f"on rank {config.parallel.world - 1} (" in said["masters"]
    assert "masters of " in said["masters"] or config.parallel.world == 1
    assert holders == tuple(range(config.parallel.world))


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
    monkeypatch.setattr("dryvine.trainer.integrity.PART", 7)
    assert sums(values) == whole


def test_a_run_that_finds_damage_does_not_say_finished() -> None:
    assert code_of(CorruptWeights("x")) == ExitCode.DIVERGED
