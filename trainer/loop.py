"""The training loop: resume, step, measure, validate, save, exit cleanly.

Signals only set a flag (`stop.py`). All ranks agree on it at the end of a step, inside the one reduction that the
metrics need anyway, then save and exit; a rank that exited on its own would hang the others in their next collective.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from rich.console import Console

from dryvine.comm.mesh import Mesh
from dryvine.comm.topology import Topology
from dryvine.parallel.executor import Played
from dryvine.trainer.begin import resume
from dryvine.trainer.checkpoint import attempts, run_folder
from dryvine.trainer.config import RunConfig
from dryvine.trainer.data.splits import Data
from dryvine.trainer.journal import Journal, MetricsRow
from dryvine.trainer.metrics import metrics_row, reduce_figures
from dryvine.trainer.nonfinite import Diverged, NonfiniteStep, blame, diverged_line
from dryvine.trainer.ramps import Point, points, sequences_before
from dryvine.trainer.report import final_table
from dryvine.trainer.rig import Rig, make_rig
from dryvine.trainer.run_bar import run_bar
from dryvine.trainer.run_plan import RunPlan
from dryvine.trainer.run_rows import read
from dryvine.trainer.saves import Saves
from dryvine.trainer.spikes import STRIKES, LossSpike, Rollback, SpikeWatch, passing_over, rollbacks, write_down
from dryvine.trainer.startup import get_ready
from dryvine.trainer.step import evaluate, evaluate_average, train_step
from dryvine.trainer.stop import Stop
from dryvine.trainer.timeline import gather_timeline, write


def train(plan: RunPlan, mesh: Mesh, data: Data, topology: Topology | None = None) -> bool:
    """Train to `run.steps`, from the newest checkpoint of the run folder if it has one. Returns False if a signal
    stopped it earlier, after a save. Raises Diverged and CheckpointError. Collective."""
    config, run = plan.config, plan.config.run
    rig = make_rig(plan, mesh, data, topology)
    console = Console(quiet=mesh.rank != 0)
    done = resume(rig, console)
    get_ready(rig, topology, console, done)
    last = _past_spikes(rig, console, done)
    if last and last.step < run.steps:
        console.print(f"stopped by a signal after step {last.step}; the same command goes on from there")
        return False
    if mesh.rank == 0:
        console.print(final_table(config, read(run.folder)))
    if last and not math.isfinite(last.loss + (last.val_loss or 0.0)):
        raise Diverged(f"step {last.step}, the last, has a loss that is not finite; lower optim.lr")
    return True


def _past_spikes(rig: Rig, console: Console, done: int) -> MetricsRow | None:
    """Train, rolling back after each loss spike (`spikes`). Raises Diverged if they recur from the same checkpoint."""
    strikes: list[int] = []  # steps of the checkpoints rolled back to
    while True:
        try:
            return _until_spike(rig, console, done)
        except LossSpike as spike:
            back = _roll_back(rig, console, spike)
            strikes = [*strikes, back] if back in strikes else [back]
            if len(strikes) == STRIKES:
                raise Diverged(f"{spike}, as {STRIKES - 1} times before after step {back}; lower optim.lr") from None
            done = resume(rig, console)


def _roll_back(rig: Rig, console: Console, spike: LossSpike) -> int:
    """Record which data is skipped. Returns the step of the checkpoint to resume from."""
    config, point = rig.config, spike.point
    newest = cast(list[Path | None], rig.mesh.gather(run_folder.newest(config.run.folder), "the newest checkpoint"))[0]
    if newest is None:
        raise Diverged(f"{spike}, and there is no checkpoint to go back to: lower run.checkpoint_every")
    step = run_folder.step_of(newest)
    before = sequences_before(config.batch, config.data.seq_len, step)
    first, given_up = before + point.passed_over, point.first + point.sequences - before
    back = Rollback(point.step + 1, spike.loss, spike.usual, step, first, given_up)
    console.print(f"{spike}: {back}", markup=False)
    attempts.keep_only(config.run, rig.mesh)  # a restart would resume from the steps that are discarded here
    if rig.mesh.rank == 0:
        write_down(config.run.folder, back)
    rig.mesh.barrier("writing down a rollback")
    return step


def _until_spike(rig: Rig, console: Console, done: int) -> MetricsRow | None:
    """`_steps` with new savers and a new journal. Raises LossSpike."""
    saves = Saves(rig, rig.state, console)
    journal = Journal(rig.config, rig.plan.schedule, done) if rig.mesh.rank == 0 else None
    try:
        return _steps(rig, saves, journal, console, done)
    finally:
        if journal:
            journal.close()


def _steps(rig: Rig, saves: Saves, journal: Journal | None, console: Console, done: int) -> MetricsRow | None:
    """Run the steps after `done`, to the last or to a signal, and finish the last checkpoint. Returns the row of the
    last step run; None if there was none left. Raises LossSpike and Diverged."""
    config, run = rig.config, rig.config.run
    nonfinite: list[NonfiniteStep] = []  # consecutive, up to the present step
    spikes, spike = SpikeWatch(run.spike_factor), None
    past = cast(list[list[Rollback]], rig.mesh.gather(rollbacks(run.folder), "rollbacks"))[0]
    every = passing_over(points(config.batch, config.data.seq_len), past)
    step = None
    with Stop().on_signals() as stop, run_bar(console, "loss {task.fields[loss]:.3f}") as bar:
        task = bar.add_task(run.name, total=run.steps, completed=done, loss=float("nan"))
        for point in islice(every, done, run.steps):
            step = one_step(rig, point, stop, len(nonfinite), saves.busy)
            if spike := spikes.see(point, step.row.loss):
                break
            nonfinite = [*nonfinite, step.nonfinite] if step.nonfinite else []
            if len(nonfinite) == config.optim.skips:
                _record(step, None, console, journal)
                break
            _save_and_record(rig, saves, step, console, journal)
            bar.update(task, advance=1, loss=step.row.loss)
            if step.stop:
                break
        saves.close()
    rig.optimizer.zero.settle()  # no message is in flight when ranks exit
    if spike:
        raise spike
    if len(nonfinite) == config.optim.skips:
        raise Diverged(diverged_line(nonfinite))
    return step.row if step else None


@dataclass(frozen=True)
class LoopStep:
    """The result of a step, the same on every rank."""

    row: MetricsRow
    nonfinite: NonfiniteStep | None  # the step updated nothing
    stop: bool  # a signal asked a rank to stop
    saving: bool  # a rank is still writing its part of a checkpoint
    loads: torch.Tensor | None = None  # of experts, after a validation (`StepOutcome`)


def one_step(rig: Rig, point: Point, stop: Stop, nonfinite_before: int = 0, saving: bool = False) -> LoopStep:
    """Train, measure, and validate if due. `nonfinite_before`: how many steps just before this one were skipped;
    `saving`: this rank is still writing a checkpoint. Collective."""
    started = time.perf_counter()
    outcome = train_step(rig, point)
    seconds = time.perf_counter() - started
    nonfinite = None if outcome.finite else blame(point, outcome.played, rig.optimizer.zero, rig.mesh)
    if point.step + 1 == rig.config.run.timeline_step:
        _draw_timeline(rig, point, outcome.played)
    figures = reduce_figures(rig, outcome.played, seconds, stop.asked, saving)
    rig.integrity.check(point.step + 1, saves=figures.stop)
    row = replace(metrics_row(rig, point, outcome, figures), skipped=nonfinite_before + 1 if nonfinite else 0)
    if _validates(rig.config.run, row.step):
        found = evaluate(rig)
        row = replace(row, val_loss=found.loss, val_losses=found.by_source, val_loss_ema=evaluate_average(rig))
    loads = outcome.loads if row.val_loss is not None else None
    return LoopStep(row, nonfinite, figures.stop, figures.saving, loads)


def _validates(run: RunConfig, step: int) -> bool:
    return step in (1, run.steps) or step % run.eval_every == 0


def _save_and_record(rig: Rig, saves: Saves, step: LoopStep, console: Console, journal: Journal | None) -> None:
    stalled = None
    try:
        stalled = _save_if_due(rig.config.run, saves, step)
    finally:  # an error of a save ends the run, whose last row is still written
        _record(step, stalled, console, journal)


def _record(step: LoopStep, stalled: float | None, console: Console, journal: Journal | None) -> None:
    """`stalled`: milliseconds for which a save blocked training."""
    if journal:
        journal.write(replace(step.row, checkpoint_stall_ms=stalled))
        if step.loads is not None:
            journal.write_loads(step.row.step, step.loads.tolist())
    if step.row.graph_overflows:
        console.print(
            f"step {step.row.step}: more rows than parallel.graph_room has room for, in {step.row.graph_overflows} "
            "routings: the step was run again without graphs; if this stays, raise it",
            markup=False,
        )
    if step.nonfinite:
        console.print(str(step.nonfinite), markup=False)
        if journal:
            step.nonfinite.append_to(journal.folder)


def _draw_timeline(rig: Rig, point: Point, played: Played) -> None:
    if timeline := gather_timeline(rig.plan.training[point.sequences].schedule, played, rig.mesh):
        write(rig.config.run.folder / "timeline.html", timeline)


def _save_if_due(run: RunConfig, saves: Saves, step: LoopStep) -> float | None:
    """Returns the milliseconds for which training was blocked, None if there was nothing to do. Collective."""
    started, done = time.perf_counter(), step.row.step
    if not saves.after(done - 1, done, last=step.stop or done == run.steps, writing=step.saving):
        return None
    return 1e3 * (time.perf_counter() - started)
