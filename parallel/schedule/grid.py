"""The part of a schedule's grid round one slot, for error messages: what a person would otherwise open the file for."""

from __future__ import annotations

from dryvine.parallel.schedule.ir import Schedule
from dryvine.parallel.schedule.notation import op_text


def excerpt(schedule: Schedule, rank: int, column: int, reach: int = 3) -> str:
    """Slots `column - reach .. column + reach` of the ranks near `rank`, the slot in question between > and <."""
    columns = range(max(0, column - reach), column + reach + 1)
    ranks = range(max(0, rank - reach), min(len(schedule.ranks), rank + reach + 1))

    def cell(r: int, c: int) -> str:
        text = "&".join(map(op_text, schedule.ranks[r][c])) if c < len(schedule.ranks[r]) else ""
        return f">{text or '(nothing)'}<" if (r, c) == (rank, column) else f" {text} "

    rows = [["", *(f" {c}" for c in columns)]]
    rows += [[f"rank {r}", *(cell(r, c) for c in columns)] for r in ranks]
    widths = [max(map(len, column_cells)) for column_cells in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
