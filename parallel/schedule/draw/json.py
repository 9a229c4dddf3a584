"""Timelines for programs: JSON with every figure and every slot's times."""

from __future__ import annotations

import json
from collections.abc import Sequence

from dryvine.parallel.schedule.notation import slot_text
from dryvine.parallel.schedule.simulate import Timeline


def _figures(timeline: Timeline) -> dict[str, object]:
    """`bubble`: idle time of the worst rank; `peak_activations`: microbatch-chunks; `params_per_rank`: stages."""
    schedule = timeline.schedule
    return {
        "name": schedule.name,
        "label": timeline.label,
        "pp": len(schedule.ranks),
        "microbatches": schedule.microbatches,
        "stages": schedule.stages,
        "span": timeline.span,
        "bubble": timeline.bubble,
        "bubble_fraction": timeline.bubble_fraction,
        "peak_activations": timeline.peak_activations,
        "overlapped_share": timeline.overlapped_share,
        "params_per_rank": timeline.params_per_rank,
    }


def _entry(timeline: Timeline) -> dict[str, object]:
    ranks = [
        {
            "rank": rank,
            "stages": timeline.schedule.stages_of(rank),
            "idle": timeline.idle(rank),
            "peak_activations": timeline.held(rank),
            "slots": [{"slot": slot_text(c.slot), "start": c.start, "end": c.end} for c in row],
        }
        for rank, row in enumerate(timeline.cells)
    ]
    return {**_figures(timeline), "routes": timeline.schedule.routes, "ranks": ranks}


def as_json(timelines: Sequence[Timeline]) -> str:
    """One object for one timeline, a list for several."""
    entries = [_entry(timeline) for timeline in timelines]
    return json.dumps(entries[0] if len(entries) == 1 else entries, indent=1) + "\n"
