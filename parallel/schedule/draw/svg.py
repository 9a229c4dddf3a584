"""A timeline as an SVG that needs nothing round it: its own panel and fonts, light or dark as the reader's system is.

A pair is one cell in two parts, the first op above the second. Hand-written because a plot library's SVG is ten times
as long, has no dark mode, and cannot carry the tooltips that the HTML page hangs on the same cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from dryvine.parallel.schedule.draw.style import HUES, NAMES, fill, hue_names, hues, ink
from dryvine.parallel.schedule.ir import Op
from dryvine.parallel.schedule.notation import op_text
from dryvine.parallel.schedule.simulate import Cell, Timeline

ROW, GAP, LEFT, TOP, MARGIN = 34, 5, 66, 74, 22  # pixels: a rank's height, between ranks, grid's corner, margin
FONT = "Inter,'Segoe UI',Helvetica,Arial,sans-serif"


@dataclass(frozen=True)
class _Frame:
    """Where time and ranks fall on the paper."""

    scale: float  # pixels per unit of time
    span: float
    ranks: int

    def x(self, time: float) -> float:
        return LEFT + time * self.scale

    def y(self, rank: int) -> float:
        return TOP + rank * (ROW + GAP)

    @property
    def floor(self) -> float:
        return self.y(self.ranks) - GAP

    @property
    def right(self) -> float:
        return self.x(self.span)


def svg(timeline: Timeline, among: Sequence[Timeline] = (), prefix: str = "") -> str:
    """One SVG document, on the scale and span that it shares with those `among` which it is shown. With `prefix`, every
    op gets the id prefix + its text (t0-2F3), for a page that adds tooltips."""
    frame = _frame(timeline, among or (timeline,))
    schedule = timeline.schedule
    hue = hues(schedule)
    cells = [_cell(frame, rank, cell, hue, prefix) for rank, row in enumerate(timeline.cells) for cell in row]
    legend = list(_legend(frame, timeline))
    width, height = max(frame.right + MARGIN, 760), frame.floor + 40 + 26 * len(hue_names(schedule)) + MARGIN / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="{FONT}" role="img" aria-label="{escape(schedule.name)} schedule">',
        _style(len(hue_names(schedule))),
        f'<rect class="panel" x=".5" y=".5" width="{width - 1:.0f}" height="{height - 1:.0f}" rx="12"/>',
        *_headline(timeline),
        *_tracks(frame),
        *cells,
        *_axis(frame),
        *legend,
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _frame(timeline: Timeline, among: Sequence[Timeline]) -> _Frame:
    """About 1200 pixels wide, and wider where the shortest op would be under 6 pixels, but not over 4000."""
    span = max(each.span for each in among)
    shortest = min(c.end - c.start for each in among for row in each.cells for c in row if c.end > c.start)
    return _Frame(min(max(1200 / span, 6 / shortest), 4000 / span), span, len(timeline.cells))


def _style(count: int) -> str:
    kinds = "".join(
        f".{kind}{h}{{fill:{fill(kind, h) if kind != 'W' else f'url(#w{h})'}}}" for h in range(count) for kind in "FBIW"
    )
    inks = "".join(f".t{kind}{{fill:{ink(kind)}}}" for kind in "FBIW")
    hatches = "".join(
        f'<pattern id="w{h}" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<rect width="5" height="5" fill="{HUES[h % len(HUES)].weight}"/>'
        f'<rect width="1.4" height="5" fill="{HUES[h % len(HUES)].forward}"/></pattern>'
        for h in range(count)
    )
    return (
        f"<defs>{hatches}</defs><style>{kinds}{inks}.n{{font-size:10.5px;font-weight:600;text-anchor:middle}}"
        ".panel{fill:#fff;stroke:#d0d7de}.track{fill:#f0f2f5}.tick{stroke:#d0d7de}.ink{fill:#1f2328}.dim{fill:#59636e}"
        ".title{font-size:19px;font-weight:700}.sub{font-size:13px}.rank{font-size:13px;text-anchor:end}"
        ".time{font-size:12px;text-anchor:middle}@media(prefers-color-scheme:dark){.panel{fill:#0d1117;stroke:#30363d}"
        ".track{fill:#1b222b}.tick{stroke:#30363d}.ink{fill:#f0f6fc}.dim{fill:#9198a1}}</style>"
    )


def _headline(timeline: Timeline) -> Iterator[str]:
    s = timeline.schedule
    title = f"{escape(s.name)}  \N{MIDDLE DOT}  {len(s.ranks)} ranks, {s.microbatches} microbatches"
    yield f'<text class="ink title" x="{MARGIN}" y="34">{title}</text>'
    yield f'<text class="dim sub" x="{MARGIN}" y="56">{escape(timeline.label)}: {escape(timeline.figures)}</text>'


def _tracks(frame: _Frame) -> Iterator[str]:
    for rank in range(frame.ranks):
        y = frame.y(rank)
        yield f'<rect class="track" x="{LEFT}" y="{y}" width="{frame.right - LEFT:.2f}" height="{ROW}" rx="3"/>'
        yield f'<text class="dim rank" x="{LEFT - 10}" y="{y + ROW / 2 + 4.5}">rank {rank}</text>'


class _Box(NamedTuple):
    """A rectangle, in pixels."""

    x: float
    y: float
    width: float
    height: float


def _cell(frame: _Frame, rank: int, cell: Cell, hue: dict[tuple[int, int], int], prefix: str) -> str:
    """The ops of a slot, one above the other on their rank's track."""
    x, y = frame.x(cell.start), frame.y(rank)
    width, height = (cell.end - cell.start) * frame.scale, ROW / len(cell.slot)
    boxes = [_Box(x, y + i * height, width, height) for i in range(len(cell.slot))]
    return "".join(_op(op, box, hue[op.route, op.stage], prefix) for op, box in zip(cell.slot, boxes, strict=True))


def _op(op: Op, box: _Box, hue: int, prefix: str) -> str:
    """The op's rectangle and, where it fits, its microbatch. The pixel left free parts it from its neighbour."""
    number, (x, y, width, height) = str(op.microbatch), box
    small = height < ROW
    mark = f' id="{prefix}{op_text(op)}"' if prefix else ""
    rectangle = (
        f'<rect class="{op.kind}{hue}"{mark} x="{x:.2f}" y="{y:.1f}" width="{max(width - 1, 0.5):.2f}" '
        f'height="{height - (0.6 if small else 0):.1f}" rx="{2 if small else 3}"/>'
    )
    if len(number) * 6.4 > width - 1:
        return rectangle
    middle = f'x="{x + (width - 1) / 2:.2f}" y="{y + height / 2 + 4:.1f}"'
    return f'{rectangle}<text class="n t{op.kind}" {middle}>{number}</text>'


def _axis(frame: _Frame) -> Iterator[str]:
    steps = (m * 10.0**e for e in range(-6, 12) for m in (1, 2, 5))
    step = next(s for s in steps if s * frame.scale >= 55)
    for i in range(int(frame.span / step + 1e-9) + 1):
        x = frame.x(i * step)
        yield f'<path class="tick" d="M{x:.2f} {frame.floor + 4}v6"/>'
        yield f'<text class="dim time" x="{x:.2f}" y="{frame.floor + 24}">{i * step:g}</text>'
    yield f'<text class="dim rank" x="{LEFT - 10}" y="{frame.floor + 24}">time</text>'


def _legend(frame: _Frame, timeline: Timeline) -> Iterator[str]:
    """A line a hue with the kinds that occur; the pair is explained once."""
    schedule = timeline.schedule
    kinds = [k for k in NAMES if any(op.kind == k for rank in range(frame.ranks) for op in schedule.ops(rank))]
    for hue, name in enumerate(hue_names(schedule)):
        x, y = float(LEFT), frame.floor + 52 + 26 * hue
        if name:
            yield f'<text class="ink sub" x="{x}" y="{y + 5}">{escape(name)}</text>'
            x += 130
        for kind in kinds:
            yield f'<rect class="{kind}{hue}" x="{x}" y="{y - 9}" width="22" height="18" rx="3"/>'
            yield f'<text class="n t{kind}" x="{x + 11}" y="{y + 4}">{kind}</text>'
            yield f'<text class="dim sub" x="{x + 29}" y="{y + 4.5}">{NAMES[kind]}</text>'
            x += 46 + 7.0 * len(NAMES[kind])
        if hue == 0 and any(len(slot) > 1 for slots in schedule.ranks for slot in slots):
            yield from _pair_key(x, y, len(hue_names(schedule)))


def _pair_key(x: float, y: float, count: int) -> Iterator[str]:
    yield f'<rect class="F0" x="{x}" y="{y - 11}" width="34" height="10.5" rx="2"/>'
    yield f'<rect class="B{min(1, count - 1)}" x="{x}" y="{y}" width="34" height="10.5" rx="2"/>'
    words = "a pair: the messages of one under the work of the other"
    yield f'<text class="dim sub" x="{x + 41}" y="{y + 4.5}">{words}</text>'
