"""One rank of a pipeline whose stages sleep, as played by dryvine, by torch.distributed.pipelining and by DeepSpeed.

All of them get the same layer: it sleeps F, I and W for a given time, and does a tiny real Linear beside, so that the
gradients can be compared. A sleeping rank needs no core: two cores serve eight ranks, and what a step takes beyond its
simulation is the runtime's own doing.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dryvine.comm.lines import Channel
from dryvine.comm.mesh import Layout, make_mesh
from dryvine.comm.pending import Pending
from dryvine.comm.wire import P2PWire
from dryvine.parallel.executor import Batch, EdgeWire, Executor
from dryvine.parallel.flow_control import rank_program
from dryvine.parallel.overlap import ORDERS
from dryvine.parallel.schedule.ir import Op, Schedule
from dryvine.parallel.schedule.lower import lower
from dryvine.parallel.schedule.notation import from_csv
from dryvine.parallel.schedule.table import SCHEDULES, build
from dryvine.parallel.stage import Compute, Flight, Grads, Outcome, Stage, State, StepResult
from dryvine.parallel.streams import CpuStreams
from dryvine.parallel.wgrad import Closure, WGrad
from dryvine.trainer.tensors.weight import Weight

ROWS, WIDTH = 4, 16


@dataclass
class Pace:
    """Seconds that each part of an op sleeps; changed between steps."""

    seconds: float = 0.0

    @contextmanager
    def part(self) -> Iterator[None]:
        """What runs inside takes `seconds`: it sleeps for what its arithmetic leaves of them."""
        until = time.perf_counter() + self.seconds
        yield
        if self.seconds:
            time.sleep(max(0.0, until - time.perf_counter()))


def punctual() -> bool:
    """Wake this thread's sleeps on time, not up to Linux's 50 us later, and let all threads of this process, which
    hardly use a core, go before others' work on the machine. Returns whether the latter was allowed (root may)."""
    pr_set_timerslack = 29
    ctypes.CDLL(None).prctl(pr_set_timerslack, 1, 0, 0, 0)
    try:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setscheduler(int(thread), os.SCHED_FIFO, os.sched_param(1))
    except OSError:
        return False
    return True


class _Slow(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, wgrad: WGrad, pace: Pace) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.wgrad, ctx.pace = weight, wgrad, pace
        with pace.part():
            return x @ weight.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (x,), weight, pace = ctx.saved_tensors, ctx.weight, ctx.pace

        @torch.no_grad()
        def run() -> None:
            with pace.part():
                weight.gradient().addmm_(dy.t(), x)

        ctx.wgrad.put(run)
        with pace.part():
            return dy @ weight, None, None, None


class Slow(nn.Module):
    """Layer `number`, the same on every rank that has it."""

    def __init__(self, number: int, wgrad: WGrad, pace: Pace) -> None:
        super().__init__()
        self.number, self.wgrad, self.pace = number, wgrad, pace
        self.weight = Weight(initial(number))

    def forward(self, x: Tensor) -> Tensor:
        return _Slow.apply(x, self.weight, self.wgrad, self.pace)


def initial(number: int) -> Tensor:
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(number)) / WIDTH**0.5


def inputs(microbatches: int) -> Tensor:
    return torch.randn(microbatches * ROWS, WIDTH, generator=torch.Generator().manual_seed(10**6))


def loss_of(out: Tensor, target: Tensor | None = None) -> Tensor:
    return out.square().mean()


def reference(layers: int, microbatches: int) -> list[Tensor]:
    """The gradients of the mean loss, in one process."""
    weights = [initial(number).requires_grad_() for number in range(layers)]
    for x in inputs(microbatches).split(ROWS):
        for weight in weights:
            x = x @ weight.t()
        (loss_of(x) / microbatches).backward()
    return [weight.grad for weight in weights if weight.grad is not None]


def lengths(pace: Pace, times: int) -> Tensor:
    """Seconds that F, I and W take under plain autograd with no runtime round them, [times, 3]: the sleep, a late
    waking, and arithmetic and autograd on caches that went cold meanwhile."""
    wgrad = WGrad()
    layer, found = Slow(0, wgrad, pace), torch.empty(times, 3, dtype=torch.float64)
    for row in found:
        x = torch.zeros(ROWS, WIDTH, requires_grad=True)
        marks = [time.perf_counter()]
        out = layer(x)
        marks.append(time.perf_counter())
        with wgrad.collect() as left:
            torch.autograd.backward(out, torch.ones(ROWS, WIDTH))
        marks.append(time.perf_counter())
        left.pop()()
        marks.append(time.perf_counter())
        row.copy_(torch.tensor(marks, dtype=torch.float64).diff())
    return found


class Runner(Protocol):
    """A pipeline at work. `schedule` is the table that it plays, as our simulator reads it."""

    schedule: Schedule
    layers: dict[int, Slow]

    def step(self) -> None: ...


@dataclass
class Sizes:
    ranks: int
    microbatches: int


class Dryvine:
    def __init__(self, name: str, sizes: Sizes, rank: int, pace: Pace) -> None:
        self.schedule = build(name, sizes.ranks, sizes.microbatches)
        self.wgrad = WGrad()
        self.layers = {s: Slow(s, self.wgrad, pace) for s in self.schedule.stages_of(rank)}
        mesh = make_mesh(
            Layout(pp=sizes.ranks, routes=len(self.schedule.routes)), torch.device("cpu"), timedelta(seconds=600)
        )
        state = (torch.empty(ROWS, WIDTH, device="meta"),)
        stages = {s: self._stage(layer) for s, layer in self.layers.items()}
        wire = EdgeWire(P2PWire(mesh), lambda edge: state)
        self.executor = Executor(rank_program(lower(self.schedule), rank), stages, wire, CpuStreams, ORDERS["cpu"])
        self.batch = Batch(inputs(sizes.microbatches).split(ROWS), 1 / sizes.microbatches)

    def _stage(self, layer: Slow) -> Stage:
        first, last = layer.number == 0, layer.number + 1 == self.schedule.stages

        def function(state: State, flight: Flight) -> Outcome:
            out = layer(flight.tokens if first else state[0])
            return Outcome((), {"loss": loss_of(out)}) if last else Outcome((out,), {})

        return Stage(layer.number, [Compute("dense", f"layers.{layer.number}", function, self.wgrad)])

    def step(self) -> None:
        self.executor.run(self.batch)


@dataclass
class Idle:
    """A phase that does nothing, and so costs what the executor costs."""

    stage: int
    name: str = "dense"
    stream: Literal["compute"] = "compute"

    @property
    def layer(self) -> str:
        return f"layers.{self.stage}"

    def forward(self, state: State, flight: Flight) -> Pending[State]:
        return Pending.done(state)

    def backward(self, grads: Grads, flight: Flight) -> StepResult:
        return StepResult(Pending.done(grads), [])


class Nowhere:
    """A wire with no other end: what is received is the meta tensors asked for."""

    def send(self, tensors: State, target: int, channel: Channel, label: str = "") -> Pending[None]:
        return Pending.done(None)

    def receive(self, like: State, source: int, channel: Channel, label: str = "") -> Pending[State]:
        return Pending.done(like)


class Torch:
    """`dw_builder` hands W over as ours does: no backward runs twice."""

    def __init__(self, name: str, sizes: Sizes, rank: int, pace: Pace) -> None:
        from torch.distributed import pipelining as pp

        self.ranks, self.rank, self.left = sizes.ranks, rank, list[Closure]()
        self.wgrad = WGrad()
        count = 2 * sizes.ranks
        mine = (rank, rank + sizes.ranks if name == "ScheduleInterleaved1F1B" else count - 1 - rank)
        self.layers = {s: Slow(s, self.wgrad, pace) for s in mine}
        stages = [self._stage(pp.PipelineStage, layer, count) for layer in self.layers.values()]
        self.runtime = getattr(pp, name)(
            stages, sizes.microbatches, loss_fn=lambda out, _: loss_of(out) / sizes.microbatches, scale_grads=False
        )
        rows = [self.runtime.pipeline_order[r] for r in range(sizes.ranks)]
        self.schedule = from_csv("\n".join(",".join(str(a or "") for a in row) for row in rows), name)
        self.x = inputs(sizes.microbatches)

    def _stage(self, make: Callable[..., Any], layer: Slow, count: int) -> Any:
        received = torch.empty(ROWS, WIDTH, requires_grad=layer.number > 0)
        sent = torch.empty(ROWS, WIDTH, requires_grad=True)
        cpu = torch.device("cpu")
        return make(layer, layer.number, count, cpu, input_args=received, output_args=sent, dw_builder=self._w)

    def _w(self) -> Callable[[], None]:
        left = self.left.copy()  # the list itself stays: the backward that is next appends to it
        self.left.clear()

        def run() -> None:
            for closure in left:
                closure()

        return run

    def step(self) -> None:
        first, last = 0 in self.layers, 2 * self.ranks - 1 in self.layers
        with self.wgrad.collect() as self.left:
            self.runtime.step(*([self.x] if first else []), target=self.x if last else None, return_outputs=False)


class DeepSpeed:
    """`DualPipeVModule` runs backwards whole; a step ends with its optimizer, here one without parameters to move."""

    def __init__(self, name: str, sizes: Sizes, rank: int, pace: Pace) -> None:
        os.environ.update(LOCAL_RANK=str(rank), DS_ACCELERATOR="cpu")
        import deepspeed
        from deepspeed.pipe import DualPipeVModule, LayerSpec
        from deepspeed.utils import logger

        logger.setLevel("ERROR")
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
        wgrad = WGrad()
        specs = [LayerSpec(Slow, s, wgrad, pace) for s in range(2 * sizes.ranks)]
        module = DualPipeVModule(layers=specs, num_stages=sizes.ranks, loss_fn=loss_of, partition_method="uniform")
        self.layers = {layer.number: layer for layer in module.modules() if isinstance(layer, Slow)}
        config = {"train_micro_batch_size_per_gpu": ROWS, "gradient_accumulation_steps": sizes.microbatches}
        self.engine, *_ = deepspeed.initialize(
            model=module, config=config, optimizer=torch.optim.SGD(module.parameters(), lr=0.0)
        )
        self.schedule = _deepspeed_table(sizes)
        self.batches = [(x, x) for x in inputs(sizes.microbatches).split(ROWS)]

    def step(self) -> None:
        self.engine.train_batch(iter(self.batches))


def _deepspeed_table(sizes: Sizes) -> Schedule:
    from deepspeed.runtime.pipe.schedule import BackwardPass, DualPipeVSchedule, ForwardPass

    count = 2 * sizes.ranks
    kinds: dict[type, Any] = {ForwardPass: "F", BackwardPass: "B"}

    def ops(rank: int) -> tuple[tuple[Op, ...], ...]:
        steps = DualPipeVSchedule(sizes.microbatches, sizes.ranks, rank).steps()
        done = [cmd for cmds in steps for cmd in cmds if type(cmd) in kinds]
        stage = (rank, count - 1 - rank)
        return tuple((Op(kinds[type(c)], stage[c.phase], c.buffer_id % sizes.microbatches),) for c in done)

    route = (*range(sizes.ranks), *reversed(range(sizes.ranks)))
    return Schedule("DualPipeVModule", sizes.microbatches, (route,), tuple(map(ops, range(sizes.ranks))))


MAKERS: dict[str, Callable[[Sizes, int, Pace], Runner]] = {
    **{f"dryvine {name}": partial(Dryvine, name) for name in SCHEDULES},
    **{
        f"torch {name}": partial(Torch, f"Schedule{name}") for name in ("Interleaved1F1B", "ZBVZeroBubble", "DualPipeV")
    },
    "deepspeed DualPipeV": partial(DeepSpeed, "DualPipeVModule"),
}
