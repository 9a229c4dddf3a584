"""The formats of a picture. Each takes timelines; a new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dryvine.parallel.schedule.draw.html import as_html
from dryvine.parallel.schedule.draw.json import as_json
from dryvine.parallel.schedule.draw.svg import svg
from dryvine.parallel.schedule.draw.text import text
from dryvine.parallel.schedule.draw.trace import as_trace
from dryvine.parallel.schedule.notation import to_csv
from dryvine.parallel.schedule.rules import ScheduleError
from dryvine.parallel.schedule.simulate import Timeline


def _one(draw: Callable[[Timeline], str]) -> Callable[[Sequence[Timeline]], str]:
    def only(timelines: Sequence[Timeline]) -> str:
        if len(timelines) > 1:
            raise ScheduleError("this format shows one schedule; several fit in text, json, trace or html")
        return draw(timelines[0])

    return only


FORMATS: dict[str, Callable[[Sequence[Timeline]], str]] = {
    "text": lambda timelines: "\n".join(map(text, timelines)),
    "csv": _one(lambda timeline: to_csv(timeline.schedule)),
    "json": as_json,
    "svg": _one(svg),
    "trace": as_trace,
    "html": as_html,
}
