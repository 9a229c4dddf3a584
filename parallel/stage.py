"""A stage is a list of phases; a flight is one microbatch in one stage.

A transformer layer is attention / routing / dispatch / experts / combine. Each has detached boundaries and a backward
of its own, and dW apart from dX (`StepResult.closures`), so that a pair of microbatches can be interleaved phase by
phase (DeepSeek-V3, arXiv 2412.19437, section 3.2.1) and a schedule can put W anywhere. Hooks or threads inside one big
autograd graph could do the same, but neither composes with recompute nor can be proven to run in a drawn order.

Between phases travels a tuple of tensors, the state:

    embed      ()                                    -> (x,)                  x [N, H]: N tokens of a microbatch
    attention  (x,)                                  -> (x, rows, weights, experts)   or -> (x,) in a dense layer
    routing    (x, rows [N,H], weights [N,K], experts [N,K]) -> the same, once every rank knows what it will receive
    dispatch   (x, rows [N,H], weights [N,K], experts [N,K]) -> (x, *sent rows [R,..], weights [R])
    experts    (x, *sent rows [R,..], weights [R])   -> (x, rows [R,H])
    combine    (x, rows [R,H])                       -> (x + sum of each token's rows,)
    head       (x,)                                  -> () or (x,), and a loss

A backward takes the gradients of a phase's outputs, in the same places (None for integers), and returns those of its
inputs. N tokens of a microbatch, H hidden size, K experts per token, R rows that this rank's experts receive.

Sent rows are what a `Codec` makes of rows for a dispatch: the rows themselves, or FP8 values and scales. The backward
of combine is a dispatch too and returns (dx, *sent drows [R,..]). Combine sums rows on their way, so it always carries
rows [R,H] in the run's dtype; the gradients that experts return are (dx, drows [R,H], dweights [R]).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Literal, NamedTuple, Protocol, Self, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dryvine.comm.dispatch.api import AnyDispatcher, Handle
from dryvine.comm.pending import Pending
from dryvine.parallel.wgrad import Closure, WGrad

StreamName = Literal["compute", "comm"]
State = tuple[Tensor, ...]
# Of a state's tensors, in their places; None for integers. A State is one, too, as far as types go.
Grads = tuple[Tensor | None, ...]


class Carried(Protocol):
    """What a flight carries beside its tokens for its phases, such as where documents lie. Its tensors are of other
    lengths in each microbatch, and graphs know addresses and lengths only: they have memory for the longest, and what
    is shorter is filled up."""

    @property
    def kind(self) -> Hashable:
        """All of it but its tensors and their lengths. Graphs of one kind replay no other."""
        ...

    def sizes(self) -> tuple[int, ...]:
        """The lengths that differ between microbatches, rounded up so that they seldom grow."""
        ...

    def filled(self, sizes: tuple[int, ...]) -> Self:
        """The same, filled up to these lengths with what changes no result."""
        ...

    def copied(self) -> Self:
        """With tensors of its own."""
        ...

    def tensors(self) -> list[Tensor]: ...


@dataclass
class Flight:
    """One microbatch in one stage, from the start of its F to the end of its W.

    `loss_scale` is the gradient of every loss, so that gradients are those of the mean over the global batch; a scalar
    tensor where it is not yet known (`graphs.py`). With `training=False` nothing is saved for a backward.
    """

    tokens: Tensor  # int64 [sequences, T + 1 + mtp_depth]: inputs, and what they are to predict
    loss_scale: float | Tensor
    training: bool = True
    microbatch: int = 0  # its number in the step
    documents: Carried | None = None  # where documents lie in the tokens, if phases are to know
    recorded: bool = False  # its ops become CUDA graphs, so a backward leaves what it reads for the next replay
    losses: dict[str, Tensor] = field(default_factory=dict)  # name -> detached, already weighted scalar
    saved: dict[Phase, object] = field(default_factory=dict)  # what the backward of a phase needs of its forward
    handles: dict[str, Handle] = field(default_factory=dict)  # layer -> routing, shared by its phases
    wgrads: deque[list[Closure]] = field(default_factory=deque)  # left by I for W, per phase, in the order they ran


class Outcome(NamedTuple):
    """What a compute function returns: the next state, and losses, whose gradients start here."""

    state: State
    losses: dict[str, Tensor]


class StepResult(NamedTuple):
    """What a phase's backward returns; a forward step has a value alone.

    `value` may still be under way; the rest is known at once. The caller owns `closures` and `spent`: their memory is
    freed when it drops them.
    """

    value: Pending[Grads]  # gradients of the phase's inputs; of a forward, the next state
    closures: list[Closure]  # weight gradients, to be run later, in this order
    spent: Sequence[object] = ()  # what the step has read and no later step reads: it may be another stream's memory


class Phase(Protocol):
    """A step of a stage; `Flight.saved` knows it by its identity. `stream` says which resource it uses; a comm phase
    returns before its result has arrived."""

    name: str  # attention | routing | dispatch | experts | combine | embed | dense | head | ...
    layer: str  # the block it belongs to, e.g. layers.3

    @property
    def stream(self) -> StreamName: ...

    def forward(self, state: State, flight: Flight) -> Pending[State]: ...

    def backward(self, grads: Grads, flight: Flight) -> StepResult: ...


Function = Callable[[State, Flight], Outcome]


class _Graph(NamedTuple):
    """What `Compute` saves: where autograd's graph of the phase begins and ends."""

    leaves: State
    edges: tuple[GradientEdge | None, ...]  # of the outputs
    losses: tuple[Tensor, ...]


class Compute:
    """Arithmetic under autograd between detached boundaries. The state's first `through` tensors pass untouched.

    `again`: a flight keeps the inputs alone, and the backward begins by computing the phase again, to the same bits.
    """

    stream: StreamName = "compute"

    def __init__(
        self, name: str, layer: str, function: Function, wgrad: WGrad, through: int = 0, again: bool = False
    ) -> None:
        self.name, self.layer, self.function, self.wgrad, self.through = name, layer, function, wgrad, through
        self.again = again

    def forward(self, state: State, flight: Flight) -> Pending[State]:
        leaves = tuple(
            t.detach().requires_grad_(flight.training and t.is_floating_point()) for t in state[self.through :]
        )
        with torch.set_grad_enabled(flight.training and not self.again):
            out, losses = self.function(leaves, flight)
        flight.losses.update({name: loss.detach() for name, loss in losses.items()})
        if flight.training:
            flight.saved[self] = leaves if self.again else _graph(leaves, out, losses)
        return Pending.done(state[: self.through] + tuple(t.detach() for t in out))

    def backward(self, grads: Grads, flight: Flight) -> StepResult:
        leaves, edges, losses = self._graph_of(flight)
        roots = [(edge, g) for edge, g in zip(edges, grads[self.through :], strict=True) if edge is not None]
        seeds = [(loss, _seed(loss, flight.loss_scale)) for loss in losses if loss.requires_grad]
        roots += [(get_gradient_edge(loss), seed) for loss, seed in seeds]
        with self.wgrad.collect() as closures:
            torch.autograd.backward(
                [edge for edge, _ in roots], [g for _, g in roots], retain_graph=flight.recorded or None
            )
        dx = grads[: self.through] + tuple(leaf.grad for leaf in leaves)
        for leaf in leaves:
            # Weight gradients may keep the leaf until W, and the next backward of a recorded graph would add to this.
            leaf.grad = None
        return StepResult(Pending.done(dx), closures, [leaf.detach() for leaf in leaves])

    def _graph_of(self, flight: Flight) -> _Graph:
        saved = flight.saved.pop(self)
        if not self.again:
            return cast(_Graph, saved)
        leaves = cast(State, saved)
        with torch.enable_grad():
            # As of a flight that does not train: what a function counts, it has counted.
            return _graph(leaves, *self.function(leaves, replace(flight, training=False)))


def _graph(leaves: State, out: State, losses: dict[str, Tensor]) -> _Graph:
    # Edges, not tensors: they lead to the graph, and leave the outputs' memory to the next phase to free.
    edges = tuple(get_gradient_edge(t) if t.requires_grad else None for t in out)
    return _Graph(leaves, edges, tuple(losses.values()))


def _seed(loss: Tensor, scale: float | Tensor) -> Tensor:
    return scale.to(loss.dtype) if isinstance(scale, Tensor) else torch.full_like(loss, scale)


S = TypeVar("S")


class Explicit(Generic[S]):
    """Arithmetic with a backward of its own, for inputs whose gradients autograd cannot represent: rows that arrived as
    FP8 values and scales have a gradient of one tensor, in another dtype. `forward` returns the next state and what
    `backward` needs; `backward` takes that and the outputs' gradients and returns the inputs' gradients. The state's
    first `through` tensors pass untouched."""

    stream: StreamName = "compute"

    def __init__(
        self,
        name: str,
        layer: str,
        forward: Callable[[State, Flight], tuple[State, S]],
        backward: Callable[[S, Grads], Grads],
        wgrad: WGrad,
        through: int = 0,
    ) -> None:
        self.name, self.layer, self.wgrad, self.through = name, layer, wgrad, through
        self._forward, self._backward = forward, backward

    @torch.no_grad()
    def forward(self, state: State, flight: Flight) -> Pending[State]:
        out, saved = self._forward(state[self.through :], flight)
        if flight.training:
            flight.saved[self] = saved
        return Pending.done(state[: self.through] + out)

    @torch.no_grad()
    def backward(self, grads: Grads, flight: Flight) -> StepResult:
        saved = cast(S, flight.saved.pop(self))
        with self.wgrad.collect() as closures:
            dx = self._backward(saved, grads[self.through :])
        return StepResult(Pending.done(grads[: self.through] + dx), closures, [saved])


class Codec(Protocol):
    """The form of rows in a dispatch. One object serves all layers; both methods run in the comm stream."""

    def encode(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows [N, H] to tensors [N, ..] of any dtype, row by row: once per token, before it is copied per expert."""
        ...

    def decode(self, sent: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The tensors [R, ..] that arrived, to those that experts take."""
        ...


class AsIs:
    """Rows travel in their own dtype."""

    def encode(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (rows,)

    def decode(self, sent: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return sent


AS_IS = AsIs()


class Routing:
    """Tells every rank how many rows it will receive. Apart from dispatch, so that other work can run until the counts
    are here: they take the link's latency and the slowest rank's lag, whatever their size. Nothing to do backward."""

    name = "routing"
    stream: StreamName = "comm"

    def __init__(self, layer: str, dispatcher: AnyDispatcher) -> None:
        self.layer, self.dispatcher = layer, dispatcher

    def forward(self, state: State, flight: Flight) -> Pending[State]:
        *_, experts = state

        def keep(handle: Handle) -> State:
            flight.handles[self.layer] = handle
            return state

        # A recording is of many microbatches: which one it is says whoever replays it.
        label = self.layer if flight.recorded else f"{self.layer}, microbatch {flight.microbatch}"
        return self.dispatcher.plan_routing(experts, label).then(keep)

    def backward(self, grads: Grads, flight: Flight) -> StepResult:
        return StepResult(Pending.done(grads), [])


class Dispatch:
    """Tokens to the experts they chose, by the handle of `Routing`. Its backward is `combine` with the same handle.

    Rows are encoded in the comm stream: compute does not read the encoded rows, and is the busier stream of a pair."""

    name = "dispatch"
    stream: StreamName = "comm"

    def __init__(self, layer: str, dispatcher: AnyDispatcher, codec: Codec = AS_IS) -> None:
        self.layer, self.dispatcher, self.codec = layer, dispatcher, codec

    def forward(self, state: State, flight: Flight) -> Pending[State]:
        x, rows, weights, _ = state
        sent = self.dispatcher.dispatch(self.codec.encode(rows), weights, flight.handles[self.layer])
        return sent.then(lambda arrived: (x, *self.codec.decode(arrived[:-1]), arrived[-1]))

    def backward(self, grads: Grads, flight: Flight) -> StepResult:
        dx, drows, dweights = grads
        assert drows is not None
        sent = self.dispatcher.combine(drows, dweights, flight.handles[self.layer])
        return StepResult(sent.then(lambda arrived: (dx, *arrived, None)), [])


class Combine:
    """Expert outputs back to their tokens, summed, and added to the residual. Its backward is `dispatch`."""

    name = "combine"
    stream: StreamName = "comm"

    def __init__(self, layer: str, dispatcher: AnyDispatcher, codec: Codec = AS_IS) -> None:
        self.layer, self.dispatcher, self.codec = layer, dispatcher, codec

    def forward(self, state: State, flight: Flight) -> Pending[State]:
        x, rows = state
        sent = self.dispatcher.combine(rows, None, flight.handles[self.layer])
        return sent.then(lambda arrived: (x + arrived[0],))

    def backward(self, grads: Grads, flight: Flight) -> StepResult:
        (dx,) = grads
        assert dx is not None
        sent = self.dispatcher.dispatch(self.codec.encode(dx), None, flight.handles[self.layer])
        return StepResult(sent.then(lambda arrived: (dx, *self.codec.decode(arrived))), [])


@dataclass(frozen=True)
class Stage:
    """The phases of one pipeline stage, in forward order."""

    number: int
    phases: Sequence[Phase]
