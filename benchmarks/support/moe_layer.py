"""One MoE layer of DeepSeek-V3 on one device, and a microbatch through its phases, one after the other.

The rank is number 0 of a group of 64 that holds V3's 256 experts, and all others are taken to route as it does. The
dispatcher is `flat`; only the transfer is replaced, by one copy on this device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch.profiler import record_function

from benchmarks.support.census import Census
from benchmarks.support.repeated import repeated
from dryvine.comm.dispatch.flat import Flat, FlatHandle
from dryvine.comm.dispatch.meter import Meter
from dryvine.comm.mesh import Layout, make_mesh
from dryvine.comm.pending import Pending
from dryvine.parallel.stage import Flight, Stage, State
from dryvine.parallel.wgrad import Closure
from dryvine.trainer.config import load
from dryvine.trainer.fp8.choose import choose_engines
from dryvine.trainer.fp8.fp8 import FP8
from dryvine.trainer.fp8.recipe import preset
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.grouped import reads_counts
from dryvine.trainer.model.shape import Shape
from dryvine.trainer.model.spec import Spec
from dryvine.trainer.tensors.weight import Weight

Recipe = Literal["bf16", "deepseek_v3"]
RECIPES: tuple[Recipe, ...] = get_args(Recipe)
EP = 64
CONFIG = Path(__file__).parents[2] / "configs" / "deepseek_v3_671b.toml"
TOY = {"hidden": 128, "expert_ffn": 128, "heads": 2, "q_lora": 64, "kv_lora": 64, "nope_dim": 32, "rope_dim": 16,
       "v_dim": 32}  # fmt: skip


def v3(device: torch.device, recompute: bool) -> Shape:
    """V3's own MoE layer; on a CPU a narrow one, with as many experts."""
    shape = load(CONFIG).model
    changes = {"layers": 1, "first_dense": 0, "mtp_depth": 0} | (TOY if device.type == "cpu" else {})
    return Shape(**(shape.model_dump() | changes | ({} if recompute else {"recompute": ()})))


class Mirror:
    """The `Exchange` of a group whose ranks all route as this one does: it receives what it sends."""

    def __init__(self, size: int) -> None:
        self.size, self.rank, self.meter = size, 0, Meter()

    def start(
        self,
        rows: torch.Tensor,
        sends: Sequence[int],
        receives: Sequence[int],
        into: torch.Tensor | None = None,
        what: str = "",
    ) -> Pending[torch.Tensor]:
        return Pending.done(rows.clone() if into is None else into.copy_(rows))


class Clock:
    """Marks on the device's own time: events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, before: Any, after: Any) -> float:
        """Milliseconds. On a GPU it waits for `after`."""
        if not self.cuda:
            return 1e3 * (after - before)
        after.synchronize()
        return before.elapsed_time(after)


@dataclass
class Spans:
    """Named stretches of one microbatch: "F attention", "B combine", "W experts", ..."""

    clock: Clock
    marks: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before = self.clock.mark()
        with record_function(name):
            yield
        self.marks[name] = before, self.clock.mark()

    def milliseconds(self) -> dict[str, float]:
        return {name: self.clock.between(*pair) for name, pair in self.marks.items()}

    def total(self) -> float:
        each = list(self.marks.values())
        return self.clock.between(each[0][0], each[-1][1])


def untimed() -> Spans:
    """Names alone: no events, which a graph would contain."""
    return Spans(Clock(torch.device("cpu")))


@dataclass
class Bench:
    shape: Shape
    stage: Stage
    tokens: torch.Tensor  # [1, T + 1]: only their number counts, there is no embedding
    x: torch.Tensor
    dy: torch.Tensor
    engine: str
    reads_counts: bool  # whether products of experts make the host read their rows' counts
    dispatcher: Flat
    weights: list[Weight]

    def forward(self, spans: Spans) -> Flight:
        flight = Flight(self.tokens, 1.0)
        state: State = (self.x,)
        for phase in self.stage.phases:
            with spans(f"F {phase.name}"):
                state = phase.forward(state, flight).wait()
        return flight

    def again(self) -> Bench:
        """The same, routed as now without a read by the host."""
        handles = cast(dict[str, FlatHandle], self.forward(untimed()).handles)
        return replace(self, stage=repeated(self.stage, self.dispatcher, handles))

    def difference(self, run: Callable[[], None]) -> float:
        """Norm of the difference between the gradients of weights by `run` and by `microbatch`, over the latter's."""
        ours, theirs = self._gradients(run), self._gradients(lambda: self.microbatch(untimed()))
        apart = [one - other for one, other in zip(ours, theirs, strict=True)]
        return float(_norm(apart) / _norm(theirs))

    def _gradients(self, run: Callable[[], None]) -> list[torch.Tensor]:
        for weight in self.weights:
            weight.gradient().zero_()
        run()
        return [weight.gradient().clone() for weight in self.weights]

    def saved_bytes(self) -> int:
        """Bytes that F leaves behind for B and W: the layer's input, and what its phases save."""
        with Census() as census:
            flight = self.forward(untimed())
        held = census.bytes + self.x.nbytes
        del flight
        return held

    def microbatch(self, spans: Spans) -> None:
        flight = self.forward(spans)
        grads: tuple[Any, ...] = (self.dy,)
        later: dict[str, list[Closure]] = {}
        for phase in reversed(self.stage.phases):
            with spans(f"B {phase.name}"):
                result = phase.backward(grads, flight)
                grads, later[phase.name] = result.value.wait(), result.closures
                del result  # and with it what the step spent: there is one stream here
        for name, closures in later.items():
            if closures:
                with spans(f"W {name}"):
                    for closure in closures:
                        closure()
                    closures.clear()


def _norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


@torch.no_grad()
def fill(model: Model, seed: int = 0) -> None:
    """`Model.initialise` on the device: drawing billions of numbers on a CPU takes half a minute."""
    torch.manual_seed(seed)
    for _, weight in model.named_parameters():
        weight.normal_(0, model.spec.shape.init_std) if weight.dim() > 1 else weight.fill_(1)
    for buffer in model.root.buffers():
        buffer.zero_()


def make_bench(recipe: Recipe, device: torch.device, tokens: int, recompute: bool, folder: Path) -> Bench:
    torch.manual_seed(0)
    shape = v3(device, recompute)
    fp8, engine, reads = None, "products in BF16", device.type == "cpu" or reads_counts(device, training=True)
    if recipe != "bf16":
        alone = make_mesh(Layout(), device, timedelta(seconds=60))
        products, engine = choose_engines(preset(recipe), alone, folder)
        fp8, reads = FP8(preset(recipe), products, engine), products.reads_counts
    dispatcher = Flat(Mirror(EP), shape.routed)
    model = Model(Spec(shape, torch.bfloat16, device, 0, EP, fp8), {0: ("layers.0",)}, dispatcher)
    fill(model)
    x, dy = (torch.randn(tokens, shape.hidden, device=device).bfloat16() for _ in range(2))
    weights = [weight for _, weight in model.named_parameters()]
    for weight in weights:
        weight.gradient()
    numbers = torch.zeros(1, tokens + 1, dtype=torch.int64, device=device)
    return Bench(shape, model.stages[0], numbers, x, dy, engine, reads, dispatcher, weights)
