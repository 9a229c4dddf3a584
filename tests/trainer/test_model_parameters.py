"""The list of parameters without torch is that of the modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dryvine.comm.dispatch.single_rank import SingleRank
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.parameters import parameters
from dryvine.trainer.model.shape import blocks, count_parameters
from dryvine.trainer.model.spec import Spec
from tests.support.model import tiny


@pytest.mark.parametrize("changes", [{"mtp_depth": 2}, {"q_lora": None, "shared": 0}, {"shared": 2, "first_dense": 2}])
@pytest.mark.parametrize("ep", [1, 4])
def test_names_and_sizes_are_those_of_the_modules(changes: dict[str, Any], ep: int) -> None:
    shape = tiny(**changes)
    names = tuple(block.name for block in blocks(shape))
    model = Model(Spec(shape, torch.float32, "meta", ep_size=ep), {0: names}, SingleRank(shape.routed))
    built = {name: (weight.numel(), weight.expert) for name, weight in model.named_parameters()}
    assert {p.name: (p.elements(ep), p.expert) for p in parameters(shape, names).values()} == built
    total = sum(p.elements(1) for p in parameters(shape, names).values())
    assert total == count_parameters(shape, mtp=True)[0]
