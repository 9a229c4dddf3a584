"""The report of one run, or of several side by side, as one self-contained page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from dryvine.launch.pages import plots
from dryvine.launch.pages.page import cards, heading, page, paragraph, picture, table
from dryvine.launch.pages.plots import Curve, Mark
from dryvine.launch.plan.hardware import GIGA
from dryvine.launch.plan.summary import large
from dryvine.launch.report.curves import curves, label
from dryvine.launch.report.reinforced import reinforced_parts
from dryvine.launch.report.runs import RunFolder
from dryvine.trainer.config import ConfigError
from dryvine.trainer.run_rows import FINITE, not_finite

NAMES = {"loss": "training", "val_loss": "validation", "val_loss_ema": "validation, averaged weights"}
MOST_EVENTS = 60  # rows of the table of events; plots have fewer marks


def report_page(runs: Sequence[RunFolder]) -> str:
    """The page of runs of one kind. Raises ConfigError if RL runs and pretraining runs are mixed."""
    kinds = {run.reinforced for run in runs}
    if len(kinds) > 1:
        raise ConfigError("runs of `dryvine rl` have other figures than those of `train`: compare runs of one kind")
    parts = reinforced_parts(runs) if kinds == {True} else _parts(runs)
    return page("Report of " + " and ".join(run.name for run in runs), parts)


def _parts(runs: Sequence[RunFolder]) -> Iterator[str]:
    for run in runs:
        p = run.config.parallel
        layout = f"pp {p.pp} x dp {p.dp} x ep {p.ep}, {p.schedule}, overlap {p.overlap}, {run.config.run.dtype}"
        yield paragraph(f"{run.name}: {layout}; {run.path}")
        yield cards(_figures(run))
    marks = _marks(runs[0]) if len(runs) == 1 else ()
    yield heading("Loss, nats per token")
    yield picture(plots.lines(_losses(runs), "step", "loss", marks), "training and validation loss by step")
    for title, column, unit in (
        ("Learning rate", "lr", "rate"),
        ("Speed", "tokens_per_second", "tokens/s"),
        ("Norm of the gradient", "grad_norm", "L2"),
    ):
        yield heading(title)
        yield picture(plots.lines(curves(runs, column), "step", unit, marks), f"{title} by step")
    yield from _shares(runs, marks)
    yield from _loads(runs)
    yield from _sensors(runs, marks)
    yield from _planned(runs)
    yield from _events(runs)


def _figures(run: RunFolder) -> dict[str, str]:
    """The most important figures. Rates are medians, so that the warm-up of the first steps does not count."""
    last = run.rows[-1]
    found = {"steps": f"{last['step']:,} of {run.config.run.steps:,}", "tokens": large(last["tokens"])}
    for name, title in NAMES.items():
        if known := run.known(name):
            now = "not finite" if not_finite(last, name) else f"{known[-1]:.3f}"
            found[f"{title} loss"] = f"{known[0]:.3f} to {now}"
    if rates := run.known("tokens_per_second"):
        found["tokens/s"] = f"{median(rates):,.0f}"
    if mfu := [value for value in run.mfu() if value is not None]:
        found["MFU"] = f"{median(mfu):.1%}"
    return found


def _losses(runs: Sequence[RunFolder]) -> dict[str, Curve]:
    found: dict[str, Curve] = {}
    for run in runs:
        for name in ("loss", *run.validations):
            title = NAMES.get(name) or f"validation, {name.removeprefix('val_loss').strip('._')}"
            found[label(runs, run, title)] = Curve(run.steps, run.column(name), name != "loss", gaps=name in FINITE)
    return found


def _shares(runs: Sequence[RunFolder], marks: Sequence[Mark]) -> Iterator[str]:
    """Bubble, exposed communication and MFU as shares of a step, beside the planned values."""
    shares = {
        **curves(runs, "bubble", "bubble, worst rank"),
        **curves(runs, "exposed_comm_share", "exposed all-to-all"),
    }
    for run in runs:
        if any(value is not None for value in run.mfu()):
            shares[label(runs, run, "MFU")] = Curve(run.steps, run.mfu())
        if run.plan:
            bubble = run.plan.timeline.bubble / run.plan.step_seconds
            ends = [run.steps[0], run.steps[-1]]
            shares[label(runs, run, "bubble, planned")] = Curve(ends, [bubble, bubble], dashed=True)
    yield heading("Shares of a step")
    yield picture(plots.lines(shares, "step", "share", marks), "bubble, exposed communication and MFU by step")


def _loads(runs: Sequence[RunFolder]) -> Iterator[str]:
    loads = {
        **curves(runs, "load_imbalance", "busiest expert over the mean"),
        **curves(runs, "rank_imbalance", "busiest rank over the mean"),
    }
    if not loads:
        return
    yield heading("Load of the experts")
    yield picture(plots.lines(loads, "step", "over the mean"), "imbalance of experts and ranks by step")
    for run in (run for run in runs if run.loads):
        means = [sum(layer) / len(layer) or 1.0 for layer in run.loads]
        shares = [[load / mean for load in layer] for layer, mean in zip(run.loads, means, strict=True)]
        drawn = plots.heat(shares, "expert", "MoE layer", "over the layer's mean")
        yield paragraph(
            f"{run.name}: tokens that chose each expert in the newest validated step, over its layer's mean"
        )
        yield picture(drawn, "load of every expert by layer")


def _sensors(runs: Sequence[RunFolder], marks: Sequence[Mark]) -> Iterator[str]:
    columns = {"watts": ("W", 1.0), "celsius": ("degrees C", 1.0), "peak_mbytes": ("GB", 1e-3)}
    titles = {"watts": "Power", "celsius": "Temperature", "peak_mbytes": "Memory, peak of the fullest GPU"}
    for column, (unit, scale) in columns.items():
        if measured := curves(runs, column, titles[column], scale):
            yield heading(titles[column])
            yield picture(plots.lines(measured, "step", unit, marks), f"{titles[column]} by step")


def _planned(runs: Sequence[RunFolder]) -> Iterator[str]:
    """Planned against measured, for runs whose config names its hardware."""
    rows = [row for run in runs for row in _against_plan(run)]
    yield heading("Planned and measured")
    for run in runs:
        if run.plan is None:
            yield paragraph(f"{run.name}: nothing was planned: {run.unplanned}.")
    if rows:
        yield table(["run", "", "planned", "measured", "measured / planned"], rows)


def _against_plan(run: RunFolder) -> Iterator[tuple[str, ...]]:
    plan = run.plan
    if plan is None:
        return
    pairs = {
        "step, s": (plan.step_seconds, "seconds"),
        "bubble of the worst rank, share": (plan.timeline.bubble / plan.step_seconds, "bubble"),
        "exposed all-to-all, share": (plan.exposed_seconds / plan.step_seconds, "exposed_comm_share"),
        "memory of the fullest rank, GB": (plan.fullest.total / GIGA, "peak_mbytes"),
    }
    for title, (planned, column) in pairs.items():
        known = [value / (1e3 if column == "peak_mbytes" else 1) for value in run.known(column)]
        found = max(known) if known and column == "peak_mbytes" else median(known) if known else None
        ratio = f"{found / planned:.2f}" if found is not None and planned else ""
        yield run.name, title, f"{planned:.4g}", "not measured" if found is None else f"{found:.4g}", ratio


def _events(runs: Sequence[RunFolder]) -> Iterator[str]:
    rows = [(run.name, str(event.step), event.what) for run in runs for event in run.events()]
    yield heading("Events")
    if len(rows) > MOST_EVENTS:
        yield paragraph(f"The last {MOST_EVENTS} of {len(rows)}.")
    yield table(["run", "after step", "what"], rows[-MOST_EVENTS:], text_last=True)


def _marks(run: RunFolder) -> list[Mark]:
    """Marks of restarts and of skipped steps; checkpoints are too many for plots."""
    return [Mark(e.step, e.kind) for e in run.events() if e.kind != "checkpoint" and e.step > 0][-20:]
