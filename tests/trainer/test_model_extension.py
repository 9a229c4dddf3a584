"""A new kind of block is one file and one line in decoder.BLOCKS: written here to a temporary folder, and trained."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dryvine.trainer.model import decoder
from dryvine.trainer.model.shape import Block, Shape, blocks
from tests.support.model import random_tokens, tiny, train, whole

NEW_FILE = '''
from torch import Tensor, nn
from dryvine.trainer.model.linear import linear

class Mixer(nn.Module):
    """Each token sees the one before it."""
    def __init__(self, spec):
        super().__init__()
        self.norm = spec.norm(spec.shape.hidden)
        self.weight = spec.weight(spec.shape.hidden, spec.shape.hidden)

    def forward(self, x_NH: Tensor, sequences: int) -> Tensor:
        before = self.norm(x_NH).x.unflatten(0, (sequences, -1)).roll(1, 1).flatten(0, 1)
        return x_NH + linear(before, self.weight)

def mixer(rank, name):
    return [rank.local("mixer", name, rank.module(name, lambda: Mixer(rank.spec)))]
'''


def module_at(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_new_kind_of_block_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mixer.py").write_text(NEW_FILE)
    monkeypatch.setitem(decoder.BLOCKS, "mixer", module_at(tmp_path / "mixer.py").mixer)

    def hybrid(shape: Shape) -> tuple[Block, ...]:
        return tuple(block._replace(kind="mixer") if block.name == "layers.1" else block for block in blocks(shape))

    monkeypatch.setattr(decoder, "blocks", hybrid)
    shape = tiny()
    model, tokens = whole(shape, stages=2), random_tokens(shape)
    model.initialise(0)
    assert "layers.1.weight" in dict(model.named_parameters())
    before = train(model, tokens)["loss"]
    with torch.no_grad():
        for _, weight in model.named_parameters():
            assert weight.gradient().any()
            weight -= 0.1 * weight.gradient()
    assert train(model, tokens)["loss"] < before
