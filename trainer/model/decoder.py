"""The model of one rank: the blocks it holds, the pipeline stages made of them, its parameters and gate biases.

The arithmetic is independent of parallelism: a layer sees N tokens and a handle's counts, and a layout determines which
blocks a rank builds, which slice of the experts it holds, and which Dispatcher the phases call. A module that two
blocks of a rank use (for example the embedding, also used by MTP) is built once, so that a name is one Parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from dryvine.comm.dispatch.api import AnyDispatcher
from dryvine.parallel.stage import Stage
from dryvine.trainer.model import phases
from dryvine.trainer.model.gate import move_bias
from dryvine.trainer.model.initialise import initialise
from dryvine.trainer.model.phases import BlockBuilder, LossWeights, Wiring
from dryvine.trainer.model.shape import blocks
from dryvine.trainer.model.spec import Spec
from dryvine.trainer.tensors.weight import Weight

# Every kind of block that `shape.blocks` may name. A new kind: its file, and a line here.
BLOCKS: dict[str, BlockBuilder] = {
    "embed": phases.embed,
    "dense": phases.dense,
    "moe": phases.moe,
    "head": phases.head,
    "mtp": phases.mtp,
}


class Model:
    """The blocks of one rank. Names of parameters, buffers and loads are global: the same in every layout.

    `stages` has the names of the blocks (see `shape.blocks`) of each stage that this rank holds. Weights are not
    initialised: call `initialise` or `load`; on the meta device, `to_empty` first.
    """

    def __init__(self, spec: Spec, stages: Mapping[int, tuple[str, ...]], dispatcher: AnyDispatcher) -> None:
        self.loss_weights = LossWeights(spec.shape.mtp_weight)
        rank = Wiring(spec, dispatcher, self.loss_weights)
        kinds = {block.name: block.kind for block in blocks(spec.shape)}
        self.stages = {
            number: Stage(
                number, [phase for name in names for phase in BLOCKS[kinds[name]](replace(rank, block=name), name)]
            )
            for number, names in stages.items()
        }
        self.spec, self.root, self.gates, self._used = spec, rank.root, rank.gates, rank.used
        for _, weight in self.named_parameters():
            weight.queue = rank.wgrad.put

    def named_parameters(self) -> Iterator[tuple[str, Weight]]:
        return cast(Iterator[tuple[str, Weight]], self.root.named_parameters())

    def parameters_of(self, block: str) -> list[str]:
        """Names of the parameters that a block of this rank reads, in any order."""
        modules = tuple(f"{module}." for module in self._used[block])
        return [name for name, _ in self.named_parameters() if name.startswith(modules)]

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The gates' biases, FP32 [E], by name ("layers.3.gate.bias"): saved, and changed by `update_biases` only."""
        return {name: buffer for name, buffer in self.root.named_buffers() if name.endswith(".bias")}

    @property
    def loads(self) -> dict[str, Tensor]:
        """The number of this rank's tokens that were routed to each expert in training forwards since `reset_loads`:
        int64 [E], keyed by MoE block ("layers.3", "mtp.0")."""
        return {name: gate.load for name, gate in self.gates.items()}

    def reset_loads(self) -> None:
        for gate in self.gates.values():
            gate.load.zero_()

    def update_biases(self, global_loads: Mapping[str, Tensor], gamma: float) -> None:
        """Update the bias of every gate from the loads of the global batch; `global_loads` has the keys of `loads`."""
        for name, gate in self.gates.items():
            move_bias(gate.bias, global_loads[name], gamma)

    def experts_of(self, tensor: Tensor) -> Tensor:
        """This rank's slice of a tensor stacked over all routed experts."""
        return tensor.narrow(0, self.spec.first_expert, self.spec.local_experts)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Set parameters and biases from full tensors by global name (experts stacked over all of them). Raises
        ValueError if a shape differs, which a copy could broadcast silently."""
        for name, own in (*self.named_parameters(), *self.buffers.items()):
            split = isinstance(own, Weight) and own.expert
            whole = (self.spec.shape.routed, *own.shape[1:]) if split else tuple(own.shape)
            if tuple(state[name].shape) != whole:
                raise ValueError(f"{name}: has shape {list(state[name].shape)}, and this model {list(whole)}")
            own.copy_(self.experts_of(state[name]) if split else state[name])

    def initialise(self, seed: int) -> None:
        """Initialise the weights, to the same values in every layout; biases and loads are zeroed."""
        for name, weight in self.named_parameters():
            initialise(name, weight, seed, self.spec.shape.init_std, self.spec.first_expert)
        for buffer in self.root.buffers():
            buffer.zero_()

    def to_empty(self, device: torch.device | str) -> None:
        """Allocate the memory of a model that was built on the meta device. Replaces the Weights, so call it first."""
        for module in self.root.modules():
            for name, old in module.named_parameters(recurse=False):
                module.register_parameter(name, cast(Weight, old).empty_on(device))
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, torch.empty_like(buffer, device=device))
