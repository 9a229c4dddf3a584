"""Builds the phases of a pipeline stage from blocks: the only file that connects the model with `parallel.stage`.

Modules are independent of microbatches in flight; they take and return tensors. A builder makes a block's modules and
wraps their functions into phases. The alternative, modules that are phases, would couple every layer to the pipeline
and make each harder to test alone.

A new kind of block is a file with its module and a builder, and a line in decoder.BLOCKS. Legend: N tokens, H hidden.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from dryvine.comm.dispatch.api import AnyDispatcher
from dryvine.parallel.stage import (
    AS_IS,
    Codec,
    Combine,
    Compute,
    Dispatch,
    Explicit,
    Flight,
    Function,
    Grads,
    Outcome,
    Phase,
    Routing,
    State,
)
from dryvine.parallel.wgrad import WGrad
from dryvine.trainer.fp8.dispatch import Tiles
from dryvine.trainer.fp8.guard import Guard
from dryvine.trainer.fp8.recipe import Recipe
from dryvine.trainer.model.documents import Documents
from dryvine.trainer.model.embedding import Embedding
from dryvine.trainer.model.experts import Saved
from dryvine.trainer.model.gate import Gate
from dryvine.trainer.model.head import Head
from dryvine.trainer.model.layer import DenseLayer, MoELayer
from dryvine.trainer.model.linear import Linear
from dryvine.trainer.model.mtp import MTP
from dryvine.trainer.model.norm import RMSNorm
from dryvine.trainer.model.shape import LAYER_PHASES
from dryvine.trainer.model.spec import Spec
from dryvine.trainer.tensors.quantized import Quantized

M = TypeVar("M", bound=nn.Module)


@dataclass
class LossWeights:
    """Weights of the losses, which the training step sets by its schedule."""

    mtp: float  # shared evenly by the depths


@dataclass(frozen=True)
class Wiring:
    """The context of all builders on one rank. `root` holds the modules under their global names."""

    spec: Spec
    dispatcher: AnyDispatcher
    weights: LossWeights
    root: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    gates: dict[str, Gate] = field(default_factory=dict)  # by block
    wgrad: WGrad = field(default_factory=WGrad)
    block: str = ""  # the one that is being built
    used: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # by block, names of modules

    def module(self, name: str, make: Callable[[], M]) -> M:
        """The module with that dotted name, built at first use, so that blocks of a rank that share it share its
        Parameters."""
        self.used[self.block].append(name)
        holder = self.root
        *path, last = name.split(".")
        for key in path:
            if key not in holder:
                holder[key] = nn.ModuleDict()
            holder = cast(nn.ModuleDict, holder[key])
        if last not in holder:
            holder[last] = make()
        return cast(M, holder[last])

    def compute(self, phase: str, block: str, function: Callable[[State, Flight], Outcome], through: int = 0) -> Phase:
        """A phase under autograd; the first `through` tensors of the state are passed on unchanged."""
        again = phase in LAYER_PHASES and "layer" in self.spec.shape.recompute
        if again and self.spec.fp8:
            function = _counted_once(function, self.spec.fp8.guard)
        return Compute(phase, block, function, self.wgrad, through, again)

    def local(self, phase: str, block: str, function: Callable[[Tensor, int], Tensor]) -> Phase:
        """A phase without communication: from hidden states [N, H] of `sequences` sequences to hidden states."""
        return self.compute(phase, block, lambda state, flight: Outcome((function(state[0], len(flight.tokens)),), {}))

    def embedding(self) -> Embedding:
        return self.module("embed", lambda: self.spec.embedding(self.spec.shape.vocab, self.spec.shape.hidden))

    def projection(self) -> Linear:
        return self.module("head", lambda: self.spec.plain_linear(self.spec.shape.hidden, self.spec.shape.vocab))

    def tokens(self, flight: Flight, shift: int) -> Tensor:
        """The flight's tokens `shift` places ahead, T of each sequence, flat: int64 [N]."""
        length = flight.tokens.shape[1] - 1 - self.spec.shape.mtp_depth
        return flight.tokens[:, shift : shift + length].flatten()


BlockBuilder = Callable[[Wiring, str], list[Phase]]  # the block's name


def embed(rank: Wiring, name: str) -> list[Phase]:
    embedding = rank.embedding()
    return [rank.compute("embed", name, lambda _, flight: Outcome((embedding(rank.tokens(flight, 0)),), {}))]


def dense(rank: Wiring, name: str) -> list[Phase]:
    layer = rank.module(name, lambda: DenseLayer(rank.spec))

    def run(state: State, flight: Flight) -> Outcome:
        return Outcome((layer(state[0], len(flight.tokens), _documents(flight)),), {})

    return [rank.compute("dense", name, run)]


def moe(rank: Wiring, name: str) -> list[Phase]:
    return _routed(rank, name, rank.module(name, lambda: MoELayer(rank.spec)), lambda x_NH, flight: x_NH)


def head(rank: Wiring, name: str) -> list[Phase]:
    norm = rank.module("norm", lambda: rank.spec.norm(rank.spec.shape.hidden))
    return [_predict(rank, name, norm, depth=0)]


def mtp(rank: Wiring, name: str) -> list[Phase]:
    depth = int(name.removeprefix("mtp.")) + 1
    module, embedding = rank.module(name, lambda: MTP(rank.spec)), rank.embedding()

    def join(x_NH: Tensor, flight: Flight) -> Tensor:
        return module.join(x_NH, embedding(rank.tokens(flight, depth)))

    return [*_routed(rank, name, module.layer, join), _predict(rank, name, module.norm, depth)]


def _routed(rank: Wiring, name: str, layer: MoELayer, enter: Callable[[Tensor, Flight], Tensor]) -> list[Phase]:
    """The five phases of a MoE layer; `enter` computes its input from the state."""
    rank.gates[name] = layer.gate
    codec = codec_of(rank.spec.fp8.recipe) if rank.spec.fp8 else AS_IS

    def attention(state: State, flight: Flight) -> Outcome:
        documents = _documents(flight)
        lesson = documents.lesson if documents else None
        given = lesson.experts.get(name) if lesson else None
        routed = layer.route(enter(state[0], flight), len(flight.tokens), flight.training, documents, given)
        # A lesson is all that is learnt: a mean over all tokens of a microbatch would depend on how answers are packed.
        found = {} if routed.loss is None or lesson else {f"balance.{name}": routed.loss}
        if routed.other is not None:
            found[f"other.{name}"] = routed.other
        if lesson and lesson.record:
            found[f"routes.{name}"] = routed.experts.to(torch.int16)
        return Outcome(routed[:4], found)

    return [
        rank.compute("attention", name, attention),
        Routing(name, rank.dispatcher),
        Dispatch(name, rank.dispatcher, codec),
        _arrived(rank, name, layer) if isinstance(codec, Tiles) else _experts(rank, name, layer),
        Combine(name, rank.dispatcher, codec),
    ]


def _experts(rank: Wiring, name: str, layer: MoELayer) -> Phase:
    def experts(state: State, flight: Flight) -> Outcome:
        rows_RH, weights_R = state
        return Outcome((layer.experts(rows_RH, weights_R, flight.handles[name].counts),), {})

    return rank.compute("experts", name, experts, through=1)


def _arrived(rank: Wiring, name: str, layer: MoELayer) -> Phase:
    """Experts whose input rows and output gradients are dispatched in FP8: (values [R, H], scales [R, H / 128])."""

    def forward(state: State, flight: Flight) -> tuple[State, Saved]:
        values, scales, weights_R = state
        rows_RH, saved = layer.experts.arrived(Quantized(values, scales), weights_R, flight.handles[name].counts)
        return (rows_RH,), saved

    def backward(saved: Saved, grads: Grads) -> Grads:
        values, scales = cast(State, grads)
        return layer.experts.arrived_backward(saved, Quantized(values, scales))

    return Explicit("experts", name, forward, backward, rank.wgrad, through=1)


def _predict(rank: Wiring, name: str, norm: RMSNorm, depth: int) -> Phase:
    """The head that predicts the token `depth` + 1 places ahead, and passes its normed x to the next depth, if any."""
    shape = rank.spec.shape
    last = depth == shape.mtp_depth
    run = Head(norm, rank.projection(), again=last and "norm" in shape.recompute)
    loss_name = "loss" if depth == 0 else f"mtp.{depth - 1}"

    def predict(state: State, flight: Flight) -> Outcome:
        documents = _documents(flight)
        if depth == 0 and documents and documents.lesson:
            normed_NH, scored = run.score(state[0], rank.tokens(flight, 1), documents.lesson.temperature)
            found = documents.lesson.objective(scored, documents.lesson.columns)
            return Outcome(() if last else (normed_NH,), found)
        weights = None if documents is None else documents.weights[depth]
        normed_NH, loss = run(state[0], rank.tokens(flight, depth + 1), weights)
        weight = 1.0 if depth == 0 else rank.weights.mtp / shape.mtp_depth
        return Outcome(() if last else (normed_NH,), {loss_name: loss * weight})

    return rank.compute("head", name, predict)


def _counted_once(function: Function, guard: Guard) -> Function:
    """Recompute, which passes a flight that does not train, counts no tile a second time."""

    def run(state: State, flight: Flight) -> Outcome:
        with nullcontext() if flight.training else guard.paused():
            return function(state, flight)

    return run


def _documents(flight: Flight) -> Documents | None:
    """The flight's documents, of which `parallel` knows no more than how to copy them."""
    return cast(Documents | None, flight.documents)


def codec_of(recipe: Recipe) -> Codec:
    """The encoding in which this recipe sends rows between ranks."""
    return Tiles() if recipe.fp8_dispatch else AS_IS
