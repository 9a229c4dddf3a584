"""Timelines for programs: JSON with every figure and every slot's times, and a Chrome trace for Perfetto."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from dryvine.parallel.schedule.notation import slot_text
from dryvine.parallel.schedule.simulate import Timeline

UNIT = 1000  # microseconds in a trace for one unit of time, so that fractions can be seen


def figures(timeline: Timeline) -> dict[str, Any]:
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


def _entry(timeline: Timeline) -> dict[str, Any]:
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
    return {**figures(timeline), "routes": timeline.schedule.routes, "ranks": ranks}


def as_json(timelines: Sequence[Timeline]) -> str:
    """One object for one timeline, a list for several."""
    entries = [_entry(timeline) for timeline in timelines]
    return json.dumps(entries[0] if len(entries) == 1 else entries, indent=1) + "\n"


def as_trace(timelines: Sequence[Timeline]) -> str:
    """A process a timeline, a thread a rank: opens in ui.perfetto.dev and chrome://tracing."""
    events = [event for pid, timeline in enumerate(timelines) for event in _events(pid, timeline)]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n"


def _events(pid: int, timeline: Timeline) -> Iterator[dict[str, Any]]:
    title = f"{timeline.schedule.name} ({timeline.label})"
    yield {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": title}}
    for rank, row in enumerate(timeline.cells):
        yield {"ph": "M", "pid": pid, "tid": rank, "name": "thread_name", "args": {"name": f"rank {rank}"}}
        for cell in row:
            yield {
                "ph": "X",
                "pid": pid,
                "tid": rank,
                "name": " & ".join(f"{op.kind}{op.microbatch}" for op in cell.slot),
                "cat": "".join(op.kind for op in cell.slot),
                "ts": cell.start * UNIT,
                "dur": (cell.end - cell.start) * UNIT,
                "args": {"slot": slot_text(cell.slot), "stages": [op.stage for op in cell.slot]},
            }
