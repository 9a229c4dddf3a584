"""The curves of the countdown demo: rewards and held-out questions of several seeds, beside their control.

    python -m benchmarks.rl_curves runs/countdown_seed_* --control .121 --out docs/figures/countdown.svg

`--control`: pass@1 of the control, as `rl.evaluate_only=true` says it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

from dryvine.trainer.run_rows import Figures, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTH = 5  # updates in a running mean of rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--control", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True)
    words = parser.parse_args()
    runs = {run.name: read(run) for run in words.runs}
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (rewards, held_out, shape) = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for name, rows in runs.items():
        rewards.plot(*_running_mean(rows, "reward"), lw=1.2, label=name)
        _with_interval(held_out, rows, name)
        shape.plot(*_running_mean(rows, "score.format"), lw=1.2)
        shape.plot(*_running_mean(rows, "entropy"), "--", lw=1)
    held_out.axhline(words.control, color="black", ls=":", lw=1.2, label="control: as much more fine-tuning")
    rewards.set(title=f"reward of training answers, mean of {SMOOTH} updates", xlabel="update", ylim=(0, None))
    held_out.set(title="held-out pass@1, 95% intervals", xlabel="update", ylim=(0, None))
    shape.set(title="format (line) and entropy in nats (dashed)", xlabel="update", ylim=(0, 1.05))
    for axes in (rewards, held_out):
        axes.legend(frameon=False, fontsize=8)
    for axes in (rewards, held_out, shape):
        axes.grid(alpha=0.2)
    figure.savefig(words.out)


def _running_mean(rows: list[Figures], name: str) -> tuple[list[float], list[float]]:
    known = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    means = [
        sum(value for _, value in known[max(0, i - SMOOTH + 1) : i + 1]) / min(i + 1, SMOOTH) for i in range(len(known))
    ]
    return [step for step, _ in known], means


def _with_interval(axes: Axes, rows: list[Figures], label: str) -> None:
    known = [row for row in rows if row.get("eval_pass_1") is not None]
    steps, middle = ([row[key] for row in known] for key in ("step", "eval_pass_1"))
    low, high = (
        [row["eval_pass_1"] - row["eval_pass_1_low"] for row in known],
        [row["eval_pass_1_high"] - row["eval_pass_1"] for row in known],
    )
    axes.errorbar(steps, middle, (low, high), fmt="o-", ms=3, lw=1.2, capsize=2, label=label)


if __name__ == "__main__":
    main()
