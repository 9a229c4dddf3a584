"""Our own forward on one CPU in FP32, which other programs' log-probabilities are compared with.

Weights come from the checkpoint, rounded as the export rounds them, and not from the exported files: otherwise a
mistake that export and import share would cancel out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dryvine.comm.dispatch.single_rank import SingleRank
from dryvine.parallel.stage import Flight, State
from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.export_hf import weights
from dryvine.trainer.hand_off.names import Mapped, places, sizes
from dryvine.trainer.hand_off.run_files import OpenRun
from dryvine.trainer.hand_off.slices import Slice
from dryvine.trainer.hand_off.ties import margins
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.gate import Gate
from dryvine.trainer.model.shape import blocks, count_parameters
from dryvine.trainer.model.spec import Spec

Rounded = Callable[[Mapped, Tensor], Tensor]  # a weight in FP32 -> in FP32, as it was written


class ForwardResult(NamedTuple):
    """Of T positions."""

    log_probs: Tensor  # FP32 [T, vocab]: of the next token after each
    margins: Tensor  # FP32 [T]: how surely the gates chose (see `ties`), the least of all layers


class Forward:
    """The main model of a checkpoint, without MTP. Raises HandOffError if it does not fit into memory."""

    def __init__(self, run: OpenRun, rounded: Rounded) -> None:
        self.shape = run.shape.model_copy(update={"mtp_depth": 0, "recompute": ()})
        _check_memory(run)
        spec = Spec(self.shape, torch.float32, "cpu")
        names = tuple(block.name for block in blocks(self.shape) if block.kind != "head")
        self.model = Model(spec, {0: names}, SingleRank(self.shape.routed))
        self._margins: list[Tensor] = []
        for gate in self.model.gates.values():
            gate.register_forward_hook(partial(self._note, gate))
        state = _state(run, rounded)
        self.model.load(state)
        self.norm, self.head = spec.norm(self.shape.hidden), spec.plain_linear(self.shape.hidden, self.shape.vocab)
        with torch.no_grad():
            self.norm.weight.copy_(state["norm.weight"])
            self.head.weight.copy_(state["head.weight"])

    def compute(self, tokens: Sequence[int]) -> ForwardResult:
        """The forward pass of T tokens."""
        # The last column of a flight's tokens is a target, which is unused here.
        flight = Flight(torch.tensor([[*tokens, 0]]), 0.0, training=False)
        state: State = ()
        self._margins.clear()
        with torch.no_grad():
            for phase in self.model.stages[0].phases:
                state = phase.forward(state, flight).wait()
            logits: Tensor = self.head(self.norm(state[0]).x)
        sure = torch.stack([torch.full((len(tokens),), float("inf")), *self._margins]).amin(0)
        return ForwardResult(logits.log_softmax(-1), sure)

    def _note(self, gate: Gate, module: torch.nn.Module, given: object, logits_NE: Tensor) -> None:
        """What a gate that has just run tells of its choice; torch passes the gate a second time, without its type."""
        self._margins.append(margins(logits_NE, gate.bias, self.shape))


def _state(run: OpenRun, rounded: Rounded) -> dict[str, Tensor]:
    shape = run.shape.model_copy(update={"mtp_depth": 0})
    state = {name: torch.empty(size) for name, size in sizes(shape).items()}
    state |= run.stored.buffers
    for place in places(shape):
        values = rounded(place, weights(run.stored, Slice(place, 0, place.shape[0])))
        state[place.ours].view(-1)[place.first : place.first + place.elements] = values.flatten()
    return state


def _check_memory(run: OpenRun) -> None:
    """Raises HandOffError if memory is too small: while loading, weights are there twice."""
    needed = 2 * 4 * count_parameters(run.shape)[0]
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise HandOffError(
            f"--check computes in FP32 on this machine and needs {needed / 1e9:.0f} GB of memory, of which it has "
            f"{there / 1e9:.0f}: run it on a larger one"
        )
