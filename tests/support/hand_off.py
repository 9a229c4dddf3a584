"""Released checkpoints and run folders in miniature, without training and without a command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dryvine.trainer.checkpoint.stored import write_pieces
from dryvine.trainer.data import tokenizer as tokenizers
from dryvine.trainer.hand_off.names import places, sizes
from dryvine.trainer.hand_off.run_files import TOKENIZER, OpenRun, open_run, write_shape
from dryvine.trainer.hand_off.tokenizer_files import TokenizerFiles, open_tokenizer
from dryvine.trainer.model.shape import Shape
from tests.support.model import filled, tiny


def small(**changes: Any) -> Shape:
    """A V3 in miniature whose vocabulary holds a tokenizer's, and whose gates choose clearly."""
    return tiny(**({"vocab": 320, "init_std": 0.2} | changes))


def to_hf(state: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Our whole tensors under their names."""
    return {
        p.theirs: state[p.ours].flatten()[p.first : p.first + p.elements].view(p.shape).clone() for p in places(shape)
    }


def from_hf(released: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """The reverse, as `Model.load` takes them."""
    whole = {name: torch.empty(size) for name, size in sizes(shape).items()}
    whole |= {name: torch.zeros(shape.routed) for name in filled(shape).buffers}
    for p in (p for p in places(shape) if not p.copy):
        whole[p.ours].view(-1)[p.first : p.first + p.elements] = released[p.theirs].flatten()
    return whole


def weights_of(shape: Shape, seed: int = 0) -> dict[str, Tensor]:
    """Random weights and biases, none of them neutral but V2's biases, which its files have no place for."""
    model = filled(shape, seed)
    if shape.score == "softmax":
        for bias in model.buffers.values():
            bias.zero_()
    return {name: weight.detach() for name, weight in model.named_parameters()} | model.buffers


def run_of(shape: Shape, folder: Path, state: Mapping[str, Tensor] | None = None) -> OpenRun:
    """A run folder as an import makes it, with a tokenizer of the standard library's words."""
    state = state or weights_of(shape)
    pieces = ((name, 0, {"master": state[name].flatten()}) for name in sizes(shape))
    biases = {name: tensor for name, tensor in state.items() if name.endswith(".gate.bias")}
    write_pieces(folder, 0, pieces, biases, sizes(shape))
    write_shape(folder, shape)
    (folder / TOKENIZER).mkdir()
    tokenizers.learn_tokenizer(["def f(x):\n    return x\n"] * 9, 270).save(str(folder / TOKENIZER / "tokenizer.json"))
    return open_run(str(folder))


def tokenizer_of(run: OpenRun) -> TokenizerFiles:
    return open_tokenizer(run.tokenizer(), None, None, run.shape.vocab)


def quiet(stage: str, done: int, total: int) -> None:
    """No progress bar."""
