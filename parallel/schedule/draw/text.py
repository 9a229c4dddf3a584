"""A timeline for the terminal: one line a rank, width in proportion to time, broken into systems like sheet music.

Plain characters carry everything (kind, microbatch, pair, idle); colour, if the terminal has it, only repeats it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dryvine.parallel.schedule.draw.style import fill, hues, ink, label, passes
from dryvine.parallel.schedule.simulate import Cell, Timeline

IDLE = "\N{MIDDLE DOT}"
LEGEND = f"|F0 forward of microbatch 0, B backward, I its input half, W its weight half, & pair, {IDLE} idle"


class ColouredText(NamedTuple):
    """A run of characters and its colours (background, foreground), None for the terminal's own."""

    text: str
    colours: tuple[str, str] | None = None


Line = list[ColouredText]


def lines(timeline: Timeline, width: int = 100) -> list[Line]:
    """The drawing in lines of at most `width` characters."""
    scale = _scale(timeline)
    name = len(f"rank {len(timeline.cells) - 1} ")
    rows = [_row(timeline, rank, scale) for rank in range(len(timeline.cells))]
    system, total = max(width - name, 20), max(sum(len(run.text) for run in row) for row in rows)
    out: list[Line] = [[ColouredText(_headline(timeline))], []]
    for start in range(0, total, system):
        stop = min(start + system, total)
        out.append([ColouredText("time".ljust(name) + _axis(start, stop, scale))])
        out += [[ColouredText(f"rank {r}".ljust(name)), *_cut(row, start, stop)] for r, row in enumerate(rows)]
        out.append([])
    return [*out, [ColouredText(LEGEND)]]


def text(timeline: Timeline, width: int = 100) -> str:
    return "\n".join("".join(run.text for run in line).rstrip() for line in lines(timeline, width)) + "\n"


def _headline(timeline: Timeline) -> str:
    s = timeline.schedule
    return f"{s.name}: {len(s.ranks)} ranks, {s.microbatches} microbatches, {timeline.label}\n{timeline.figures}"


def _scale(timeline: Timeline) -> float:
    """Characters per unit of time, so that the shortest op's label fits."""
    numbers = passes(timeline.schedule)
    longest = max(len(label(op, numbers)) for row in timeline.cells for cell in row for op in cell.slot)
    shortest = min(cell.end - cell.start for row in timeline.cells for cell in row if cell.end > cell.start)
    return (longest + 1) / shortest


def _row(timeline: Timeline, rank: int, scale: float) -> Line:
    """All of a rank's time in one line, before it is cut into systems."""
    schedule = timeline.schedule
    numbers, hue = passes(schedule), hues(schedule)
    row, at = list[ColouredText](), 0
    for cell in timeline.cells[rank]:
        # Columns are rounded from the times themselves, so that no error adds up along the row.
        start, end = round(cell.start * scale), round(cell.end * scale)
        if start > at:
            row.append(ColouredText(IDLE * (start - at)))
        lead = cell.slot[0]
        colours = (fill(lead.kind, hue[lead.route, lead.stage]), ink(lead.kind))
        row.append(ColouredText(_cell(cell, numbers, end - max(start, at)), colours))
        at = max(end, at)
    row.append(ColouredText(IDLE * (round(timeline.span * scale) - at)))
    return row


def _cell(cell: Cell, numbers: dict[tuple[int, int], int], width: int) -> str:
    return ("|" + "&".join(label(op, numbers) for op in cell.slot)).ljust(width)[:width]


def _cut(row: Line, start: int, stop: int) -> Iterator[ColouredText]:
    """Columns `start` to `stop` of a row."""
    at = 0
    for run in row:
        part = run.text[max(0, start - at) : max(0, stop - at)]
        at += len(run.text)
        if part:
            yield ColouredText(part, run.colours)


def _axis(start: int, stop: int, scale: float) -> str:
    """Times over the columns where they fall, at round steps far enough apart to be read."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**9) if s * scale >= 12)
    marks = [" "] * (stop - start + 8)
    for tick in range(0, int(stop / scale) + 1, step):
        column = round(tick * scale) - start
        if 0 <= column < stop - start:
            marks[column : column + len(str(tick))] = str(tick)
    return "".join(marks).rstrip()
