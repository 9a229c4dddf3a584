"""A stage is a list of phases; a flight is one microbatch in one stage.

A transformer layer is attention / routing / dispatch / experts / combine. Each has detached boundaries and a backward
of its own, and dW apart from dX (`flight.wgrads`), so that a pair of microbatches can be interleaved phase by phase
(DeepSeek-V3, arXiv 2412.19437, section 3.2.1) and a schedule can put W anywhere. Hooks or threads inside one big
autograd graph could do the same, but neither composes with recompute nor can be proven to run in a drawn order.

Between phases travels a tuple of tensors, the state. What it holds is agreed between neighbours:

    embed      ()                                    -> (x,)                  x [N, H]: N tokens of a microbatch
    attention  (x,)                                  -> (x, rows, weights, experts)   or -> (x,) in a dense layer
    routing    (x, rows [N,H], weights [N,K], experts [N,K]) -> the same, once it is known which rank gets what
    dispatch   (x, rows [N,H], weights [N,K], experts [N,K]) -> (x, *sent rows [R,..], weights [R])
    experts    (x, *sent rows [R,..], weights [R])   -> (x, rows [R,H])
    combine    (x, rows [R,H])                       -> (x + sum of each token's rows,)
    head       (x,)                                  -> () or (x,), and a loss

A backward gets the gradients of a phase's outputs in the same places (None for integers) and gives those of its inputs.

Sent rows are what a `Codec` makes of rows for a dispatch: they themselves, or FP8 values and scales. The backward of
combine is a dispatch and sends so too: it gives (dx, *sent drows [R,..]). What combine carries is added up on its way,
and so is rows [R,H] in the run's dtype whatever was sent; experts' gradients are (dx, drows [R,H], dweights [R]).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from dryvine.comm.dispatch.api import Dispatcher, Handle
from dryvine.comm.pending import Pending
from dryvine.parallel.wgrad import Closure, WGrad

State = tuple[Tensor, ...]
Grads = tuple[Tensor | None, ...]


@dataclass
class Flight:
    """One microbatch in one stage, from the start of its F to the end of its W.

    `loss_scale` seeds the backward of every loss, so that gradients are those of the mean over the global batch.
    `training=False` saves nothing.
    """

    tokens: Tensor  # int64 [sequences, T + 1 + mtp_depth]: inputs, and what they are to predict
    loss_scale: float
    training: bool = True
    microbatch: int = 0  # its number in the step
    losses: dict[str, Tensor] = field(default_factory=dict)  # name -> detached, already weighted scalar
    saved: dict[int, Any] = field(default_factory=dict)  # phase number -> what its backward needs
    handles: dict[str, Handle] = field(default_factory=dict)  # layer -> routing, shared by its phases
    wgrads: list[list[Closure]] = field(default_factory=list)  # left by I, per phase, in the order in which they ran
    spent: list[Any] = field(
        default_factory=list
    )  # inputs of phases whose backward is done, until streams let go of them


class Outcome(NamedTuple):
    """What a compute function gives: the next state, and losses that start their own gradient here."""

    state: State
    losses: dict[str, Tensor]


class Phase(Protocol):
    """A step of a stage. `stream` says which resource it uses; a comm phase returns before its result has
    arrived."""

    name: str  # attention | routing | dispatch | experts | combine | embed | dense | head | ...
    layer: str  # the block it belongs to, e.g. layers.3

    @property
    def stream(self) -> Literal["compute", "comm"]: ...

    def forward(self, index: int, state: State, flight: Flight) -> Pending[State]: ...

    def backward(self, index: int, grads: Grads, flight: Flight, wgrads: list[Closure]) -> Pending[Grads]: ...


Function = Callable[[State, Flight], Outcome]


class Compute:
    """Arithmetic under autograd between detached boundaries. The state's first `through` tensors pass untouched."""

    stream: Literal["compute"] = "compute"

    def __init__(self, name: str, layer: str, function: Function, wgrad: WGrad, through: int = 0) -> None:
        self.name, self.layer, self.function, self.wgrad, self.through = name, layer, function, wgrad, through

    def forward(self, index: int, state: State, flight: Flight) -> Pending[State]:
        leaves = tuple(
            t.detach().requires_grad_(flight.training and t.is_floating_point()) for t in state[self.through :]
        )
        with torch.set_grad_enabled(flight.training):
            out, losses = self.function(leaves, flight)
        flight.losses.update({name: loss.detach() for name, loss in losses.items()})
        if flight.training:
            # Edges, not tensors: what the next phase has consumed is free, and the graph is still to be found.
            edges = tuple(get_gradient_edge(t) if t.requires_grad else None for t in out)
            flight.saved[index] = (leaves, edges, tuple(losses.values()))
        return Pending.done(state[: self.through] + tuple(t.detach() for t in out))

    def backward(self, index: int, grads: Grads, flight: Flight, wgrads: list[Closure]) -> Pending[Grads]:
        leaves, edges, losses = flight.saved.pop(index)
        roots = [(edge, g) for edge, g in zip(edges, grads[self.through :], strict=True) if edge is not None]
        roots += [(loss, torch.full_like(loss, flight.loss_scale)) for loss in losses if loss.requires_grad]
        with self.wgrad.collect(wgrads):
            torch.autograd.backward([t for t, _ in roots], [g for _, g in roots])
        flight.spent += [leaf.detach() for leaf in leaves]
        return Pending.done(grads[: self.through] + tuple(leaf.grad for leaf in leaves))


class Explicit:
    """Arithmetic whose backward is a function too, for inputs that autograd cannot serve: the gradient of rows that
    came as FP8 values and scales is one tensor of another dtype. `forward` gives the next state and what `backward`
    needs; `backward` makes of that and the outputs' gradients the inputs'. The first `through` pass untouched."""

    stream: Literal["compute"] = "compute"

    def __init__(
        self,
        name: str,
        layer: str,
        forward: Callable[[State, Flight], tuple[State, Any]],
        backward: Callable[[Any, Grads], Grads],
        wgrad: WGrad,
        through: int = 0,
    ) -> None:
        self.name, self.layer, self.wgrad, self.through = name, layer, wgrad, through
        self._forward, self._backward = forward, backward

    @torch.no_grad()
    def forward(self, index: int, state: State, flight: Flight) -> Pending[State]:
        out, kept = self._forward(state[self.through :], flight)
        if flight.training:
            flight.saved[index] = kept
        return Pending.done(state[: self.through] + out)

    @torch.no_grad()
    def backward(self, index: int, grads: Grads, flight: Flight, wgrads: list[Closure]) -> Pending[Grads]:
        kept = flight.saved.pop(index)
        with self.wgrad.collect(wgrads):
            given = self._backward(kept, grads[self.through :])
        flight.spent.append(kept)
        return Pending.done(grads[: self.through] + given)


class Codec(Protocol):
    """What rows are while a dispatch carries them. One object for all layers; both calls run in the comm stream."""

    def encode(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows [N, H] to tensors [N, ..] of any dtype, row by row: done once a token, before copies are made."""
        ...

    def decode(self, sent: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What arrived, to what experts take."""
        ...


class AsIs:
    """Rows travel in their own dtype."""

    def encode(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (rows,)

    def decode(self, sent: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return sent


AS_IS = AsIs()


class Routing:
    """Tells every rank how many rows will come. Apart from dispatch, so that somebody may compute until counts are
    here: they take the link's latency and the slowest rank's lag, whatever their size. Nothing to do backward."""

    name = "routing"
    stream: Literal["comm"] = "comm"

    def __init__(self, layer: str, dispatcher: Dispatcher) -> None:
        self.layer, self.dispatcher = layer, dispatcher

    def forward(self, index: int, state: State, flight: Flight) -> Pending[State]:
        *_, experts = state

        def keep(handle: Handle) -> State:
            flight.handles[self.layer] = handle
            return state

        return self.dispatcher.plan_routing(experts, f"{self.layer}, microbatch {flight.microbatch}").then(keep)

    def backward(self, index: int, grads: Grads, flight: Flight, wgrads: list[Closure]) -> Pending[Grads]:
        return Pending.done(grads)


class Dispatch:
    """Tokens to the experts they chose, by the handle of `Routing`. Its backward is `combine` with the same handle.

    Encoding is its first step, on the stream that sends: compute has no reader for the encoded rows, and is what a pair
    waits for."""

    name = "dispatch"
    stream: Literal["comm"] = "comm"

    def __init__(self, layer: str, dispatcher: Dispatcher, codec: Codec = AS_IS) -> None:
        self.layer, self.dispatcher, self.codec = layer, dispatcher, codec

    def forward(self, index: int, state: State, flight: Flight) -> Pending[State]:
        x, rows, weights, _ = state
        sent = self.dispatcher.dispatch(self.codec.encode(rows), weights, flight.handles[self.layer])
        return sent.then(lambda arrived: (x, *self.codec.decode(arrived[:-1]), arrived[-1]))

    def backward(self, index: int, grads: Grads, flight: Flight, wgrads: list[Closure]) -> Pending[Grads]:
        dx, drows, dweights = grads
        assert drows is not None
        sent = self.dispatcher.combine(drows, dweights, flight.handles[self.layer])
        return sent.then(lambda arrived: (dx, *arrived, None))


class Combine:
    """Expert outputs back to their tokens, summed, and added to the residual. Its backward is `dispatch`."""

    name = "combine"
    stream: Literal["comm"] = "comm"

    def __init__(self, layer: str, dispatcher: Dispatcher, codec: Codec = AS_IS) -> None:
        self.layer, self.dispatcher, self.codec = layer, dispatcher, codec

    def forward(self, index: int, state: State, flight: Flight) -> Pending[State]:
        x, rows = state
        sent = self.dispatcher.combine(rows, None, flight.handles[self.layer])
        return sent.then(lambda arrived: (x + arrived[0],))

    def backward(self, index: int, grads: Grads, flight: Flight, wgrads: list[Closure]) -> Pending[Grads]:
        (dx,) = grads
        assert dx is not None
        sent = self.dispatcher.dispatch(self.codec.encode(dx), None, flight.handles[self.layer])
        return sent.then(lambda arrived: (dx, *self.codec.decode(arrived)))


@dataclass(frozen=True)
class Stage:
    """The phases of one pipeline stage, in forward order."""

    number: int
    phases: Sequence[Phase]
