"""`dryvine watch`: a run's last figures in the terminal, as they are written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from dryvine.trainer.config import Config, recorded
from dryvine.trainer.run_rows import Figures, not_finite, read

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

SPARKS = " ▁▂▃▄▅▆▇█"
SHORTEST_SPARKS, LONGEST_SPARKS = 8, 40  # characters
BORDERS = 10  # columns that a table of three takes besides their text
RECENT = 20  # steps that rates are medians over
SHOWN = {
    "reward": "{:.4f}",
    "correct": "{:.1%}",
    "eval_pass_1": "{:.1%}",
    "eval_pass_k": "{:.1%}",
    "length": "{:,.1f}",
    "entropy": "{:.3f}",
    "mismatch_k3": "{:.2g}",
    "clip_fraction": "{:.1%}",
    "zero_variance": "{:.1%}",
    "unscored": "{:.1%}",
    "loss": "{:.4f}",
    "val_loss": "{:.4f}",
    "lr": "{:.3g}",
    "grad_norm": "{:.3g}",
    "tokens_per_second": "{:,.0f}",
    "bubble": "{:.1%}",
    "exposed_comm_share": "{:.1%}",
    "load_imbalance": "{:.2f}",
    "watts": "{:.0f}",
    "celsius": "{:.0f}",
    "peak_mbytes": "{:,.0f}",
}


def watch(path: Path, console: Console, every: float, once: bool) -> None:
    """Show the run until it has made its last step; once if the output is no terminal. Raises ConfigError where there
    is no run."""
    from rich.live import Live

    config = recorded(path)
    rows = read(path)
    if once or not console.is_terminal:  # what is not a terminal cannot be drawn over
        console.print(view(config, rows, _quiet(path), console.width))
        return
    with Live(view(config, rows, _quiet(path), console.width), console=console, refresh_per_second=4) as live:
        while not rows or rows[-1]["step"] < config.run.steps:
            time.sleep(every)
            rows = read(path)
            live.update(view(config, rows, _quiet(path), console.width))


def view(config: Config, rows: Sequence[Figures], quiet: float, width: int) -> RenderableType:
    """A table of the newest figures, each with a sparkline if `width` columns have room for it. `quiet`: seconds since
    the last row was written."""
    from rich.console import Group
    from rich.table import Table

    if not rows:
        return f"{config.run.name}: no step yet"
    last, recent = rows[-1], rows[-RECENT:]
    seconds = median(map(_seconds, recent)) / (config.rl.updates if config.rl else 1)
    left = timedelta(seconds=round(seconds * (config.run.steps - last["step"])))
    silent = quiet > 10 * seconds + 5 and last["step"] < config.run.steps
    late = f"; nothing for {quiet:.0f} s, a step takes {seconds:.0f}" if silent else ""
    title = f"{config.run.name}: step {last['step']:,} of {config.run.steps:,}, {left} to go{late}"
    known = {name: [row[name] for row in rows if row.get(name) is not None] for name in SHOWN}
    cells = {name: (SHOWN[name].format(some[-1]), some) for name, some in known.items() if some}
    cells |= {name: ("not finite", known[name]) for name in SHOWN if not_finite(last, name)}
    longest = max(map(len, cells), default=0), max((len(now) for now, _ in cells.values()), default=0)
    taken = sum(longest) + BORDERS
    room = min(LONGEST_SPARKS, width - taken)
    table = Table(*["", "now", "course"][: 3 if room >= SHORTEST_SPARKS else 2])
    table.columns[0].overflow = "fold"
    for name, (now, some) in cells.items():
        table.add_row(name, now, *([sparks(some, room)] if room >= SHORTEST_SPARKS else []))
    return Group(title, table)


def _seconds(row: Figures) -> float:
    """Seconds of a row: of a step, or of all parts of a rollout; 0 for a row that only evaluates."""
    parts = [row["seconds"]] if "seconds" in row else [row[name] for name in row if name.startswith("seconds_")]
    return float(sum(part for part in parts if part is not None))


def sparks(values: Sequence[float], width: int = LONGEST_SPARKS) -> str:
    """A sparkline: means over equal parts, scaled from the least to the largest; empty without values."""
    if not values:
        return ""
    parts = min(width, len(values))
    means = []
    for part in range(parts):
        some = values[part * len(values) // parts : (part + 1) * len(values) // parts]
        means.append(sum(some) / len(some))
    low, high = min(means), max(means)
    span = high - low or 1.0
    return "".join(SPARKS[1 + round((value - low) / span * (len(SPARKS) - 2))] for value in means)


def _quiet(path: Path) -> float:
    rows = path / "metrics.jsonl"
    return time.time() - rows.stat().st_mtime if rows.exists() else 0.0
