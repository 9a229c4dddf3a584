"""One training step of one rank, and one validation, in a screen: everything that the steps need is in `Rig`.

A step is: the plan says which sequences and what rate; the executor plays the schedule; gradients are summed over all
copies; the optimizer updates; the gate biases follow the load of the whole global batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from dryvine.comm.dispatch.api import AnyDispatcher
from dryvine.comm.dispatch.choose import make_dispatcher, pick
from dryvine.comm.dispatch.payload import Format
from dryvine.comm.dispatch.setup import Setup
from dryvine.comm.mesh import Mesh
from dryvine.comm.topology import GroupLimit, Topology, mismatch
from dryvine.comm.watch import Watch
from dryvine.comm.wire import P2PWire
from dryvine.parallel.executor import Batch, EdgeWire, Executor, Played
from dryvine.parallel.flow_control import rank_program
from dryvine.parallel.overlap import ORDERS
from dryvine.parallel.schedule.ir import Schedule
from dryvine.parallel.schedule.lower import forward_only, lower
from dryvine.parallel.schedule.table import build
from dryvine.parallel.streams import Streams, make_streams
from dryvine.parallel.zero import Zero
from dryvine.trainer.config import Config, split
from dryvine.trainer.data.prepare import prepare
from dryvine.trainer.data.source import TokenSource
from dryvine.trainer.fp8.choose import choose
from dryvine.trainer.fp8.fp8 import FP8
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.phases import codec_of
from dryvine.trainer.model.shape import blocks
from dryvine.trainer.model.spec import Spec
from dryvine.trainer.optim import Optimizer
from dryvine.trainer.ramps import Point, gradient_scale, learning_rate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Data:
    """What a run reads. Made before any process group, so that a missing dataset costs nobody a GPU."""

    train: TokenSource
    val: TokenSource


def open_data(config: Config) -> Data:
    """Build the embedded corpus if it is what is asked for, and open both splits. Raises DataError."""
    folder = prepare(config.data)
    extra = 1 + config.model.mtp_depth
    splits = (TokenSource(folder, s, config.data.seq_len, extra, config.run.seed) for s in ("train", "val"))
    return Data(*splits)


@dataclass
class Rig:
    """One rank's part of a run: its stages, its data, its optimizer, and an executor for each size of batch."""

    config: Config
    mesh: Mesh
    model: Model
    optimizer: Optimizer
    data: Data
    dispatcher: AnyDispatcher
    wire: P2PWire
    streams: Callable[[], Streams]
    fp8: FP8 | None = None
    executors: dict[tuple[int, bool], Executor] = field(default_factory=dict)  # (microbatches, training)

    def executor(self, microbatches: int, training: bool) -> Executor:
        key = (microbatches, training)
        if key not in self.executors:
            p = self.config.parallel
            schedule = make_schedule(self.config, microbatches)
            tokens = p.microbatch_sequences * self.config.data.seq_len
            state = (torch.empty(tokens, self.config.model.hidden, dtype=DTYPES[self.config.run.dtype], device="meta"),)
            program = lower(schedule if training else forward_only(schedule))
            self.executors[key] = Executor(
                rank_program(program, self.mesh.pp_rank),
                self.model.stages,
                EdgeWire(self.wire, lambda _: state),
                self.streams,
                ORDERS[self.mesh.device.type] if p.overlap == "on" else None,
            )
        return self.executors[key]

    def update(self, point: Point, norm: float) -> None:
        """Step the optimizer and give every copy of a weight its new values."""
        rate = learning_rate(self.config.optim, point, self.config.data.seq_len)
        self.optimizer.update(rate, norm, self.scale(point))
        self.publish()

    def publish(self, shards: Sequence[torch.Tensor] | None = None) -> None:
        """Set the weights from the masters, or from `shards` of each bucket. FP8 copies were of the old ones."""
        self.optimizer.zero.publish(shards)
        if self.fp8 is not None:
            self.fp8.cache.clear()

    def scale(self, point: Point) -> float:
        """What a step's gradients are multiplied by until the update."""
        return gradient_scale(point, self.config.data.seq_len)

    def tokens(self, source: TokenSource, first: int, microbatches: int) -> list[torch.Tensor]:
        """This data rank's microbatches of the step whose first sequence is `first`: a share that any layout agrees on
        as a set, since the numbers are split over microbatches and data ranks and nothing else."""
        size, mesh = self.config.parallel.microbatch_sequences, self.mesh
        firsts = [first + (m * mesh.data_ranks + mesh.data_rank) * size for m in range(microbatches)]
        return [torch.from_numpy(source.sequences(n, size)).to(mesh.device) for n in firsts]


def make_schedule(config: Config, microbatches: int) -> Schedule:
    p = config.parallel
    return build(p.schedule, p.pp, microbatches, p.chunks)


def make_rig(
    config: Config, mesh: Mesh, data: Data, topology: Topology | None = None, watch: Watch | None = None
) -> Rig:
    """Build this rank's stages and state. `topology` None is one node; without `watch` a wait has torch's own deadline.
    Collective."""
    schedule = make_schedule(config, config.microbatches(config.batch.sequences))
    blocks = split(config)
    dispatcher = _dispatcher(config, mesh, topology, watch)
    fp8 = FP8(config.fp8, *choose(config.fp8, mesh, config.run.folder)) if config.fp8.fp8 else None
    spec = Spec(config.model, DTYPES[config.run.dtype], mesh.device, mesh.ep_rank, mesh.ep, fp8)
    model = Model(spec, {stage: blocks[stage] for stage in schedule.stages_of(mesh.pp_rank)}, dispatcher)
    model.initialise(config.run.seed)
    zero = Zero(dict(model.named_parameters()), mesh)
    return Rig(
        config,
        mesh,
        model,
        Optimizer(zero, config.optim),
        data,
        dispatcher,
        P2PWire(mesh, watch),
        make_streams(mesh.device),
        fp8,
    )


def _dispatcher(config: Config, mesh: Mesh, topology: Topology | None, watch: Watch | None) -> AnyDispatcher:
    comm, shape = config.comm, config.model
    setup = Setup(
        experts=shape.routed,
        mesh=mesh,
        topology=topology,
        watch=watch,
        chunks=comm.chunks,
        top_k=shape.top_k,
        tokens=config.parallel.microbatch_sequences * config.data.seq_len,
        row_bytes=max(_row_bytes(config)),
    )
    return make_dispatcher(comm.dispatcher, setup, comm.imbalance)


def _row_bytes(config: Config) -> tuple[int, int]:
    """Of a dispatched row with its weights, and of a combined one."""
    rows = torch.empty(0, config.model.hidden, dtype=DTYPES[config.run.dtype])
    weights = torch.empty(0, config.model.top_k)
    return Format.of((*codec_of(config.fp8).encode(rows), weights)).bytes, Format.of((rows, weights)).bytes


def routes_of_tokens(config: Config, mesh: Mesh, topology: Topology) -> list[str]:
    """How tokens will travel, and what does not fit, in lines for the start of a run; from rank 0's expert group."""
    shape, group = config.model, topology.of(range(mesh.ep))
    name, why = pick(group, shape.top_k, shape.routed)
    taken = f"auto takes {name}: {why}" if config.comm.dispatcher == "auto" else f"{config.comm.dispatcher}, as asked"
    misfit = mismatch(group, shape.routed, GroupLimit(shape.groups, shape.group_limit), _row_bytes(config)[0])
    return [f"comm.dispatcher: {taken}", *([f"warning: {misfit}"] if misfit else [])]


def accumulate(rig: Rig, point: Point) -> Played:
    """Play the schedule over a step's sequences. Every main gradient then holds this rank's share of the sum, times
    `rig.scale(point)`."""
    microbatches = rig.config.microbatches(point.sequences)
    rig.optimizer.zero.zero_grads()
    if rig.fp8 is not None:
        every = rig.config.fp8.guard_every
        rig.fp8.guard.on = every > 0 and point.step % every == 0
    tokens = rig.tokens(rig.data.train, point.first, microbatches)
    share = rig.scale(point) / (microbatches * rig.mesh.data_ranks)
    return rig.executor(microbatches, training=True).run(Batch(tokens, share))


def train_step(rig: Rig, point: Point) -> tuple[Played, float, Balance]:
    """One step. Gives what was played, the gradient norm before the clip, and how even the load was. With a norm that
    is not finite, on any rank and so on all, the step is skipped: no weight, moment or gate bias has changed."""
    played = accumulate(rig, point)
    norm = rig.optimizer.reduce(rig.scale(point))
    sound = math.isfinite(norm)
    if sound:
        rig.update(point, norm)
    return played, norm, balance(rig, move=sound)


class Balance(NamedTuple):
    """The busiest over the mean, in the worst layer; 1 is even."""

    experts: float
    ranks: float  # of an expert-parallel group


def balance(rig: Rig, move: bool = True) -> Balance:
    """Move every gate's bias by the load of the whole global batch, unless the step is skipped, and start counting
    anew (arXiv 2408.15664)."""
    shape, own = rig.config.model, rig.model.loads
    layers = [block.name for block in blocks(shape) if block.kind in ("moe", "mtp")]
    if not layers:
        return Balance(1.0, 1.0)
    zeros = torch.zeros(shape.routed, dtype=torch.int64, device=rig.mesh.device)
    loads = rig.mesh.sum(torch.stack([own.get(layer, zeros) for layer in layers]))
    if move:
        rig.model.update_biases(dict(zip(layers, loads, strict=True)), shape.bias_gamma)
    rig.model.reset_loads()
    return Balance(*(_imbalance(loads.view(len(layers), n, -1).sum(-1)) for n in (shape.routed, rig.mesh.ep)))


def _imbalance(loads: torch.Tensor) -> float:
    return float((loads.max(dim=1).values * loads.shape[1] / loads.sum(dim=1)).max())


def evaluate_average(rig: Rig) -> float | None:
    """`evaluate` with the averages of the weights in their place; None if none are kept. Gate biases follow the load
    and are no parameters: they stay as they are."""
    if rig.optimizer.ema is None:
        return None
    rig.publish(rig.optimizer.ema.averages)
    loss = evaluate(rig)
    rig.publish()
    return loss


def evaluate(rig: Rig) -> float:
    """Mean next-token loss over the validation batches, the same ones every time and in every layout."""
    config, total = rig.config, torch.zeros(1, dtype=torch.float64, device=rig.mesh.device)
    microbatches = config.microbatches(config.batch.sequences)
    for number in range(config.run.eval_batches):
        tokens = rig.tokens(rig.data.val, number * config.batch.sequences, microbatches)
        played = rig.executor(microbatches, training=False).run(Batch(tokens, 0.0, training=False))
        total += sum((loss.double() for loss in played.losses.get("loss", [])), torch.zeros_like(total))
    return float(rig.mesh.sum(total)) / (config.run.eval_batches * microbatches * rig.mesh.data_ranks)
