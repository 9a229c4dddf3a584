"""One rank's part of a run: builds everything that a step needs, once, and passes it on as `Rig`.

This is the only file that imports all rooms; the steps themselves are in `step.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch

from dryvine.comm.buddies import BuddyLinks, make_links
from dryvine.comm.dispatch.api import AnyDispatcher
from dryvine.comm.dispatch.choose import make_dispatcher
from dryvine.comm.dispatch.nvlink import Nvlink
from dryvine.comm.dispatch.payload import Format
from dryvine.comm.dispatch.setup import Setup
from dryvine.comm.mesh import Layout, Mesh, make_mesh
from dryvine.comm.pipeline_wire import make_wire
from dryvine.comm.topology import Topology, by_sizes
from dryvine.comm.world import timeout
from dryvine.parallel.bucket import BucketMemory
from dryvine.parallel.buckets import ReadingLayer
from dryvine.parallel.executor import EdgeWire, Executor, LayerHooks
from dryvine.parallel.flow_control import rank_program, slots_by_line
from dryvine.parallel.graphs import Graphs
from dryvine.parallel.overlap import ORDERS
from dryvine.parallel.schedule.ir import Program
from dryvine.parallel.schedule.lower import forward_only, lower
from dryvine.parallel.streams import Streams, make_streams
from dryvine.parallel.zero import Zero, ZeroHooks
from dryvine.trainer.checkpoint.state import RunState
from dryvine.trainer.config import Config
from dryvine.trainer.data.splits import Data
from dryvine.trainer.fp8.choose import choose_engines
from dryvine.trainer.fp8.fp8 import FP8
from dryvine.trainer.graph_memory import may_overflow, recordable
from dryvine.trainer.graphed import make_graphs
from dryvine.trainer.integrity import Integrity
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.phases import codec_of
from dryvine.trainer.model.spec import Spec
from dryvine.trainer.optim import Optimizer
from dryvine.trainer.run_plan import RunPlan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Rig:
    """This rank's stages, data, optimizer and connections, and an executor for each size of batch."""

    plan: RunPlan
    mesh: Mesh
    model: Model
    optimizer: Optimizer
    data: Data
    dispatcher: AnyDispatcher
    wire: EdgeWire
    carrier: str  # how the wire sends messages, for the log
    streams: Callable[[], Streams]
    graphs: Graphs | None
    replays: str  # whether CUDA graphs are used and why, for the log
    fp8: FP8 | None
    integrity: Integrity
    topology: Topology
    links: BuddyLinks | None  # None: no copies in memory, or only on this node
    overflows: torch.Tensor | None  # int64 [1]: routings that graphs had no room for; None: they have room for all
    _training: dict[int, Executor] = field(default_factory=dict)
    _forward: dict[int, Executor] = field(default_factory=dict)
    _accumulating: dict[int, Executor] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        return self.plan.config

    @property
    def node(self) -> int:
        """The number of this rank's node."""
        return self.topology.node_of(self.mesh.rank)

    def training(self, sequences: int) -> Executor:
        """The executor of a training step of `sequences`, counted over all data ranks."""
        if sequences not in self._training:
            program = self.plan.training[sequences]
            zero = self.optimizer.zero
            turns = zero.turns(program.schedule) if self.config.parallel.overlap == "on" else None
            self._training[sequences] = self.executor(program, self.wire, ZeroHooks(zero, turns))
        return self._training[sequences]

    def forward(self, sequences: int) -> Executor:
        """The executor of a step's forwards alone, for any `sequences` that `training` accepts."""
        if sequences not in self._forward:
            schedule = forward_only(self.plan.training[sequences].schedule)
            self._forward[sequences] = self.executor(lower(schedule), self.wire, ZeroHooks(self.optimizer.zero))
        return self._forward[sequences]

    def accumulating(self, sequences: int) -> Executor:
        """The executor of a part of a step, not its last: as `training`, without summing gradients over copies."""
        if sequences not in self._accumulating:
            hooks = ZeroHooks(self.optimizer.zero)
            self._accumulating[sequences] = self.executor(self.plan.training[sequences], self.wire, hooks)
        return self._accumulating[sequences]

    @cached_property
    def validation(self) -> Executor:
        """The executor of one validation batch, forward only."""
        return self.executor(self.plan.validation, self.wire, ZeroHooks(self.optimizer.zero))

    def executor(self, program: Program, wire: EdgeWire, hooks: LayerHooks) -> Executor:
        """An executor of this rank's part of `program`, with messages over `wire`."""
        order = ORDERS[self.mesh.device.type] if self.config.parallel.overlap == "on" else None
        own = rank_program(program, self.mesh.pp_rank)
        return Executor(own, self.model.stages, wire, self.streams, order, hooks, self.graphs)

    def state(self) -> RunState:
        """This rank's part of a checkpoint: the tensors themselves, not copies."""
        return RunState(self.optimizer.state(), self.model.buffers, self.optimizer.shapes())

    def take_overflows(self) -> torch.Tensor | None:
        """`overflows` of all ranks since the last call. Collective; the host does not wait."""
        if self.overflows is None:
            return None
        taken = self.overflows.clone()
        self.overflows.zero_()
        return self.mesh.sum(taken, "routings without room")

    def update(self, rate: float, norm: float, scale: float, step: int) -> None:
        """`Optimizer.update` for a step, counted from 1. The next forward of each layer waits for its new weights.
        Collective."""
        self._forget_copies()
        with self.integrity.watching(step) as witness:
            self.optimizer.update(rate, norm, scale, witness)
        # Now, while the device has the update to do: there are a hundred launches of a few microseconds each.
        self.renew_copies()

    def renew_copies(self) -> None:
        """Update the FP8 copies of weights that have changed, for graphs, which read them without asking."""
        if self.fp8 is not None and self.graphs is not None:
            self.optimizer.zero.settle()
            self.fp8.cache.refresh()

    def restored(self) -> None:
        """Send the weights to all copies after the optimizer's state was loaded. Collective."""
        self.integrity.forget()
        self.publish()

    def publish(self, shards: Sequence[torch.Tensor] | None = None) -> None:
        """Set every copy of the weights to the FP32 masters, or to `shards`, one per bucket. Collective."""
        self._forget_copies()
        self.optimizer.zero.publish(shards)

    def _forget_copies(self) -> None:
        """Invalidate the FP8 copies of the weights."""
        if self.fp8 is not None:
            self.fp8.cache.expire()


def mesh_of(plan: RunPlan, device: torch.device) -> Mesh:
    """The process groups of the plan's layout. Collective."""
    p, comm = plan.config.parallel, plan.config.comm
    layout = Layout(p.pp, p.dp, p.ep, routes=len(plan.schedule.routes))
    return make_mesh(layout, device, timeout(comm.deadline, device), comm.sms)


def mesh_beside(plan: RunPlan, mesh: Mesh) -> Mesh:
    """A mesh of the same ranks with separate process groups, for a thread that communicates while another trains.
    Deadlines are torch's. Collective."""
    every = tuple(range(mesh.size))
    return replace(mesh_of(plan, mesh.device), world=mesh.new_groups([every]).get(every))


class RankModel(NamedTuple):
    """This rank's part of the model, its dispatcher, and its FP8 arithmetic, if any."""

    model: Model
    dispatcher: AnyDispatcher
    fp8: FP8 | None


def make_fp8(config: Config, mesh: Mesh) -> FP8 | None:
    """The FP8 arithmetic of this rank, if the run has any. Collective."""
    if not config.fp8.fp8:
        return None
    transposes = "transposes" not in config.model.recompute
    return FP8(config.fp8, *choose_engines(config.fp8, mesh, config.run.folder), transposes)


def make_model(plan: RunPlan, mesh: Mesh, topology: Topology | None = None) -> RankModel:
    """Build this rank's part of the model, with uninitialised weights. Collective."""
    config = plan.config
    dispatcher = _dispatcher(config, mesh, topology)
    fp8 = make_fp8(config, mesh)
    spec = Spec(config.model, DTYPES[config.run.dtype], mesh.device, mesh.ep_rank, mesh.ep, fp8)
    return RankModel(Model(spec, plan.blocks_of(mesh.pp_rank), dispatcher), dispatcher, fp8)


def make_rig(plan: RunPlan, mesh: Mesh, data: Data, topology: Topology | None = None) -> Rig:
    """Build this rank's part of the run, with weights initialised from `run.seed`. `topology` None: one node.
    Collective."""
    config = plan.config
    model, dispatcher, fp8 = make_model(plan, mesh, topology)
    model.initialise(config.run.seed)
    memory = BucketMemory(config.optim.sums, config.optim.offload == "cpu")
    zero = Zero(dict(model.named_parameters()), mesh, readers(model, plan, mesh.pp_rank), memory)
    optimizer = Optimizer(zero, config.optim)
    state = _boundary(config)
    slots = slots_by_line(plan.programs)
    wire, carrier = make_wire(mesh, topology, slots, state)
    messages = EdgeWire(wire, lambda edge: state)
    graphs, replays = make_graphs(config, mesh.device, dispatcher, fp8, model.loss_weights)
    streams = make_streams(mesh.device)
    integrity = Integrity(optimizer, config.run)
    nodes = topology or by_sizes([mesh.size])
    links = make_links(nodes, mesh.rank, mesh.timeout) if config.run.buddy_every else None
    return Rig(
        plan, mesh, model, optimizer, data, dispatcher, messages, carrier, streams, graphs, replays, fp8, integrity,
        nodes, links, _overflows(config, mesh, dispatcher),
    )  # fmt: skip


def _overflows(config: Config, mesh: Mesh, dispatcher: AnyDispatcher) -> torch.Tensor | None:
    """All ranks have it or none, since they sum it: a rank whose dispatcher counts none has a zero."""
    if not may_overflow(config, mesh.device.type == "cuda"):
        return None
    if isinstance(dispatcher, Nvlink):
        return dispatcher.room.overflows
    return torch.zeros(1, dtype=torch.int64, device=mesh.device)


def readers(model: Model, plan: RunPlan, pp_rank: int) -> dict[str, tuple[ReadingLayer, ...]]:
    """For each parameter of a pipeline rank, the layers of that rank that read it."""
    places = {layer: place for place, layer in enumerate(layer for layers in plan.blocks for layer in layers)}
    found: defaultdict[str, list[ReadingLayer]] = defaultdict(list)
    for stage, layers in plan.blocks_of(pp_rank).items():
        for layer in layers:
            for name in model.parameters_of(layer):
                found[name].append(ReadingLayer(places[layer], stage, layer))
    return {name: tuple(sorted(of)) for name, of in found.items()}


def _boundary(config: Config) -> tuple[torch.Tensor]:
    """A meta tensor with the shape of every message between stages: the hidden state of a microbatch, or its
    gradient."""
    tokens = config.parallel.microbatch_sequences * config.data.seq_len
    return (torch.empty(tokens, config.model.hidden, dtype=DTYPES[config.run.dtype], device="meta"),)


def _dispatcher(config: Config, mesh: Mesh, topology: Topology | None) -> AnyDispatcher:
    comm, shape = config.comm, config.model
    setup = Setup(
        experts=shape.routed,
        mesh=mesh,
        topology=topology,
        chunks=comm.chunks,
        top_k=shape.top_k,
        tokens=config.parallel.microbatch_sequences * config.data.seq_len,
        row_bytes=max(row_bytes(config)),
        by_choice=comm.sums == "by_choice",
        graphs=recordable(config, mesh.device.type == "cuda"),
        room=config.parallel.recorded_room,
    )
    return make_dispatcher(comm.dispatcher, setup, comm.imbalance)


def row_bytes(config: Config) -> tuple[int, int]:
    """Bytes of a dispatched row with its weights, and of a combined row."""
    rows = torch.empty(0, config.model.hidden, dtype=DTYPES[config.run.dtype])
    weights = torch.empty(0, config.model.top_k)
    return Format.of((*codec_of(config.fp8).encode(rows), weights)).bytes, Format.of((rows, weights)).bytes
