"""One training step of one rank, and one validation. What they need is in `Rig`; what they return goes to `metrics`.

A step: run the schedule over the step's sequences, sum the gradients over all copies, update, and move the gate biases
by the load of the whole global batch.
"""

from __future__ import annotations

import math
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
    """The busiest over the mean, in the worst layer; 1 is even."""

    experts: float
    ranks: float  # of an expert-parallel group


class StepOutcome(NamedTuple):
    played: Played
    norm: float  # of the gradient over all ranks, before the clip
    balance: Balance
    loads: torch.Tensor | None = None  # int64 [MoE layers, experts]: tokens of the global batch; None without experts

    @property
    def finite(self) -> bool:
        return math.isfinite(self.norm)


def train_step(rig: Rig, point: Point) -> StepOutcome:
    """One step. If the gradient norm is not finite on any rank, and so on all, nothing is updated: no weight, no
    moment and no gate bias. Collective, as is all of this file."""
    played = accumulate(rig, point)
    norm = rig.optimizer.reduce(gradient_scale(point))
    finite = math.isfinite(norm)
    if finite:
        update(rig, point, norm)
    loads = balance(rig, bias_gamma(rig.config, point) if finite else 0.0)
    even = Balance(1.0, 1.0) if loads is None else imbalances(loads, rig.mesh.ep)
    return StepOutcome(played, norm, even, loads)


def accumulate(rig: Rig, point: Point) -> Played:
    """Run the schedule over a step's sequences. Every main gradient then holds this rank's share of the sum, times
    `gradient_scale(point)`."""
    config = rig.config
    rig.optimizer.zero.zero_grads()
    rig.model.loss_weights.mtp = changed(config.model.mtp_weight, config.optim.mtp_weight_plan, point)
    guarded = _prepare_fp8(rig, point)
    batch = read_batch(rig, rig.data.train, point.data_first, point.sequences)
    # Each microbatch adds the gradient of its own mean loss; the step's loss is the mean over all of them.
    share = gradient_scale(point) / (len(batch.tokens) * rig.mesh.data_ranks)
    return rig.training(point.sequences).run(replace(batch, loss_scale=share, eager=guarded))


def _prepare_fp8(rig: Rig, point: Point) -> bool:
    """Turn the guard on in steps whose tiles are to be counted. Returns whether this is one; if not, and graphs play
    it, makes the FP8 copies of the weights, which graphs read without asking for them."""
    if rig.fp8 is None:
        return False
    every = rig.config.fp8.guard_every
    rig.fp8.guard.on = every > 0 and point.step % every == 0
    if rig.graphs is not None and not rig.fp8.guard.on:
        rig.optimizer.zero.settle()
        rig.fp8.cache.refresh()
    return rig.fp8.guard.on


def update(rig: Rig, point: Point, norm: float) -> None:
    """Step the optimizer with the gradients of `accumulate` and `reduce`, and begin to give every copy the new
    weights."""
    rig.update(learning_rate(rig.config.optim, point), norm, gradient_scale(point), point.step + 1)


def bias_gamma(config: Config, point: Point) -> float:
    """How far a step moves a gate's bias."""
    return changed(config.model.bias_gamma, config.optim.bias_gamma_plan, point)


def balance(rig: Rig, gamma: float) -> torch.Tensor | None:
    """Move every gate's bias by `gamma` after the load of the whole global batch (arXiv 2408.15664), and count
    anew. Returns that load, as in `StepOutcome`."""
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
    """Of loads [layers, experts], where each of `ep` ranks holds as many experts, neighbours."""
    by_rank = loads.unflatten(1, (ep, -1)).sum(-1)
    experts, ranks = ((n.max(dim=1).values * n.shape[1] / n.sum(dim=1)).max() for n in (loads, by_rank))
    return Balance(float(experts), float(ranks))


class Validation(NamedTuple):
    """Mean next-token losses of the validation split, or of a blend's splits by the names of its sources; the loss of
    the blend is the mean of theirs, weighted by their shares of it."""

    loss: float
    by_source: dict[str, float]


def evaluate(rig: Rig) -> Validation:
    """Losses over the validation batches, the same ones every time and in every layout."""
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
    """`evaluate` with the averages of the weights in their place; None if none are kept. Gate biases follow the load
    and are no parameters: they stay as they are."""
    if rig.optimizer.ema is None:
        return None
    rig.publish(rig.optimizer.ema.averages)
    loss = evaluate(rig).loss
    rig.publish()
    return loss
