"""`dryvine profile`: seconds of the phases of each kind of block on one device, as one rank of the config runs them.

They are timed inside steps of a small model, which the executor runs as it runs every step: some blocks of each kind,
with the experts that one rank of the layout holds, and several microbatches after each other. So a phase has what it
has in a run: kernels that were issued ahead, weights and buffers that are not in a cache, the executor's own time. A
block run alone, with a wait after each phase, was up to 12% faster than in a step on a CPU, where its weights stay in
the cache, and 6 to 20% slower on a GPU, which waited for the host before each phase.

Each phase notes when it begins, on a GPU by an event in its stream, and lasts until the next begins, so the phases add
up to the step. Two schedules are played. In one, I and W are ops of their own, which gives the seconds of both. In the
other they are one B, and weight gradients run beside other compute, as far as the device can: what this costs or saves
is one factor for all.

Plans suppose that ops are CUDA graphs, which wait for no host. So on a GPU each F and B is given a lead: work that the
device does before it, while the host issues the op. Without, times of phases are the host's where it is slower than the
device. (With experts on several ranks the host reads counts in F, and has no lead after that.)

With experts on several ranks, the `fake` dispatcher stands in for the others: as many rows arrive as even routing
brings, and local copies are timed, but nothing is sent. A trace of a run would need the layout's GPUs.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from dryvine.comm.dispatch.api import AnyDispatcher
from dryvine.comm.dispatch.fake import Fake
from dryvine.comm.dispatch.single_rank import SingleRank
from dryvine.comm.mesh import Layout, Mesh, make_mesh
from dryvine.comm.pending import Pending
from dryvine.comm.topology import by_sizes
from dryvine.launch.plan.profiled import Profile
from dryvine.parallel.executor import Batch, EdgeWire, Executor
from dryvine.parallel.flow_control import rank_program
from dryvine.parallel.overlap import ORDERS
from dryvine.parallel.schedule.ir import Schedule
from dryvine.parallel.schedule.lower import lower
from dryvine.parallel.schedule.table import build
from dryvine.parallel.stage import Flight, Grads, Phase, Stage, State, StepResult, StreamName
from dryvine.parallel.streams import Streams, make_streams
from dryvine.parallel.zero import Zero
from dryvine.trainer.config import Config
from dryvine.trainer.fp8.fp8 import FP8
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.shape import blocks
from dryvine.trainer.model.spec import Spec
from dryvine.trainer.optim import Optimizer
from dryvine.trainer.rehearse import EchoWire
from dryvine.trainer.rig import DTYPES, make_fp8

COMM = ("routing", "dispatch", "combine")  # phases whose local work is part of the experts'
MOST = 2  # blocks of a kind in the small model
STEPS = 3  # of each schedule, after a first one
LEAD = 0.06  # seconds, in which a slow host launches 500 kernels
SIDE = 8192  # rows and columns of a lead's matrices
WHOLE, SPLIT = "one_f_one_b", "zb1p"

Instant = float | torch.cuda.Event


class PhaseOp(NamedTuple):
    """A part of a step that is timed."""

    kind: str  # of block
    phase: str
    op: int  # 0 F, 1 I (or B), 2 W


Seconds = dict[PhaseOp, float]  # of a microbatch, over all blocks of a kind
AHEAD = PhaseOp("", "lead", 0)  # in no result


def measure(config: Config, device: torch.device, rounds: int, on_progress: Callable[[str], None]) -> Profile:
    """Means over the `rounds` microbatches of a step, and of these the medians of some steps. Raises if the small model
    does not fit on the device."""
    mesh = make_mesh(Layout(), device, timedelta(seconds=60))
    fp8 = make_fp8(config, mesh)
    kinds = _some(config)
    model = _model(config, device, tuple(kinds), fp8)
    on_progress("a step")
    apart, whole = _steps(config, model, kinds, rounds)
    del model
    on_progress("the update")
    layers = tuple(name for name, kind in kinds.items() if kind in ("dense", "moe"))
    update = _update(config, _model(config, device, layers, fp8), mesh)
    return Profile(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        model=config.model.model_dump(mode="json"),
        dtype=config.run.dtype,
        fp8=config.fp8.fp8,
        tokens=config.parallel.microbatch_sequences * config.data.seq_len,
        seq_len=config.data.seq_len,
        phases=_phases(apart, whole, Counter(kinds.values())),
        whole=_backward(whole) / _backward(apart),
        update_seconds=update,
    )


def _phases(apart: Seconds, whole: Seconds, count: Counter[str]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """F, I and W by kind of block and phase, of one block."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {kind: {} for kind in count}
    for key, forward in whole.items():
        if key.op == 0:
            inputs, weights = (apart.get(key._replace(op=op), 0.0) for op in (1, 2))
            every = count[key.kind]
            found[key.kind][key.phase] = (forward / every, inputs / every, weights / every)
    return found


def _backward(seconds: Seconds) -> float:
    return sum(each for key, each in seconds.items() if key.op)


def _some(config: Config) -> dict[str, str]:
    """The small model's blocks and their kinds, in order: the first of each kind, and all depths of MTP."""
    found: dict[str, str] = {}
    for block in blocks(config.model):
        if block.kind == "mtp" or list(found.values()).count(block.kind) < MOST:
            found[block.name] = block.kind
    return found


def _model(config: Config, device: torch.device, names: tuple[str, ...], fp8: FP8 | None) -> Model:
    ep = config.parallel.ep
    spec = Spec(config.model, DTYPES[config.run.dtype], device, 0, ep, fp8)
    # MTP reads its embedding and the head, which come with it.
    model = Model(spec, {0: names}, _dispatcher(ep, config.model.routed))
    model.initialise(config.run.seed)
    return model


def _dispatcher(ep: int, experts: int) -> AnyDispatcher:
    return SingleRank(experts) if ep == 1 else Fake(by_sizes([ep]), 0, experts)


class Lead:
    """Work for a GPU, of about LEAD seconds. Products, since one that idles has a higher clock than one that trains."""

    def __init__(self, device: torch.device) -> None:
        self.a, self.b, self.out = torch.randn(3, SIDE, SIDE, dtype=torch.bfloat16, device=device)
        self.count = 1
        self.give()
        start = _now(device)
        self.give()
        end = _now(device)
        _after(device)
        self.count = max(1, round(LEAD / _between(start, end)))

    def give(self) -> None:
        for _ in range(self.count):
            torch.mm(self.a, self.b, out=self.out)


def _lead(device: torch.device) -> Lead | None:
    return Lead(device) if device.type == "cuda" else None


@dataclass
class _Notes:
    """When each phase of a step began, in the order of the calls."""

    device: torch.device
    lead: Lead | None
    noted: list[tuple[PhaseOp, int, Instant]] = field(default_factory=list)  # and its microbatch

    def note(self, key: PhaseOp, microbatch: int) -> None:
        self.noted.append((key, microbatch, _now(self.device)))

    def ahead(self, microbatch: int) -> None:
        """Before an op."""
        if self.lead:
            self.note(AHEAD, microbatch)
            self.lead.give()

    def seconds(self, microbatches: int) -> Seconds:
        """The mean of the microbatches without the first, which finds nothing ready, and the last, which nothing
        follows."""
        found: defaultdict[PhaseOp, float] = defaultdict(float)
        for (key, microbatch, start), (_, _, end) in pairwise(self.noted):
            if key != AHEAD and 0 < microbatch < microbatches - 1:
                found[key] += _between(start, end) / (microbatches - 2)
        return dict(found)


class _Noted:
    """A phase that notes when it begins. `apart`: its weight gradients too, which then are a W. `opens`: the op that
    begins with it, F or B, if any."""

    def __init__(self, inner: Phase, kind: str, notes: _Notes, apart: bool, opens: str) -> None:
        self.inner, self.kind, self.notes, self.apart, self.opens = inner, kind, notes, apart, opens
        self.name, self.layer = inner.name, inner.layer

    @property
    def stream(self) -> StreamName:
        return self.inner.stream

    def forward(self, state: State, flight: Flight) -> Pending[State]:
        if self.opens == "F":
            self.notes.ahead(flight.microbatch)
        self._note(0, flight.microbatch)
        return self.inner.forward(state, flight)

    def backward(self, grads: Grads, flight: Flight) -> StepResult:
        if self.opens == "B":
            self.notes.ahead(flight.microbatch)
        self._note(1, flight.microbatch)
        result = self.inner.backward(grads, flight)
        if self.apart and result.closures:
            result.closures.insert(0, partial(self._note, 2, flight.microbatch))
        return result

    def _note(self, op: int, microbatch: int) -> None:
        phase = "experts" if self.name in COMM else self.name
        self.notes.note(PhaseOp(self.kind, phase, op), microbatch)


def _steps(config: Config, model: Model, kinds: dict[str, str], rounds: int) -> tuple[Seconds, Seconds]:
    """With I and W apart, and with both as one: the medians of some steps of each, in turn."""
    device, microbatches = torch.device(model.spec.device), rounds + 2
    streams, lead = make_streams(device), _lead(device)
    found: dict[str, list[Seconds]] = {SPLIT: [], WHOLE: []}
    for step in range(1 + STEPS):
        for schedule, seconds in found.items():
            notes = _Notes(device, lead)
            executor = _executor(config, model, kinds, build(schedule, 1, microbatches), notes, streams)
            executor.run(Batch([_tokens(config, device) for _ in range(microbatches)], 1.0 / microbatches))
            if step:
                seconds.append(notes.seconds(microbatches))
    apart, whole = ({key: median(step[key] for step in steps) for key in steps[0]} for steps in found.values())
    return apart, whole


def _executor(
    config: Config,
    model: Model,
    kinds: dict[str, str],
    schedule: Schedule,
    notes: _Notes,
    streams: Callable[[], Streams],
) -> Executor:
    phases = model.stages[0].phases
    noted = [
        _Noted(phase, kinds[phase.layer], notes, schedule.name == SPLIT, opens)
        for phase, opens in zip(phases, ("F", *[""] * (len(phases) - 2), "B"), strict=True)
    ]
    order = ORDERS[notes.device.type] if config.parallel.overlap == "on" else None
    wire = EdgeWire(EchoWire(notes.device), lambda edge: ())
    return Executor(rank_program(lower(schedule), 0), {0: Stage(0, noted)}, wire, streams, order)


def _tokens(config: Config, device: torch.device) -> Tensor:
    size = config.parallel.microbatch_sequences, config.data.seq_len + 1 + config.model.mtp_depth
    return torch.randint(config.data.vocab_size, size, device=device)


def _update(config: Config, model: Model, mesh: Mesh) -> float:
    """Seconds of an optimizer step per element, with its gradients zeroed."""
    optimizer = Optimizer(Zero(dict(model.named_parameters()), mesh), config.optim)
    times = []
    for _ in range(1 + STEPS):
        started = _after(mesh.device)
        optimizer.zero.zero_grads()
        norm = optimizer.reduce(1.0)
        optimizer.update(1e-6, norm, 1.0)
        optimizer.zero.settle()
        times.append(_after(mesh.device) - started)
    return median(times[1:]) / sum(bucket.master.numel() for bucket in optimizer.zero.buckets)


def _now(device: torch.device) -> Instant:
    """Of a GPU: when its current stream gets here."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between(start: Instant, end: Instant) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    return start.elapsed_time(end) / 1e3


def _after(device: torch.device) -> float:
    """The time when the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
