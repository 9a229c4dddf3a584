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
from dryvine.parallel.schedule.costs import PAIRS, Costs
from dryvine.parallel.schedule.draw_html import as_html
from dryvine.parallel.schedule.ir import Schedule
from dryvine.parallel.schedule.simulate import Cell, Timeline, simulate


def measured(schedule: Schedule, played: Played, mesh: Mesh) -> Timeline | None:
    """The timeline of the first data rank's pipeline in ms, on rank 0; None elsewhere. Collective."""
    ahead = offset(mesh)
    rows = mesh.gather([(slot, start + ahead, end + ahead) for slot, start, end in played.timeline])
    if mesh.rank:
        return None
    pipeline: list[list] = [rows[p * mesh.data_ranks] for p in range(mesh.pp)]  # type: ignore[misc]
    first = min(start for row in pipeline for _, start, _ in row)
    cells = tuple(tuple(Cell(s, 1e3 * (a - first), 1e3 * (b - first)) for s, a, b in row) for row in pipeline)
    return Timeline(schedule, cells, "measured, ms")


def costs(timeline: Timeline) -> Costs:
    """The mean time of each kind of slot. A backward that is never split counts as two parts I to one part W."""
    found: dict[str, list[float]] = {}
    for cell in (cell for row in timeline.cells for cell in row):
        found.setdefault("".join(sorted(op.kind for op in cell.slot)), []).append(cell.end - cell.start)
    means = {kinds: mean(times) for kinds, times in found.items()}
    whole = means.get("B", 0.0)
    return Costs(
        F=means.get("F", 0.0),
        I=means.get("I", whole * 2 / 3),
        W=means.get("W", whole / 3),
        pairs={kinds: time for kinds, time in means.items() if kinds in PAIRS},
    )


def write(path: Path, timeline: Timeline) -> Sequence[Timeline]:
    """Draw the measured timeline and its simulation on one page, and give both."""
    price = costs(timeline)
    ideal = replace(simulate(timeline.schedule, price), label="simulated at the measured mean costs, ms")
    said = ", ".join(f"{k} {v:.1f}" for k, v in (("F", price.F), ("I", price.I), ("W", price.W), *price.pairs.items()))
    path.write_text(as_html([timeline, ideal], f"mean times in ms: {said}"))
    return timeline, ideal
