"""A column of figures as curves, one for each run that has it."""

from __future__ import annotations

from collections.abc import Sequence

from dryvine.launch.pages.plots import Curve
from dryvine.launch.report.runs import RunFolder
from dryvine.trainer.run_rows import FINITE


def curves(runs: Sequence[RunFolder], column: str, title: str = "", scale: float = 1.0) -> dict[str, Curve]:
    """Curves by run name. The columns `column`_low and `column`_high become a band."""
    return {
        label(runs, run, title or column): Curve(
            run.steps, [v and v * scale for v in run.column(column)], band=_band(run, column), gaps=column in FINITE
        )
        for run in runs
        if run.known(column)
    }


def label(runs: Sequence[RunFolder], run: RunFolder, title: str) -> str:
    return title if len(runs) == 1 else f"{run.name}: {title}"


def _band(run: RunFolder, column: str) -> tuple[list[float | None], list[float | None]] | None:
    ends = run.column(f"{column}_low"), run.column(f"{column}_high")
    return ends if any(value is not None for value in ends[0]) else None
