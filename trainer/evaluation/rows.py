"""The results of evaluations: eval.jsonl, a row for each task and model; eval.png, a run's figures over its steps.

Rows are only ever appended. If the same task was run with the same settings on the same step twice, the picture shows
the newer row; another file of the same name is another task.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

from dryvine.comm.integers import ceil_div
from dryvine.trainer.data.atomic import CannotWrite
from dryvine.trainer.intervals import Figure
from dryvine.trainer.run_rows import Figures, append_lines, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS, PICTURE = "eval.jsonl", "eval.png"
ACROSS = 3  # panels


@dataclass(frozen=True)
class EvalRow:
    """One result. `lines`: lines of the task's file that were asked; `settings`: everything beside the weights that
    can change a figure."""

    task: str
    model: str
    step: int | None  # of a run's checkpoint
    lines: int
    sha256: str
    settings: Mapping[str, object]
    figures: Mapping[str, Figure]

    @property
    def as_json(self) -> str:
        figures = {name: figure._asdict() for name, figure in self.figures.items()}
        return json.dumps(asdict(self) | {"figures": figures})


def keep(folder: Path, row: EvalRow) -> None:
    """Append a row to a folder's eval.jsonl. Raises CannotWrite."""
    append_lines(folder / ROWS, [row.as_json])


def draw(folder: Path) -> bool:
    """eval.png, of rows that have a step: a panel for each figure of each task. Returns whether there was any. Raises
    CannotWrite."""
    panels = _panels(read(folder, ROWS))
    if not panels:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    down = ceil_div(len(panels), ACROSS)
    size = (4.2 * min(ACROSS, len(panels)), 3.2 * down)
    figure, axes = pyplot.subplots(down, min(ACROSS, len(panels)), figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, ways) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, title, ways)
    figure.suptitle(folder.name)
    with CannotWrite.naming(folder / PICTURE):
        figure.savefig(folder / PICTURE, dpi=110)
    pyplot.close(figure)
    return True


Way = str  # how a task was asked, where it was asked in several ways
Panel = dict[Way, dict[int, Figures]]  # figures by step


def _panels(rows: Sequence[Figures]) -> dict[str, Panel]:
    panels: dict[str, Panel] = {}
    for row in rows:
        if row["step"] is not None:
            way = json.dumps([row["sha256"], row["settings"]], sort_keys=True)
            for name, figure in row["figures"].items():
                panels.setdefault(f"{row['task']}: {name}", {}).setdefault(way, {})[row["step"]] = figure
    return panels


def _panel(axis: Axes, title: str, ways: Panel) -> None:
    for number, by_step in enumerate(ways.values(), 1):
        steps = sorted(by_step)
        value, low, high = ([by_step[step][key] for step in steps] for key in Figure._fields)
        (line,) = axis.plot(steps, value, "o-", ms=3, lw=1, label=f"settings {number}")
        axis.fill_between(steps, low, high, alpha=0.15, color=line.get_color())
    axis.set(title=title, xlabel="step")
    axis.locator_params(axis="x", integer=True)
    axis.grid(alpha=0.2)
    if len(ways) > 1:
        axis.legend(frameon=False, fontsize=8)
