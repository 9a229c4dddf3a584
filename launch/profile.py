"""`dryvine profile`: seconds of the phases of each kind of block on one device, as one rank of the config runs them.

Each block is built alone, with the experts that one rank of the layout holds, and its phases run one by one, with a
device synchronisation after each. The `fake` dispatcher stands in for the other ranks: as many rows arrive as even
routing brings, and local copies are timed, but nothing is sent. A trace of a whole step would need the layout's GPUs.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from statistics import median

import torch

from dryvine.comm.dispatch.fake import Fake
from dryvine.comm.mesh import Layout, Mesh, make_mesh
from dryvine.comm.topology import by_sizes
from dryvine.launch.plan.profiled import Profile
from dryvine.parallel.stage import Flight, Grads, Phase, Stage, State
from dryvine.parallel.zero import Zero
from dryvine.trainer.config import Config
from dryvine.trainer.fp8.choose import choose_engines
from dryvine.trainer.fp8.fp8 import FP8
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.shape import blocks
from dryvine.trainer.model.spec import Spec
from dryvine.trainer.optim import Optimizer
from dryvine.trainer.rig import DTYPES

COMM = ("routing", "dispatch", "combine")  # phases whose local work is part of the experts'


def measure(config: Config, device: torch.device, rounds: int, on_progress: Callable[[str], None]) -> Profile:
    """Medians over `rounds` microbatches, after two warm-ups. Raises if a block does not fit on the device."""
    mesh = make_mesh(Layout(), device, timedelta(seconds=60))
    fp8 = FP8(config.fp8, *choose_engines(config.fp8, mesh, config.run.folder)) if config.fp8.fp8 else None
    phases: dict[str, dict[str, tuple[float, float, float]]] = {}
    updates = []
    for block in blocks(config.model):
        if block.kind in phases:
            continue
        on_progress(block.kind)
        model = _model(config, device, block.name, fp8)
        phases[block.kind] = _phases(config, model, block.name, rounds)
        updates.append(_update(config, model, mesh))
        del model
    tokens = config.parallel.microbatch_sequences * config.data.seq_len
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    shape = config.model.model_dump(mode="json")
    seconds = sum(s for s, _ in updates) / sum(n for _, n in updates)
    return Profile(
        device=name, model=shape, dtype=config.run.dtype, fp8=config.fp8.fp8, tokens=tokens,
        seq_len=config.data.seq_len, phases=phases, update_seconds=seconds,
    )  # fmt: skip


def _model(config: Config, device: torch.device, name: str, fp8: FP8 | None) -> Model:
    ep = config.parallel.ep
    spec = Spec(config.model, DTYPES[config.run.dtype], device, 0, ep, fp8)
    # MTP reads its embedding and the head, which come with it.
    model = Model(spec, {0: (name,)}, Fake(by_sizes([ep]), 0, config.model.routed))
    model.initialise(config.run.seed)
    return model


def _phases(config: Config, model: Model, name: str, rounds: int) -> dict[str, tuple[float, float, float]]:
    device = torch.device(model.spec.device)
    sequences, length = config.parallel.microbatch_sequences, config.data.seq_len
    found: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    for number in range(rounds + 2):
        tokens = torch.randint(config.data.vocab_size, (sequences, length + 1 + config.model.mtp_depth), device=device)
        state: State = ()
        if name != "embed":
            state = (torch.randn(sequences * length, config.model.hidden, device=device).to(DTYPES[config.run.dtype]),)
        seconds = _play(model.stages[0], Flight(tokens, 1.0), state, device)
        for key, value in seconds.items() if number >= 2 else ():
            found[key].append(value)
    names = dict.fromkeys(phase for phase, _ in found)
    return {p: tuple(median(found[p, op]) if found[p, op] else 0.0 for op in range(3)) for p in names}  # type: ignore[misc]


class _Stopwatch:
    """Seconds by (phase, 0 F, 1 I, 2 W), with a device synchronisation before and after."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[tuple[str, int], float] = defaultdict(float)

    @contextmanager
    def on(self, phase: Phase, op: int) -> Iterator[None]:
        started = _now(self.device)
        yield
        name = "experts" if phase.name in COMM else phase.name
        self.seconds[name, op] += _now(self.device) - started


def _play(stage: Stage, flight: Flight, state: State, device: torch.device) -> dict[tuple[str, int], float]:
    """One microbatch through a stage, phase by phase, forward and backward."""
    watch = _Stopwatch(device)
    for phase in stage.phases:
        with watch.on(phase, 0):
            state = phase.forward(state, flight).wait()
    grads: Grads = tuple(torch.ones_like(t) for t in state)
    for phase in reversed(stage.phases):
        with watch.on(phase, 1):
            result = phase.backward(grads, flight)
            grads = result.value.wait()
        with watch.on(phase, 2):
            for closure in result.closures:
                closure()
    return watch.seconds


def _update(config: Config, model: Model, mesh: Mesh) -> tuple[float, int]:
    """Seconds of an optimizer step over the block's parameters, and how many elements they have."""
    optimizer = Optimizer(Zero(dict(model.named_parameters()), mesh), config.optim)
    elements = sum(bucket.master.numel() for bucket in optimizer.zero.buckets)
    times = []
    for _ in range(3):
        started = _now(mesh.device)
        norm = optimizer.reduce(1.0)
        optimizer.update(1e-6, norm, 1.0)
        optimizer.zero.settle()
        times.append(_now(mesh.device) - started)
    return min(times), elements


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
