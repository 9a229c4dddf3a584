"""One training step of one rank, and one validation. Their inputs are in `Rig`; `metrics` reads their results.

A step: run the schedule over the step's sequences, sum the gradients over all copies, update the weights, and update
the gate biases by the expert loads of the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from dryvine.parallel.executor import Played
from dryvine.trainer.batches import read_batch
from dryvine.trainer.config import Config
from dryvine.trainer.data.source import SequenceSource
from dryvine.trainer.model.shape import blocks
from dryvine.trainer.ramps import Point, changed, gradient_scale, learning_rate
from dryvine.trainer.rig import Rig


class Balance(NamedTuple):
    """Load imbalance: the largest load over the mean, in the worst layer; 1 is perfectly balanced."""

    experts: float
    ranks: float  # of an expert-parallel group


class StepOutcome(NamedTuple):
    played: Played
    norm: float  # of the gradient over all ranks, before the clip
    balance: Balance
    loads: torch.Tensor | None = None  # int64 [MoE layers, experts]: tokens of the global batch; None if no MoE layer
    overflows: int | None = None  # as in `Gradients`

    @property
    def finite(self) -> bool:
        return math.isfinite(self.norm)


def train_step(rig: Rig, point: Point) -> StepOutcome:
    """One step. If the gradient norm is not finite (on any rank, and so on all), nothing is updated: no weight, no
    moment and no gate bias. Collective, as are all functions of this file."""
    played, norm, overflows = gradients(rig, point)
    finite = math.isfinite(norm)
    if finite:
        update(rig, point, norm)
    loads = balance(rig, bias_gamma(rig.config, point) if finite else 0.0)
    even = Balance(1.0, 1.0) if loads is None else imbalances(loads, rig.mesh.ep)
    return StepOutcome(played, norm, even, loads, overflows)


class Gradients(NamedTuple):
    """What a step has before its update; the gradients themselves are in the optimizer."""

    played: Played
    norm: float  # over all ranks, before the clip
    overflows: int | None  # routings, of all ranks, that graphs had no room for; None where that cannot be


def gradients(rig: Rig, point: Point) -> Gradients:
    """Run the schedule over a step's sequences and sum the gradients, scaled, over all copies."""
    found = summed(rig, gradient_scale(point), lambda eager: [accumulate(rig, point, eager)])
    return Gradients(found.played[0], found.norm, found.overflows)


class Summed(NamedTuple):
    """`played` is what was accumulated; the rest as in `Gradients`."""

    played: Sequence[Played]
    norm: float
    overflows: int | None


def summed(rig: Rig, scale: float, accumulate: Callable[[bool], Sequence[Played]]) -> Summed:
    """Sum over all copies the gradients that `accumulate(eager)` leaves, times `scale`.

    If graphs had no room for the rows of some routing, on any rank, what they computed is wrong: everything is run
    again without graphs. Repeating only the microbatch concerned would need a read of the device before its backward
    adds to the gradients, in each microbatch of each step; this reads once a step, beside the norm.
    """
    played = accumulate(False)
    overflows = rig.take_overflows()
    norm = rig.optimizer.reduce(scale)
    count = None if overflows is None else int(overflows)
    if not count:
        return Summed(played, norm, count)
    rig.model.reset_loads()
    played = accumulate(True)
    return Summed(played, rig.optimizer.reduce(scale), count)


def accumulate(rig: Rig, point: Point, eager: bool = False) -> Played:
    """Run the schedule over a step's sequences; `eager`: without graphs. Every main gradient then holds this rank's
    contribution to the sum, times `gradient_scale(point)`."""
    config = rig.config
    rig.optimizer.zero.zero_grads()
    rig.model.loss_weights.mtp = changed(config.model.mtp_weight, config.optim.mtp_weight_plan, point)
    guarded = _prepare_fp8(rig, point)
    batch = read_batch(rig, rig.data.train, point.data_first, point.sequences)
    # Each microbatch adds the gradient of its own mean loss; the step's loss is the mean over all of them.
    share = gradient_scale(point) / (len(batch.tokens) * rig.mesh.data_ranks)
    return rig.training(point.sequences).run(replace(batch, loss_scale=share, eager=guarded or eager))


def _prepare_fp8(rig: Rig, point: Point) -> bool:
    """Enable the guard in steps whose tiles are counted. Returns whether this is one; graphs run all others."""
    if rig.fp8 is None:
        return False
    every = rig.config.fp8.guard_every
    rig.fp8.guard.on = every > 0 and point.step % every == 0
    if not rig.fp8.guard.on:
        rig.renew_copies()
    return rig.fp8.guard.on


def update(rig: Rig, point: Point, norm: float) -> None:
    """Update the weights with the gradients of `accumulate` and `reduce`, and start sending them to all copies."""
    rig.update(learning_rate(rig.config.optim, point), norm, gradient_scale(point), point.step + 1)


def bias_gamma(config: Config, point: Point) -> float:
    """The bias update speed of a step (gamma, arXiv 2412.19437, section 2.1.2)."""
    return changed(config.model.bias_gamma, config.optim.bias_gamma_plan, point)


def balance(rig: Rig, gamma: float) -> torch.Tensor | None:
    """Update every gate's bias by `gamma` according to the loads of the global batch (arXiv 2408.15664), and reset the
    counts. Returns the loads as in `StepOutcome`."""
    shape, own = rig.config.model, rig.model.loads
    layers = [block.name for block in blocks(shape) if block.kind in ("moe", "mtp")]
    if not layers:
        return None
    zeros = torch.zeros(shape.routed, dtype=torch.int64, device=rig.mesh.device)
    loads = rig.mesh.sum(torch.stack([own.get(layer, zeros) for layer in layers]), "expert loads")
    if gamma:
        rig.model.update_biases(dict(zip(layers, loads, strict=True)), gamma)
    rig.model.reset_loads()
    return loads


def imbalances(loads: torch.Tensor, ep: int) -> Balance:
    """The imbalances of loads [layers, experts], where each of `ep` ranks holds an equal, contiguous share."""
    by_rank = loads.unflatten(1, (ep, -1)).sum(-1)
    worst = [(n.max(dim=1).values * n.shape[1] / n.sum(dim=1)).max() for n in (loads, by_rank)]
    return Balance(*torch.stack(worst).tolist())  # one read of the device


class Validation(NamedTuple):
    """Mean next-token losses: of the validation split, and for a blend of each source's split, by name; the loss of the
    blend is then their mean, weighted by the sources' shares."""

    loss: float
    by_source: dict[str, float]


def evaluate(rig: Rig) -> Validation:
    """Losses over the validation batches, which are the same every time and in every layout."""
    held_out = rig.data.held_out
    if not held_out:
        return Validation(_evaluate(rig, rig.data.val), {})
    losses = {name: _evaluate(rig, part.source) for name, part in held_out.items()}
    return Validation(sum(part.share * losses[name] for name, part in held_out.items()), losses)


def _evaluate(rig: Rig, source: SequenceSource) -> float:
    batches, sequences = rig.config.run.eval_batches, rig.config.batch.sequences
    total = torch.zeros(1, dtype=torch.float64, device=rig.mesh.device)
    for number in range(batches):
        batch = read_batch(rig, source, number * sequences, sequences)
        played = rig.validation.run(replace(batch, training=False))
        # Only the rank with the last stage has losses.
        total += sum((loss.double() for loss in played.losses.get("loss", [])), torch.zeros_like(total))
    microbatches = batches * rig.plan.validation.schedule.microbatches * rig.mesh.data_ranks
    return float(rig.mesh.sum(total, "validation losses")) / microbatches


def evaluate_average(rig: Rig) -> float | None:
    """The loss of `evaluate` with averaged weights; None without `optim.ema`. Gate biases are not averaged, since they
    are not parameters: the current ones are used."""
    if rig.optimizer.ema is None:
        return None
    rig.publish(rig.optimizer.ema.averages)
    loss = evaluate(rig).loss
    rig.publish()
    return loss
