"""The training loop: resume, step, measure, validate, save, leave cleanly.

SIGINT and SIGTERM only set a flag. All ranks agree on it at the end of a step, inside the one reduction that the
metrics need anyway, then save and leave; a rank that left on its own would hang the others in their next collective.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dryvine.comm.mesh import Mesh
from dryvine.comm.topology import Topology
from dryvine.comm.watch import Watch
from dryvine.parallel.executor import Played
from dryvine.trainer import checkpoint
from dryvine.trainer.activations import activations
from dryvine.trainer.config import Config
from dryvine.trainer.journal import Journal, Row, read
from dryvine.trainer.nonfinite import Diverged, Skipped, blame, enough
from dryvine.trainer.ramps import Point, learning_rate, points
from dryvine.trainer.report import final_table
from dryvine.trainer.step import (
    Data,
    Rig,
    evaluate,
    evaluate_average,
    make_rig,
    make_schedule,
    routes_of_tokens,
    train_step,
)
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


def train(config: Config, mesh: Mesh, data: Data, topology: Topology | None = None, watch: Watch | None = None) -> None:
    """Train to `run.steps`, from the newest checkpoint of the run folder if there is one. Collective."""
    rig = make_rig(config, mesh, data, topology, watch)
    console = Console(quiet=mesh.rank != 0)
    done = resume(rig, console)
    for line in routes_of_tokens(config, mesh, topology) if topology else ():
        console.print(line)
    console.print(activations(config, mesh.device.type == "cuda"))
    if rig.fp8 is not None:
        console.print(rig.fp8.chosen)
    if done:
        console.print(f"resuming {config.run.folder} after step {done}")
    schedule = make_schedule(config, config.microbatches(config.batch.sequences))
    journal = Journal(config, schedule, done) if mesh.rank == 0 else None
    skips: list[Skipped] = []  # in a row, up to now
    with Stop().on_signals() as stop, _progress(console) as bar:
        task = bar.add_task(config.run.name, total=config.run.steps, completed=done, loss=float("nan"))
        for point in islice(points(config.batch, config.data.seq_len), done, config.run.steps):
            row, leave = one(rig, point, stop, skips)
            if journal:
                journal.write(row)
            if row.skipped:
                _tell(skips[-1], console, journal)
            if row.skipped == config.optim.skips:
                break
            bar.update(task, advance=1, loss=row.loss)
            if leave or row.step % config.run.checkpoint_every == 0 or row.step == config.run.steps:
                save(rig, row.step)
            if leave:
                console.print(f"stopped by a signal after step {row.step}; the same command goes on from there")
                break
    if journal:
        journal.close()
    if len(skips) == config.optim.skips:
        raise Diverged(enough(skips))
    if journal:
        console.print(final_table(config, read(config.run.folder)))


def one(rig: Rig, point: Point, stop: Stop, skips: list[Skipped]) -> tuple[Row, bool]:
    """A step with its metrics. Also tells whether any rank was asked to stop. `skips` gets the step if it was skipped,
    and is emptied if not."""
    config, step = rig.config, point.step + 1
    started = time.perf_counter()
    played, norm, even = train_step(rig, point)
    seconds = time.perf_counter() - started
    skips[:] = [] if math.isfinite(norm) else [*skips, blame(point, played, rig.optimizer.zero, rig.mesh)]
    if step == config.run.timeline_step:
        _draw_timeline(rig, point, played)
    sums, stopped, worst, seconds = _reduce(rig, played, stop.asked, seconds)
    microbatches = config.microbatches(point.sequences) * rig.mesh.data_ranks
    validate = step % config.run.eval_every == 0 or step == config.run.steps or point.step == 0
    tokens = point.sequences * config.data.seq_len
    row = Row(
        step=step,
        tokens=point.tokens + tokens,
        loss=sums["loss"] / microbatches,
        val_loss=evaluate(rig) if validate else None,
        val_loss_ema=evaluate_average(rig) if validate else None,
        lr=learning_rate(config.optim, point, config.data.seq_len),
        grad_norm=norm,
        skipped=len(skips),
        tokens_per_second=tokens / seconds,
        bubble=worst,
        overlapped_share=sums["paired"] / sums["forwards"] if config.parallel.overlap == "on" else 0.0,
        exposed_comm_ms=1e3 * sums["exposed"] / rig.mesh.size,
        exposed_comm_share=sums["exposed"] / rig.mesh.size / seconds,
        slowest_rank_ms=1e3 * sums["waited"],
        mtp_loss=sums["mtp"] / microbatches if config.model.mtp_depth else None,
        balance_loss=sums["balance"] / microbatches if config.model.balance_alpha else None,
        load_imbalance=even.experts,
        rank_imbalance=even.ranks,
        mbytes_inside_nodes=sums["intra"] / 1e6,
        mbytes_between_nodes=sums["inter"] / 1e6,
        fp8_bad_tiles=sums["bad"] if sums["tiles"] else None,
        fp8_floored_share=sums["floored"] / sums["tiles"] if sums["tiles"] else None,
        seconds=seconds,
    )
    return row, stopped


def _tell(skipped: Skipped, console: Console, journal: Journal | None) -> None:
    console.print(str(skipped), markup=False)
    if journal:
        skipped.append(journal.folder)


def _reduce(rig: Rig, played: Played, stop: bool, seconds: float) -> tuple[dict[str, float], bool, float, float]:
    """Over all ranks: sums of what was played (and the mean wait for the slowest rank), whether any was asked to stop,
    the worst idle share, the longest time."""
    mesh, moved = rig.mesh, rig.dispatcher.meter.take()
    forwards = [len(slot) for slot, _, _ in played.timeline for op in slot if op.kind == "F"]
    tiles = list(rig.fp8.guard.take(rig.model.named_parameters())) if rig.fp8 is not None else []
    sums = {
        "bad": sum(count.bad for count in tiles),
        "floored": sum(count.floored for count in tiles),
        "tiles": sum(count.tiles for count in tiles),
        "loss": _total(played, "loss"),
        "mtp": _total(played, "mtp."),
        "balance": _total(played, "balance."),
        "forwards": len(forwards),
        "paired": forwards.count(2),
        "exposed": played.exposed,
        "played": played.ended - played.started,
        "intra": moved.get("intra", 0),
        "inter": moved.get("inter", 0),
    }
    added = mesh.sum(torch.tensor(list(sums.values()), dtype=torch.float64, device=mesh.device)).tolist()
    figures = dict(zip(sums, added, strict=True))
    highs = [float(stop), played.idle / sums["played"], sums["played"], seconds]
    stopped, worst, slowest, longest = mesh.max(torch.tensor(highs, dtype=torch.float64, device=mesh.device)).tolist()
    figures["waited"] = slowest - figures["played"] / mesh.size
    return figures, stopped > 0, worst, longest


def _draw_timeline(rig: Rig, point: Point, played: Played) -> None:
    schedule = make_schedule(rig.config, rig.config.microbatches(point.sequences))
    if timeline := measured(schedule, played, rig.mesh):
        write(rig.config.run.folder / "timeline.html", timeline)


def _total(played: Played, prefix: str) -> float:
    found = [loss for name, losses in played.losses.items() if name.startswith(prefix) for loss in losses]
    return float(torch.stack(found).double().sum()) if found else 0.0


def save(rig: Rig, step: int) -> Path:
    run = rig.config.run
    return checkpoint.save(run.folder, step, rig.optimizer.state(), rig.model.buffers, run.keep_checkpoints, rig.mesh)


def resume(rig: Rig, console: Console) -> int:
    """Load the newest checkpoint of the run folder, if any, and give the steps done."""
    newest = checkpoint.latest(rig.config.run.folder)
    if newest is None:
        return 0
    stored, pieces = checkpoint.fields(newest), rig.optimizer.state()
    wanted = {place: {k: t for k, t in fields.items() if k != "ema" or k in stored} for place, fields in pieces.items()}
    step = checkpoint.load(newest, wanted, rig.model.buffers, rig.mesh)
    rig.publish()
    if rig.optimizer.ema and "ema" not in stored:
        rig.optimizer.ema.restart()
        console.print(f"{newest} has no average of the weights: optim.ema starts from the weights of step {step}")
    return step


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
