"""The measured timeline of one step, drawn above a simulation of its schedule with the measured mean costs.

Since the costs are those of the run itself, differences between the two pictures are due to jitter, late messages, or
ranks that differ in speed, and never to wrong cost estimates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from dryvine.comm.clock import offset
from dryvine.comm.mesh import Mesh
from dryvine.parallel.executor import Played
from dryvine.parallel.schedule import simulate as simulated
from dryvine.parallel.schedule.costs import PAIRS, Costs
from dryvine.parallel.schedule.draw.html import as_html
from dryvine.parallel.schedule.ir import Schedule
from dryvine.parallel.schedule.simulate import Timeline
from dryvine.trainer.data.atomic import write_atomically


def gather_timeline(schedule: Schedule, played: Played, mesh: Mesh) -> Timeline | None:
    """The timeline of the first data rank's pipeline in ms, on rank 0; None elsewhere. Collective."""
    ahead = offset(mesh)
    rows = mesh.gather([(1e3 * (start + ahead), 1e3 * (end + ahead)) for _, start, end in played.timeline], "timelines")
    if mesh.rank:
        return None
    pipeline: list[list[tuple[float, float]]] = [rows[p * mesh.data_ranks] for p in range(mesh.pp)]  # type: ignore[misc]
    return replace(simulated.measured(schedule, pipeline), label="measured, ms")


def slot_costs(timeline: Timeline) -> Costs:
    """The mean time of each kind of slot."""
    means = {kinds: mean(some) for kinds, some in timeline.times_by_kind.items()}
    pairs = {kinds: time for kinds, time in means.items() if kinds in PAIRS}
    forward, inputs, weights = (means.get(kind, 0.0) for kind in "FIW")
    return Costs(F=forward, I=inputs, W=weights, B=means.get("B"), pairs=pairs)


def simulated_again(timeline: Timeline) -> Timeline:
    """A simulation of the same schedule with the measured mean time of each kind of slot."""
    ideal = simulated.simulate(timeline.schedule, slot_costs(timeline))
    return replace(ideal, label="simulated at the measured mean costs, ms")


def write(path: Path, timeline: Timeline) -> Sequence[Timeline]:
    """Draw the measured timeline and its simulation on one page. Returns both. Raises CannotWrite."""
    costs, ideal = slot_costs(timeline), simulated_again(timeline)
    named = {"F": costs.F, "B": costs.B, "I": costs.I, "W": costs.W, **costs.pairs}
    listed = ", ".join(f"{kind} {time:.1f}" for kind, time in named.items() if time)
    write_atomically(path, as_html([timeline, ideal], f"mean times in ms: {listed}"))
    return timeline, ideal
