"""The training loop: resume, step, measure, validate, save, leave cleanly.

SIGINT and SIGTERM only set a flag. All ranks agree on it at the end of a step, inside the one reduction that the
metrics need anyway, then save and leave; a rank that left on its own would hang the others in their next collective.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dryvine.comm.mesh import Mesh
from dryvine.comm.topology import Topology
from dryvine.parallel.executor import Played
from dryvine.trainer import checkpoint
from dryvine.trainer.config import RunConfig
from dryvine.trainer.data.splits import Data
from dryvine.trainer.journal import Journal, MetricsRow, read
from dryvine.trainer.metrics import metrics_row, reduce_figures
from dryvine.trainer.nonfinite import Diverged, NonfiniteStep, blame, diverged_line
from dryvine.trainer.ramps import Point, points
from dryvine.trainer.rehearse import rehearse, report_loads
from dryvine.trainer.report import final_table
from dryvine.trainer.rig import Rig, make_rig
from dryvine.trainer.run_plan import RunPlan
from dryvine.trainer.startup import startup_lines
from dryvine.trainer.step import evaluate, evaluate_average, train_step
from dryvine.trainer.timeline import measured, write


@dataclass
class Stop:
    """Set by a signal; the loop looks at it between steps."""

    asked: bool = False

    @contextmanager
    def on_signals(self) -> Iterator[Stop]:
        def ask(number: int, frame: object) -> None:
            self.asked = True

        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train(plan: RunPlan, mesh: Mesh, data: Data, topology: Topology | None = None) -> None:
    """Train to `run.steps`, from the newest checkpoint of the run folder if it has one. Raises Diverged. Collective."""
    config, run = plan.config, plan.config.run
    rig = make_rig(plan, mesh, data, topology)
    console = Console(quiet=mesh.rank != 0)
    done = resume(rig, console)
    if mesh.device.type == "cuda":
        rehearse(rig)
        report_loads(mesh.rank)
    for line in startup_lines(rig, topology, done):
        console.print(line)
    journal = Journal(config, plan.schedule, done) if mesh.rank == 0 else None
    nonfinite: list[NonfiniteStep] = []  # in a row, up to now
    with Stop().on_signals() as stop, _progress(console) as bar:
        task = bar.add_task(run.name, total=run.steps, completed=done, loss=float("nan"))
        for point in islice(points(config.batch, config.data.seq_len), done, run.steps):
            step = one_step(rig, point, stop, len(nonfinite))
            nonfinite = [*nonfinite, step.nonfinite] if step.nonfinite else []
            _record(step, console, journal)
            if len(nonfinite) == config.optim.skips:
                break
            bar.update(task, advance=1, loss=step.row.loss)
            if step.stop or step.row.step % run.checkpoint_every == 0 or step.row.step == run.steps:
                save(rig, step.row.step)
            if step.stop:
                console.print(f"stopped by a signal after step {step.row.step}; the same command goes on from there")
                break
    if journal:
        journal.close()
    if len(nonfinite) == config.optim.skips:
        raise Diverged(diverged_line(nonfinite))
    if journal:
        console.print(final_table(config, read(run.folder)))


@dataclass(frozen=True)
class LoopStep:
    """What the loop knows of a step, the same on every rank."""

    row: MetricsRow
    nonfinite: NonfiniteStep | None  # the step updated nothing
    stop: bool  # a signal asked a rank to stop


def one_step(rig: Rig, point: Point, stop: Stop, nonfinite_before: int = 0) -> LoopStep:
    """Train, measure, and validate if it is time. `nonfinite_before`: how many steps just before this one updated
    nothing. Collective."""
    started = time.perf_counter()
    outcome = train_step(rig, point)
    seconds = time.perf_counter() - started
    nonfinite = None if outcome.finite else blame(point, outcome.played, rig.optimizer.zero, rig.mesh)
    if point.step + 1 == rig.config.run.timeline_step:
        _draw_timeline(rig, point, outcome.played)
    figures = reduce_figures(rig, outcome.played, seconds, stop.asked)
    row = replace(metrics_row(rig, point, outcome, figures), skipped=nonfinite_before + 1 if nonfinite else 0)
    if _validates(rig.config.run, row.step):
        row = replace(row, val_loss=evaluate(rig), val_loss_ema=evaluate_average(rig))
    return LoopStep(row, nonfinite, figures.stop)


def _validates(run: RunConfig, step: int) -> bool:
    return step in (1, run.steps) or step % run.eval_every == 0


def _record(step: LoopStep, console: Console, journal: Journal | None) -> None:
    if journal:
        journal.write(step.row)
    if step.nonfinite:
        console.print(str(step.nonfinite), markup=False)
        if journal:
            step.nonfinite.append_to(journal.folder)


def _draw_timeline(rig: Rig, point: Point, played: Played) -> None:
    if timeline := measured(rig.plan.training[point.sequences].schedule, played, rig.mesh):
        write(rig.config.run.folder / "timeline.html", timeline)


def save(rig: Rig, step: int) -> Path:
    run = rig.config.run
    return checkpoint.save(run.folder, step, rig.optimizer.state(), rig.model.buffers, run.keep_checkpoints, rig.mesh)


def resume(rig: Rig, console: Console) -> int:
    """Load the newest checkpoint of the run folder, if any. Returns the steps done. Collective."""
    newest = checkpoint.latest(rig.config.run.folder)
    if newest is None:
        return 0
    loaded = checkpoint.load(newest, rig.optimizer.state(), rig.model.buffers, rig.mesh, optional=("ema",))
    rig.publish()
    if rig.optimizer.ema and "ema" in loaded.missing:
        rig.optimizer.ema.restart()
        start = f"optim.ema starts from the weights of step {loaded.step}"
        console.print(f"{newest} has no average of the weights: {start}")
    return loaded.step


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=console.quiet)
