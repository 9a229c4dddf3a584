"""A microbatch whose tokens are routed as in one before, so that it can be recorded as a CUDA graph.

A graph contains no read of the device by the host, and `flat` reads how many rows come from each rank. Where gates and
inputs do not change, these numbers do not either: the host takes them from an earlier microbatch, and all of routing's
work on the device is done again. Experts get their counts on the device, as in every graph of the trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from dryvine.comm.dispatch import routing
from dryvine.comm.dispatch.counts import DeviceCounts
from dryvine.comm.dispatch.flat import Flat, FlatHandle
from dryvine.comm.dispatch.routing import Arrival, RowOrder, Sum
from dryvine.parallel.graphs import Recorder
from dryvine.parallel.stage import Routing, Stage


class Repeated(Flat):
    """`flat` without padding, for a routing that has the counts of `before`."""

    def __init__(self, flat: Flat, before: FlatHandle) -> None:
        super().__init__(flat.exchange, flat.experts)
        self.before = before

    def _handle(self, order: RowOrder, summed: Sum, theirs: Tensor, label: str) -> FlatHandle:
        used = list(self.before.counts)
        counts = DeviceCounts(theirs[:, :-1].sum(0), sum(used))
        arrival = Arrival(counts, *routing.arrive(theirs, used, self.alignment))
        return replace(self.before, label=label, order=order, arrival=arrival, sum=summed)


def repeated(stage: Stage, flat: Flat, handles: dict[str, FlatHandle]) -> Stage:
    """The stage, whose layers are routed as they were when `handles` were made."""
    return replace(stage, phases=[
        Routing(phase.layer, Repeated(flat, handles[phase.layer])) if isinstance(phase, Routing) else phase
        for phase in stage.phases
    ])  # fmt: skip


def recorded(run: Callable[[], None], recorder: Recorder) -> Callable[[], None]:
    """`run`, which sends nothing and whose kernels have all been loaded, as a graph: what replays it."""
    steps, _ = recorder.record(run, recorder.pool())

    def replay() -> None:
        for step in steps:
            step.run()

    return replay
