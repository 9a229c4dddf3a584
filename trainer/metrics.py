"""Metrics of a step over all ranks: two reductions, and from them a row of metrics.jsonl.

Every rank puts its summands into one record, so one all-reduce of a few numbers carries all of them; a second one
takes the maxima. A reduction per metric would be easier to extend and would add a collective per metric to every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from dryvine.comm.mesh import Mesh
from dryvine.parallel.executor import Played
from dryvine.trainer.journal import MetricsRow
from dryvine.trainer.ramps import Point, learning_rate
from dryvine.trainer.rig import Rig
from dryvine.trainer.step import StepOutcome


class Sums(NamedTuple):
    """Metrics that are summed: those of one rank, or the sums over all."""

    loss: float  # each loss is summed over microbatches
    mtp_loss: float
    balance_loss: float
    forwards: float
    paired_forwards: float  # those that ran in a pair with a backward
    exposed: float  # seconds in which the rank waited for the all-to-all and computed nothing
    exposed_zero: float  # seconds in which it waited for gradient sums and new weights
    played: float  # seconds from the start of the schedule to its end
    bytes_inside_nodes: float
    bytes_between_nodes: float
    bad_tiles: float
    floored_tiles: float
    tiles: float


class Maxima(NamedTuple):
    """Metrics whose maximum counts: those of one rank, or the maxima over all."""

    stop: float  # 1 if a signal asked the rank to stop
    saving: float  # 1 if the rank is still writing a checkpoint
    idle_share: float  # of the time played
    played: float
    seconds: float  # of the step
    peak_bytes: float = 0.0  # of the device's allocator; 0 on a CPU
    watts: float = 0.0  # of the device, from NVML; 0 if not available
    celsius: float = 0.0


@dataclass(frozen=True)
class StepFigures:
    """A step's metrics over all ranks, the same on every rank."""

    sums: Sums
    maxima: Maxima
    ranks: int

    @property
    def stop(self) -> bool:
        """Whether any rank was asked to stop."""
        return self.maxima.stop > 0

    @property
    def saving(self) -> bool:
        """Whether any rank is still writing its part of a checkpoint."""
        return self.maxima.saving > 0

    @property
    def mean_exposed(self) -> float:
        return self.sums.exposed / self.ranks

    @property
    def mean_wait(self) -> float:
        """Seconds between the end of a rank's schedule and that of the slowest, the mean over ranks."""
        return self.maxima.played - self.sums.played / self.ranks


def reduce_figures(rig: Rig, played: Played, seconds: float, stop: bool, saving: bool = False) -> StepFigures:
    """Reduce the metrics of a step that took this rank `seconds`. `stop`: a signal asked it to stop; `saving`: it is
    still writing a checkpoint. Resets the counts of bytes and FP8 tiles. Collective."""
    sums = _own_sums(rig, played)
    mesh = rig.mesh
    idle = played.idle / sums.played
    maxima = Maxima(float(stop), float(saving), idle, sums.played, seconds, *_device(mesh.device))
    return StepFigures(
        Sums(*mesh.sum(_tensor(sums, mesh), "figures").tolist()),
        Maxima(*mesh.max(_tensor(maxima, mesh), "figures").tolist()),
        mesh.size,
    )


def metrics_row(rig: Rig, point: Point, outcome: StepOutcome, figures: StepFigures) -> MetricsRow:
    """The row of a step, without the fields that the loop adds: validation, and consecutive skipped steps."""
    config, sums, seconds = rig.config, figures.sums, figures.maxima.seconds
    microbatches = rig.plan.training[point.sequences].schedule.microbatches * rig.mesh.data_ranks
    return MetricsRow(
        step=point.step + 1,
        tokens=point.tokens_before + point.tokens,
        loss=sums.loss / microbatches,
        lr=learning_rate(config.optim, point),
        grad_norm=outcome.norm,
        tokens_per_second=point.tokens / seconds,
        bubble=figures.maxima.idle_share,
        overlapped_share=sums.paired_forwards / sums.forwards if config.parallel.overlap == "on" else 0.0,
        exposed_comm_ms=1e3 * figures.mean_exposed,
        exposed_comm_share=figures.mean_exposed / seconds,
        exposed_zero_ms=1e3 * sums.exposed_zero / figures.ranks,
        slowest_rank_ms=1e3 * figures.mean_wait,
        mtp_loss=sums.mtp_loss / microbatches if config.model.mtp_depth else None,
        balance_loss=sums.balance_loss / microbatches if config.model.balance_alpha else None,
        load_imbalance=outcome.balance.experts,
        rank_imbalance=outcome.balance.ranks,
        mbytes_inside_nodes=sums.bytes_inside_nodes / 1e6,
        mbytes_between_nodes=sums.bytes_between_nodes / 1e6,
        fp8_bad_tiles=sums.bad_tiles if sums.tiles else None,
        fp8_floored_share=sums.floored_tiles / sums.tiles if sums.tiles else None,
        seconds=seconds,
        peak_mbytes=figures.maxima.peak_bytes / 1e6 or None,
        watts=figures.maxima.watts or None,
        celsius=figures.maxima.celsius or None,
        graph_overflows=outcome.overflows,
    )


def _own_sums(rig: Rig, played: Played) -> Sums:
    sent = rig.dispatcher.meter.take()
    # For each forward, how many ops its slot has.
    slot_sizes = [len(slot) for slot, _, _ in played.timeline for op in slot if op.kind == "F"]
    counts = list(rig.fp8.guard.take(rig.model.named_parameters())) if rig.fp8 is not None else []
    return Sums(
        loss=_loss_sum(played, "loss"),
        mtp_loss=_loss_sum(played, "mtp."),
        balance_loss=_loss_sum(played, "balance."),
        forwards=len(slot_sizes),
        paired_forwards=slot_sizes.count(2),
        exposed=played.exposed,
        exposed_zero=rig.optimizer.zero.stalls.take(),
        played=played.ended - played.started,
        bytes_inside_nodes=sent.get("intra", 0),
        bytes_between_nodes=sent.get("inter", 0),
        bad_tiles=sum(count.bad for count in counts),
        floored_tiles=sum(count.floored for count in counts),
        tiles=sum(count.tiles for count in counts),
    )


def _device(device: torch.device) -> tuple[float, float, float]:
    """Peak bytes since the start, watts and degrees of this rank's device."""
    if device.type != "cuda":
        return 0.0, 0.0, 0.0
    from pynvml import NVMLError

    peak = float(torch.cuda.max_memory_allocated(device))
    try:
        return peak, torch.cuda.power_draw(device) / 1e3, float(torch.cuda.temperature(device))
    except (NVMLError, RuntimeError):  # it does not answer in some containers and virtual machines
        return peak, 0.0, 0.0


def _loss_sum(played: Played, prefix: str) -> float:
    """Of all losses whose name starts with `prefix`, in FP64; one transfer from the device."""
    losses = [loss for name, some in played.losses.items() if name.startswith(prefix) for loss in some]
    return float(torch.stack(losses).double().sum()) if losses else 0.0


def _tensor(figures: Sums | Maxima, mesh: Mesh) -> torch.Tensor:
    return torch.tensor(figures, dtype=torch.float64, device=mesh.device)
