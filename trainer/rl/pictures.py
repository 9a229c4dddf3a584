"""The pictures of a run: rl.png, from metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

from dryvine.trainer.run_rows import Figures, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Each panel: its title, and the figures that it shows.
PANELS: dict[str, tuple[str, ...]] = {
    "reward": ("reward", "correct", "score.format"),
    "held out": ("eval_pass_1", "eval_greedy", "eval_pass_k"),
    "answer length, tokens": ("length", "longest"),
    "entropy, nats": ("entropy",),
    "sampler and trainer": ("mismatch_k3", "mismatch_logprob", "reference_k3"),
    "shares": ("zero_variance", "clip_fraction", "route_mismatch", "overlong", "unscored"),
}
LOGARITHMIC = ("sampler and trainer",)


def draw(folder: Path) -> None:
    """rl.png of a run folder; nothing if it has no rows."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read(folder)
    if not rows:
        return
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for panel, (title, names) in zip(axes.flat, PANELS.items(), strict=True):
        for name in names:
            _line(panel, rows, name)
        panel.set(title=title, xlabel="update", yscale="log" if title in LOGARITHMIC else "linear")
        panel.grid(alpha=0.2)
        if panel.lines:
            panel.legend(frameon=False, fontsize=8)
    figure.suptitle(folder.name)
    figure.savefig(folder / "rl.png", dpi=110)
    pyplot.close(figure)


def _line(panel: Axes, rows: list[Figures], name: str) -> None:
    """One curve. A column that is 0 everywhere is left out: a logarithmic axis cannot show it."""
    known = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if known and any(value for _, value in known):
        marker = "o-" if name.startswith("eval_") else "-"
        (line,) = panel.plot(*zip(*known, strict=True), marker, ms=3, lw=1, label=name)
        banded = [row for row in rows if row.get(f"{name}_low") is not None]
        if banded:
            steps, low, high = ([row[key] for row in banded] for key in ("step", f"{name}_low", f"{name}_high"))
            panel.fill_between(steps, low, high, alpha=0.15, color=line.get_color())
