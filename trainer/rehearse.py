"""A warm-up step without pipeline peers, before the first step: every kernel that a step can launch is launched once.

The first launch of a kernel loads it, and loading waits until the device is idle. In a pipeline the device may then be
waiting for a message from a peer that is also loading: a deadlock. The same holds for the first use of cuBLAS in a
stream, and for an allocator that must free cached memory before it can grow. So each rank first runs its own part of a
step against a wire that returns random tensors at once. An expert-parallel group runs it together: its ranks run the
same program in the same order, so none of them waits for another that is still loading.

Kernels that are loaded later all the same are reported by name. Sizes that depend on the routing must not select a
kernel, so such arguments are marked `do_not_specialize` where Triton would compile a variant for multiples of 16.

Eager loading (CUDA_MODULE_LOADING=EAGER) covers neither Triton's kernels nor cuBLAS, and takes seconds on every start.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dryvine.comm.pending import Pending
from dryvine.parallel.executor import NO_HOOKS, EdgeWire
from dryvine.parallel.schedule.ir import Program
from dryvine.trainer.batches import repeated_batch
from dryvine.trainer.rig import Rig


@dataclass(frozen=True)
class EchoWire:
    """A `Wire` without peers: sent tensors are dropped, received ones are random."""

    device: torch.device

    def send(
        self, tensors: tuple[Tensor, ...], target: int, channel: tuple[int, str], label: str = ""
    ) -> Pending[None]:
        return Pending.done(None)

    def receive(
        self, like: tuple[Tensor, ...], source: int, channel: tuple[int, str], label: str = ""
    ) -> Pending[tuple[Tensor, ...]]:
        # Random, so that the gate distributes rows as in training.
        return Pending.done(tuple(torch.randn(t.shape, dtype=t.dtype, device=self.device) for t in like))


def rehearse(rig: Rig) -> None:
    """Run a full training step, with and without the FP8 guard, and a validation batch, and discard the results:
    weights, moments, biases and counters are as before. Collective."""
    wire = EdgeWire(EchoWire(rig.mesh.device), rig.wire.shape)
    runs = [(rig.plan.training[rig.config.batch.sequences], True), (rig.plan.validation, False)]
    for guarded in (False,) if rig.fp8 is None else (True, False):
        if rig.fp8 is not None:
            rig.fp8.guard.on = guarded
        for program, training in runs:
            _play(rig, program, wire, training, eager=True)
    if rig.graphs is not None:
        # Only now: no kernel may be loaded while a graph is recorded.
        _play(rig, runs[0][0], wire, training=True, eager=False)
    # Gradient sums, the update and weight gathers overlap with one another and with the schedule, so their kernels
    # must be loaded before it.
    rig.optimizer.zero.reduce()
    rig.optimizer.rehearse()
    rig.publish()
    rig.optimizer.zero.zero_grads()
    rig.model.reset_loads()
    rig.dispatcher.meter.take()
    rig.take_overflows()
    if rig.fp8 is not None:
        deque(rig.fp8.guard.take(rig.model.named_parameters()), maxlen=0)


def _play(rig: Rig, program: Program, wire: EdgeWire, training: bool, eager: bool) -> None:
    batch = repeated_batch(rig, program.schedule.microbatches, training)
    rig.executor(program, wire, NO_HOOKS).run(replace(batch, eager=eager))


def report_loads(rank: int) -> None:
    """Write a line to stderr for every Triton kernel that is loaded from now on. For processes with a GPU."""
    from triton import knobs  # not installed where there is no GPU

    knobs.runtime.kernel_load_start_hook.add(_reporter(rank))


def _reporter(rank: int) -> Callable[[object, object, str, object, str], None]:
    def report(module: object, function: object, name: str, metadata: object, key: str) -> None:
        why = "no warm-up step had these sizes; loading waits for the device, which may be waiting for a peer"
        print(f"warning: rank {rank} loads the kernel {name} in the middle of the run: {why}", file=sys.stderr)

    return report
