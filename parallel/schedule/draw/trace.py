"""Timelines as a Chrome trace, for ui.perfetto.dev and chrome://tracing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from dryvine.parallel.schedule.notation import slot_text
from dryvine.parallel.schedule.simulate import Timeline

UNIT = 1000  # microseconds in a trace for one unit of time, so that fractions can be seen


def as_trace(timelines: Sequence[Timeline]) -> str:
    """A process per timeline, a thread per rank."""
    events = [event for pid, timeline in enumerate(timelines) for event in _events(pid, timeline)]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n"


def _events(pid: int, timeline: Timeline) -> Iterator[dict[str, object]]:
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
