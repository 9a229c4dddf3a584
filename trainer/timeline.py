"""What ran, over what was drawn: the measured timeline of one step and the simulation at its own mean costs.

The costs are means of the measured slots, so a difference between the two pictures is never a wrong guess of the
costs: it is jitter, a late message, or ranks that do not work at the same speed.
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


def measured(schedule: Schedule, played: Played, mesh: Mesh) -> Timeline | None:
    """The timeline of the first data rank's pipeline in ms, on rank 0; None elsewhere. Collective."""
    ahead = offset(mesh)
    rows = mesh.gather([(1e3 * (start + ahead), 1e3 * (end + ahead)) for _, start, end in played.timeline], "timelines")
    if mesh.rank:
        return None
    pipeline: list[list[tuple[float, float]]] = [rows[p * mesh.data_ranks] for p in range(mesh.pp)]  # type: ignore[misc]
    return replace(simulated.measured(schedule, pipeline), label="measured, ms")


def costs(timeline: Timeline) -> Costs:
    """The mean time of each kind of slot."""
    found: dict[str, list[float]] = {}
    for cell in (cell for row in timeline.cells for cell in row):
        found.setdefault("".join(sorted(op.kind for op in cell.slot)), []).append(cell.end - cell.start)
    means = {kinds: mean(times) for kinds, times in found.items()}
    return Costs(
        F=means.get("F", 0.0),
        I=means.get("I", 0.0),
        W=means.get("W", 0.0),
        B=means.get("B"),
        pairs={kinds: time for kinds, time in means.items() if kinds in PAIRS},
    )


def write(path: Path, timeline: Timeline) -> Sequence[Timeline]:
    """Draw the measured timeline and its simulation on one page, and give both."""
    price = costs(timeline)
    ideal = replace(simulated.simulate(timeline.schedule, price), label="simulated at the measured mean costs, ms")
    named = {"F": price.F, "B": price.B, "I": price.I, "W": price.W, **price.pairs}
    said = ", ".join(f"{kind} {time:.1f}" for kind, time in named.items() if time)
    path.write_text(as_html([timeline, ideal], f"mean times in ms: {said}"))
    return timeline, ideal
