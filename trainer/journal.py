"""The run folder: a run's config and metrics. Only rank 0 writes it.

config.toml      as resolved; `dryvine train` runs it again
skipped.jsonl    a line per skipped update: its data, and what was not finite on which rank
rollbacks.jsonl  a line per loss spike: the checkpoint that the run returned to, and the data that it skipped
commit.txt       the code's git commit, with `+` if the tree had changes
metrics.jsonl    a row per step; metrics not known at a step are null
events.out...    the same metrics for TensorBoard
schedule.svg     the simulated timeline of the schedule
expert_load.jsonl  a line per validation: tokens routed to each expert, by layer
starts.jsonl     a line per start of the run: after which step, and when
loss.png         training and validation loss
checkpoints/
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import matplotlib
from pydantic import BaseModel
from torch.utils.tensorboard import SummaryWriter

from dryvine.parallel.schedule.costs import Costs
from dryvine.parallel.schedule.draw.svg import svg
from dryvine.parallel.schedule.ir import Schedule
from dryvine.parallel.schedule.simulate import simulate
from dryvine.trainer.checkpoint import run_folder
from dryvine.trainer.checkpoint.manifest import CheckpointError
from dryvine.trainer.checkpoint.reader import open_checkpoint
from dryvine.trainer.config import RECORDED, Config, ConfigError, dump, recorded
from dryvine.trainer.data.atomic import CannotWrite, write_atomically
from dryvine.trainer.data.identity import UNKNOWN, DataIdentity
from dryvine.trainer.ramps import BatchConfig
from dryvine.trainer.run_rows import append, read
from dryvine.trainer.wandb_board import WandbBoard

# For schedule.svg: a pair takes about three quarters of the time of its parts (ISCA 2025, table 4).
COSTS = Costs.parse("F=1,I=1,W=1,FB=2.4")


@dataclass(frozen=True, kw_only=True)
class MetricsRow:
    """A step's metrics. Times are of the step; `bubble` is the worst rank's idle share, `exposed_comm_ms` the mean
    over ranks of the time in which a rank waited for the expert all-to-all and computed nothing."""

    step: int
    tokens: int  # consumed so far
    loss: float  # null in metrics.jsonl if not finite, as is every figure
    val_loss: float | None = None
    val_losses: Mapping[str, float] = field(default_factory=dict)  # of a blend's sources: written as val_loss.NAME
    val_loss_ema: float | None = None  # of the averages of the weights (optim.ema)
    lr: float
    grad_norm: float
    skipped: int = 0  # for a step that updated nothing: how many in a row, this one included
    tokens_per_second: float
    bubble: float
    overlapped_share: float
    exposed_comm_ms: float | None
    exposed_comm_share: float | None
    slowest_rank_ms: float  # the mean wait of a rank for the one that ended the schedule last
    mtp_loss: float | None
    balance_loss: float | None
    load_imbalance: float  # tokens of the busiest expert over the mean, in the worst layer
    rank_imbalance: float  # the same for expert-parallel ranks
    mbytes_inside_nodes: float  # bytes of dispatched and combined rows, training and validation, all ranks
    mbytes_between_nodes: float
    fp8_bad_tiles: float | None  # of this step, if it was counted (fp8.guard_every): held a NaN or an infinity
    fp8_floored_share: float | None  # share of tiles so small that all of their values lost precision
    seconds: float
    checkpoint_stall_ms: float | None = None  # for which saving blocked training after this step, on rank 0
    peak_mbytes: float | None = None  # peak of the fullest GPU's allocator since the start
    watts: float | None = None  # highest power of a GPU, after the step
    celsius: float | None = None  # highest temperature of a GPU
    exposed_zero_ms: float | None = None  # mean time in which a rank waited for gradient sums and new weights
    graph_overflows: int | None = None  # routings of all ranks without room in graphs: if any, the step was run twice


class Journal:
    """An open run folder. Rows after `resume_step` are dropped, since a resumed run writes them again; with 0, all
    rows are, that of step 0 too if there is one."""

    def __init__(
        self, config: Config, schedule: Schedule, resume_step: int, draw: Callable[[Path], None] | None = None
    ) -> None:
        """`draw` makes the pictures of a folder when the run ends; None: loss.png."""
        self.folder, self._draw = config.run.folder, draw or plot
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = read(self.folder) if resume_step else []
        rows = "".join(json.dumps(row) + "\n" for row in kept if row["step"] <= resume_step)
        for name, content in {
            RECORDED: dump(config),
            "commit.txt": commit() + "\n",
            "schedule.svg": svg(simulate(schedule, COSTS)),
            "metrics.jsonl": rows,
        }.items():
            write_atomically(self.folder / name, content)
        start = {"after_step": resume_step, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        self.append("starts.jsonl", start)
        self._metrics = self.folder / "metrics.jsonl"
        self._lines = self._metrics.open("a")
        with CannotWrite.naming(self.folder / "events.out.tfevents"):
            self._board = SummaryWriter(str(self.folder), purge_step=resume_step + 1)
        self._wandb = WandbBoard(config) if config.run.wandb else None

    def write(self, row: MetricsRow) -> None:
        named = {name: value for name, value in vars(row).items() if name != "val_losses"}
        named |= {f"val_loss.{source}": loss for source, loss in row.val_losses.items()}
        self.write_figures(row.step, named)

    def write_figures(self, step: int, named: Mapping[str, float | None]) -> None:
        """Write a row of metrics.jsonl, and log it to TensorBoard and Weights & Biases. `named` includes the step."""
        figures = {name: value if value is None or math.isfinite(value) else None for name, value in named.items()}
        with CannotWrite.naming(self._metrics):
            self._lines.write(json.dumps(figures) + "\n")
            self._lines.flush()
        with CannotWrite.naming(self.folder / "events.out.tfevents"):
            for name, value in figures.items():
                if value is not None and name != "step":
                    self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.write(step, figures)

    def write_loads(self, step: int, loads: Sequence[Sequence[int]]) -> None:
        """Append the number of the step's tokens that were routed to each expert, by MoE layer."""
        self.append("expert_load.jsonl", {"step": step, "loads": loads})

    def append(self, name: str, row: Mapping[str, object]) -> None:
        """Append a line to another file of the folder."""
        append(self.folder, name, row)

    def close(self) -> None:
        with CannotWrite.naming(self._metrics):
            self._lines.close()
        with CannotWrite.naming(self.folder / "events.out.tfevents"):
            self._board.close()
        if self._wandb:
            self._wandb.close()
        with CannotWrite.naming(self.folder / "pictures"):
            self._draw(self.folder)


def plot(folder: Path) -> None:
    """Draw loss.png from metrics.jsonl, with a line at ln(vocab), the loss of a uniform guess."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read(folder)
    if not rows:
        return
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], lw=0.8, alpha=0.6, label="training")
    held_out = [r for r in rows if r["val_loss"] is not None]
    axes.plot([r["step"] for r in held_out], [r["val_loss"] for r in held_out], "o-", ms=4, label="validation")
    for name in sorted({name for r in held_out for name in r if name.startswith("val_loss.")}):
        known = [(r["step"], r[name]) for r in held_out if r.get(name) is not None]
        axes.plot(*zip(*known, strict=True), lw=0.8, label=name.replace("val_loss.", "validation, "))
    averaged = [r for r in held_out if r.get("val_loss_ema") is not None]
    if averaged:
        steps, losses = [r["step"] for r in averaged], [r["val_loss_ema"] for r in averaged]
        axes.plot(steps, losses, "s--", ms=4, label="validation, averaged weights")
    uniform = math.log(recorded(folder).data.vocab_size)
    axes.axhline(uniform, ls=":", c="gray", label=f"uniform guess, ln(vocab) = {uniform:.2f}")
    axes.set(xlabel="step", ylabel="loss, nats per token", title=folder.name)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(folder / "loss.png", dpi=120)
    pyplot.close(figure)


def commit() -> str:
    """The commit of the code that runs, `+` for uncommitted changes; `unknown` outside a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(("git", *words), cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def same_run(config: Config, identity: DataIdentity) -> None:
    """Raise ConfigError if the run folder holds a run with another model, data or batch than `config`, or one whose
    checkpoints lack what the [rl] of `config` keeps in them. The path of the data may change: its `identity` is
    compared instead, if a checkpoint has it."""
    path = config.run.folder / RECORDED
    if not path.exists():
        return
    read(config.run.folder)  # what it raises is said before any GPU is held
    before = recorded(config.run.folder)
    known = _identity_of(config.run.folder)
    for name, ours, theirs in zip(identity._fields, identity, known, strict=True):
        if theirs is not None and ours is not None and ours != theirs:
            raise ConfigError(
                f"{config.run.folder}: the {name} of this run is not what it was: {config.data.source} was made anew; "
                f"put the dataset back that the run began with, or set run.name for a new run"
            )
    moved = {"source": before.data.source, "dir": before.data.dir} if known.data is not None else {}
    unmoved = config.model_copy(update={"data": config.data.model_copy(update=moved)})
    kept, wanted = _kept_for_ever(before), _kept_for_ever(unmoved)
    for table in kept:
        if kept[table] != wanted[table]:
            raise ConfigError(
                f"{config.run.folder}: holds a run with another [{table}] table; set run.name for a new run, "
                f"or go on with {path}"
            )
    if run_folder.newest(config.run.folder) and (missing := sorted(_kept_by_rl(config) - _kept_by_rl(before))):
        raise ConfigError(
            f"{config.run.folder}: holds a run without {missing[0]}, so its checkpoints lack what that needs; set "
            f'run.name for a new run, and run.init_from = "{config.run.folder}" for its weights'
        )


def _kept_for_ever(config: Config) -> dict[str, BaseModel]:
    """The tables that a run cannot change, without keys that change none of its bits: recompute, and the ramp of an RL
    run of before such were refused."""
    batch = BatchConfig(sequences=config.batch.sequences) if config.rl else config.batch
    return {"model": config.model.model_copy(update={"recompute": ()}), "data": config.data, "batch": batch}


def _kept_by_rl(config: Config) -> set[str]:
    """What adds to a checkpoint of reinforcement learning. A run that only answers reads the weights of any."""
    rl = config.rl
    if rl is None or rl.evaluate_only or rl.harvest:
        return set()
    keys = {"[rl]": True, "rl.loss.kl": rl.loss.kl > 0, "rl.ahead": rl.ahead}
    return {key for key, kept in keys.items() if kept}


def _identity_of(folder: Path) -> DataIdentity:
    """The identity of the data up to the newest checkpoint. Damage of that is detected later."""
    newest = run_folder.newest(folder)
    try:
        manifest = open_checkpoint(newest).manifest if newest else None
    except CheckpointError:
        manifest = None
    return DataIdentity(manifest.data, manifest.tokenizer) if manifest else UNKNOWN
