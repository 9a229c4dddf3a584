"""Two ranks that talk, of which rank 1 is lost in the middle: what each process of `benchmarks.faults` runs.

    torchrun --nproc-per-node 2 -m benchmarks.support.lost_rank OPERATION FAULT DEVICE DEADLINE FOLDER

Before it is lost, rank 1 writes the time to FOLDER/down. Messages and collectives are those of a training step, posted
by the same code; between them each rank multiplies matrices and, on a GPU, its host runs ahead of it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from dryvine.comm.collectives import reduce_scatter
from dryvine.comm.dispatch.flat import build
from dryvine.comm.dispatch.setup import Setup
from dryvine.comm.lines import Line
from dryvine.comm.mesh import Layout, Mesh, make_mesh
from dryvine.comm.pipeline_wire import connect, make_wire
from dryvine.comm.watch import Watch
from dryvine.comm.wire import P2PWire, Wire
from dryvine.comm.world import in_world, set_environment, timeout

STEPS, MICROBATCHES = 200, 4
LOST = 5  # the step in which rank 1 is lost
CHANNEL = (0, "up")
HIDDEN = 256

Step = Callable[[str, Callable[[], None]], None]  # of a label, and what may lose this rank


def main(words: list[str]) -> int:
    operation, fault, kind, deadline, folder = words
    set_environment(os.environ)
    # As in the training loop, which sets a flag: a launcher's SIGTERM does not end a rank that waits.
    signal.signal(signal.SIGTERM, lambda *_: None)
    device = torch.device("cpu")
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return in_world(lambda watch: body(watch, operation, fault, device, Path(folder)), float(deadline), device)


def body(watch: Watch, operation: str, fault: str, device: torch.device, folder: Path) -> int:
    hour = timeout(3600, device)  # torch's own must not be what ends the job
    pipeline = operation in ("receive", "receive NCCL")
    layout = Layout(pp=2) if pipeline else Layout(ep=2)
    mesh = replace(make_mesh(layout, device, hour), watch=watch)
    step = OPERATIONS[operation](mesh)
    square = torch.rand(512, 512, device=device)
    for number in range(STEPS):
        for microbatch in range(MICROBATCHES):
            square = torch.tanh(square @ square)
            lost = fault if (mesh.rank, number, microbatch) == (1, LOST, 2) else ""
            if lost == "leave":
                note(folder)
                return 0
            step(f"layers.3, microbatch {microbatch}", lambda fault=lost: lose(fault, folder))  # type: ignore[misc]
        if device.type == "cuda":
            torch.cuda.synchronize()  # a step reads its loss
    return 0


def lose(fault: str, folder: Path) -> None:
    if not fault:
        return
    note(folder)
    if fault == "raise":
        raise ValueError("layers.3 exploded")
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault])


def note(folder: Path) -> None:
    (folder / "down").write_text(str(time.time()))


def receive(mesh: Mesh) -> Step:
    """Rank 0 waits for a message of rank 1, by whatever carries messages here."""
    state = torch.empty(512, HIDDEN, device="meta")
    wire, _ = make_wire(mesh, None, {Line(1, 0, CHANNEL): 3}, (state,))
    return _messages(mesh, wire, state)


def receive_nccl(mesh: Mesh) -> Step:
    connect(mesh, [Line(1, 0, CHANNEL)])
    return _messages(mesh, P2PWire(mesh), torch.empty(512, HIDDEN, device="meta"))


def _messages(mesh: Mesh, wire: Wire, state: torch.Tensor) -> Step:
    def step(label: str, may_lose: Callable[[], None]) -> None:
        may_lose()
        if mesh.pp_rank:
            wire.send((torch.ones(state.shape, device=mesh.device),), 0, CHANNEL, label).wait()
        else:
            wire.receive((state,), 1, CHANNEL, label).wait()

    return step


def exchange(mesh: Mesh) -> Step:
    """An expert layer's routing, dispatch and combine; the rank is lost before its combine."""
    dispatcher = build(Setup(4, mesh))
    experts = torch.arange(4, device=mesh.device).expand(512, 4)
    rows = torch.ones(512, HIDDEN, device=mesh.device)

    def step(label: str, may_lose: Callable[[], None]) -> None:
        handle = dispatcher.plan_routing(experts, label).wait()
        (arrived,) = dispatcher.dispatch((rows,), None, handle).wait()  # type: ignore[arg-type]
        may_lose()
        dispatcher.combine(arrived, None, handle).wait()  # type: ignore[arg-type]

    return step


def reduction(mesh: Mesh) -> Step:
    """Gradients over the copies, then the norm over the world."""
    whole = torch.ones(1 << 20, device=mesh.device)
    part = torch.empty(1 << 19, device=mesh.device)
    group = mesh.experts
    assert group is not None

    def step(label: str, may_lose: Callable[[], None]) -> None:
        may_lose()
        reduce_scatter(part, whole, group, mesh.watch, f"sum of the gradients of {label}").wait()
        mesh.sum(part.square().sum(), "gradient norms")

    return step


OPERATIONS = {"receive": receive, "receive NCCL": receive_nccl, "all-to-all": exchange, "reduction": reduction}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
