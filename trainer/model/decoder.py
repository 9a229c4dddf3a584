"""The model of one rank: the blocks it holds, each built once, and the pipeline stages made of their phases.

Parallelism stays out of the arithmetic: a layer sees N tokens and a handle's counts, and what a layout changes is
which blocks a rank builds, which slice of the experts, and which Dispatcher the phases call. A module that two stages
of a rank use (the embedding and MTP on one rank, say) is built once, so that a name is one Parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from dryvine.comm.dispatch.api import Dispatcher
from dryvine.parallel.stage import (
    AS_IS,
    Combine,
    Compute,
    Dispatch,
    Explicit,
    Flight,
    Outcome,
    Phase,
    Routing,
    Stage,
    State,
)
from dryvine.parallel.wgrad import WGrad
from dryvine.trainer.fp8.dispatch import Tiles, codec
from dryvine.trainer.fp8.linear import FP8
from dryvine.trainer.model.initialise import initialise
from dryvine.trainer.model.layer import Layer
from dryvine.trainer.model.layers import Embedding, Linear, RMSNorm
from dryvine.trainer.model.moe import Gate, move_bias
from dryvine.trainer.model.mtp import MTP, Head, tokens_at
from dryvine.trainer.model.rope import Rope
from dryvine.trainer.model.shape import BlockKind, Shape, blocks
from dryvine.trainer.model.spec import Spec
from dryvine.trainer.tensors.weight import Weight

M = TypeVar("M", bound=nn.Module)


class Model:
    """Made by `build_model`. Names of parameters, buffers and loads are global: the same on every layout."""

    def __init__(self, spec: Spec, names: Mapping[int, tuple[str, ...]], dispatcher: Dispatcher, wgrad: WGrad) -> None:
        self.spec, self.dispatcher, self.wgrad = spec, dispatcher, wgrad
        self.codec = AS_IS if spec.fp8 is None else codec(spec.fp8.recipe)
        self.root = nn.ModuleDict()
        kinds = {block.name: block.kind for block in blocks(spec.shape)}
        self.stages = {
            number: Stage(number, [phase for name in held for phase in self._phases(name, kinds[name])])
            for number, held in names.items()
        }
        for _, weight in self.named_parameters():
            weight.queue = wgrad.put

    # -- parameters and state

    def named_parameters(self) -> Iterator[tuple[str, Weight]]:
        return cast(Iterator[tuple[str, Weight]], self.root.named_parameters())

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The gates' biases, FP32 [E], by name ("layers.3.gate.bias"): saved, but trained by `update_biases` alone."""
        return {name: buffer for name, buffer in self.root.named_buffers() if name.endswith(".bias")}

    @property
    def loads(self) -> dict[str, Tensor]:
        """How often this rank's tokens chose each routed expert in training forwards since `reset_loads`: int64 [E],
        keyed by MoE block ("layers.3", "mtp.0")."""
        return {name: gate.load for name, gate in self._gates()}

    def reset_loads(self) -> None:
        for _, gate in self._gates():
            gate.load.zero_()

    def update_biases(self, global_loads: Mapping[str, Tensor], gamma: float) -> None:
        """Move the bias of every gate by its load over the global batch; `global_loads` has the keys of `loads`."""
        for name, gate in self._gates():
            move_bias(gate.bias, global_loads[name], gamma)

    def _gates(self) -> Iterator[tuple[str, Gate]]:
        for module in self.root.modules():
            if isinstance(module, Layer) and hasattr(module, "gate"):
                yield module.name, module.gate

    def experts_of(self, tensor: Tensor) -> Tensor:
        """This rank's slice of a tensor stacked over all routed experts."""
        return tensor.narrow(0, self.spec.ep_rank * self.spec.local_experts, self.spec.local_experts)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Fill parameters and biases from whole tensors by global name (experts stacked over all of them)."""
        for name, weight in self.named_parameters():
            weight.copy_(self.experts_of(state[name]) if weight.expert else state[name])
        for name, bias in self.buffers.items():
            bias.copy_(state[name])

    def initialise(self, seed: int) -> None:
        """The same model for every layout; biases and loads are zeroed."""
        first = self.spec.ep_rank * self.spec.local_experts
        for name, weight in self.named_parameters():
            initialise(name, weight, seed, self.spec.shape.init_std, first)
        for buffer in self.root.buffers():
            buffer.zero_()

    def to_empty(self, device: torch.device | str) -> None:
        """Give a model built on the meta device memory, not yet filled. Makes new Weights, so it comes first."""
        for module in self.root.modules():
            for name, old in module.named_parameters(recurse=False):
                new = Weight(torch.empty_like(old, device=device))
                new.expert, new.queue = cast(Weight, old).expert, cast(Weight, old).queue
                module.register_parameter(name, new)
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(name, torch.empty_like(buffer, device=device))

    # -- stages

    def _part(self, name: str, make: Callable[[], M]) -> M:
        """The module of that dotted name, made at first use."""
        holder = self.root
        *path, last = name.split(".")
        for key in path:
            if key not in holder:
                holder[key] = nn.ModuleDict()
            holder = cast(nn.ModuleDict, holder[key])
        if last not in holder:
            holder[last] = make()
        return cast(M, holder[last])

    def _phases(self, name: str, kind: BlockKind) -> list[Phase]:
        make = {"embed": self._embed, "dense": self._dense, "moe": self._moe, "head": self._head, "mtp": self._mtp}
        return make[kind](name)

    def _compute(self, phase: str, layer: str, function: Callable[[State, Flight], Outcome], through: int = 0) -> Phase:
        return Compute(phase, layer, function, self.wgrad, through)

    def _embedding(self) -> Embedding:
        return self._part("embed", lambda: self.spec.embedding(self.spec.shape.vocab, self.spec.shape.hidden))

    def _projection(self) -> Linear:
        return self._part("head", lambda: self.spec.plain_linear(self.spec.shape.hidden, self.spec.shape.vocab))

    def _embed(self, name: str) -> list[Phase]:
        embedding = self._embedding()

        def embed(state: State, flight: Flight) -> Outcome:
            return Outcome((embedding(tokens_at(flight, self.spec.shape, 0)),), {})

        return [self._compute("embed", name, embed)]

    def _dense(self, name: str) -> list[Phase]:
        layer = self._part(name, lambda: Layer(self.spec, name, is_moe=False))
        return [self._compute("dense", name, layer.dense)]

    def _moe(self, name: str) -> list[Phase]:
        layer = self._part(name, lambda: Layer(self.spec, name, is_moe=True))
        return self._routed(layer, layer.route)

    def _routed(self, layer: Layer, attention: Callable[[State, Flight], Outcome]) -> list[Phase]:
        return [
            self._compute("attention", layer.name, attention),
            Routing(layer.name, self.dispatcher),
            Dispatch(layer.name, self.dispatcher, self.codec),
            self._experts(layer),
            Combine(layer.name, self.dispatcher, self.codec),
        ]

    def _experts(self, layer: Layer) -> Phase:
        if not isinstance(self.codec, Tiles):
            return self._compute("experts", layer.name, layer.run_experts, through=1)
        back = layer.experts.arrived_backward
        return Explicit("experts", layer.name, layer.run_arrived, back, self.wgrad, through=1)

    def _head(self, name: str) -> list[Phase]:
        norm: RMSNorm = self._part("norm", lambda: self.spec.norm(self.spec.shape.hidden))
        return [self._compute("head", name, Head(norm, self._projection(), self.spec.shape, depth=0))]

    def _mtp(self, name: str) -> list[Phase]:
        depth = int(name.removeprefix("mtp.")) + 1
        module = self._part(name, lambda: MTP(self.spec, Layer(self.spec, name, is_moe=True)))
        layer, embedding = cast(Layer, module.layer), self._embedding()

        def attention(state: State, flight: Flight) -> Outcome:
            joined = module.join(state[0], tokens_at(flight, self.spec.shape, depth), embedding)
            return layer.route((joined,), flight)

        head = Head(module.norm, self._projection(), self.spec.shape, depth)
        return [*self._routed(layer, attention), self._compute("head", name, head)]


def build_model(
    shape: Shape,
    stages: Mapping[int, tuple[str, ...]],
    *,
    ep_rank: int,
    ep_size: int,
    dispatcher: Dispatcher,
    wgrad: WGrad,
    dtype: torch.dtype,
    device: torch.device | str,
    fp8: FP8 | None = None,
) -> Model:
    """The model of one rank: `stages` gives the block names (see `shape.blocks`) of each stage number it holds.

    Weights are not filled: call `initialise`, or `load`; on the meta device, `to_empty` first. `shape.routed` must be a
    multiple of `ep_size`.
    """
    spec = Spec(shape, Rope(shape), ep_rank, ep_size, dtype, torch.device(device), fp8)
    return Model(spec, stages, dispatcher, wgrad)
