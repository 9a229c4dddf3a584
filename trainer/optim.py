"""AdamW over the shards that this rank owns, and gradient clipping.

`adam.py` does the arithmetic; FP32 masters, summed gradients and sharding come from `parallel.zero`. The norm is taken
over the owned shards of all ranks, so it counts every parameter once in any layout. Buckets are updated in the order in
which the next forwards read them, and the new weights of one are sent while the next is updated.

BF16 moments are rounded to nearest from FP32 results. Stochastic rounding would need random bits that any layout agrees
on; what it would gain is measured in docs/fp8.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dryvine.parallel.zero import Zero
from dryvine.trainer.adam import Operands, Update, adam_on, choose_adam
from dryvine.trainer.ema import Ema
from dryvine.trainer.ramps import OptimConfig

MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Moments:
    """Running means of a shard's gradient and of its square, in FP32 or BF16."""

    exp_avg: Tensor
    exp_avg_sq: Tensor


class UpdateWitness(Protocol):
    """Observes an update, bucket by bucket (`witness.py`)."""

    def before(self, number: int, update: Update) -> None:
        """Called before bucket `number` is updated."""

    def after(self, number: int) -> None:
        """Called after bucket `number` was updated."""


class Optimizer:
    """AdamW on this rank's shards of the parameters. Matrices decay, vectors (norm weights) do not. Collective."""

    def __init__(self, zero: Zero, config: OptimConfig) -> None:
        self.zero, self.config = zero, config
        self.pieces = list(zero.pieces())
        dtype, masters = MOMENTS[config.moments], [bucket.master for bucket in zero.buckets]
        self.moments = [Moments(*(torch.zeros_like(m, dtype=dtype) for _ in range(2))) for m in masters]
        self.step = torch.zeros((), dtype=torch.float32, device=masters[0].device)  # updates made
        self.ema = Ema(masters, config.ema) if config.ema else None
        offload = config.offload == "cpu"
        self.adam, self.chosen = choose_adam(config, zero.mesh) if offload else (adam_on(masters[0].device, config), "")

    def reduce(self, scale: float) -> float:
        """Sum the gradients, which are scaled by `scale`, over all copies. Returns the global norm, unscaled. Each rank
        then holds the sums of its pieces, still scaled. Collective."""
        self.zero.reduce()
        return float(self.zero.grad_norm()) / scale

    def rehearse(self) -> None:
        """Update no element of any bucket on the device, so that the kernels of an update are loaded."""
        nothing = slice(0, 0)
        for number, bucket in enumerate(self.zero.buckets):
            if bucket.host is None:
                on, weights = self.operands(number).part(nothing), bucket.values[nothing]
                self.adam(on, self.step, Update(0.0, 1.0, 0.0), weights)

    def update(self, rate: float, norm: float, scale: float, witness: UpdateWitness | None = None) -> None:
        """Clip by the global norm, update the masters, and start sending the new weights to all copies. Collective."""
        clip = min(1.0, self.config.clip / (norm + 1e-6))
        update = Update(rate, clip / scale, self.config.weight_decay)
        if self.ema:
            self.ema.before_update()
        for number in self.zero.gathers_turn:
            if witness:
                witness.before(number, update)
            with self.zero.new_weights(number) as weights:
                self.step_shard(self.operands(number), update, weights)
            if witness:
                witness.after(number)
        self.step += 1
        if self.ema:
            self.ema.after_update()

    def operands(self, number: int) -> Operands:
        """The tensors of this rank's shard of a bucket; not copies."""
        bucket, moments = self.zero.buckets[number], self.moments[number]
        matrices = bucket.matrices(bucket.index)
        return Operands(bucket.master, bucket.grad, moments.exp_avg, moments.exp_avg_sq, matrices)

    def step_shard(self, on: Operands, update: Update, weights: Tensor | None = None) -> None:
        """Update the operands of a shard, or of a part of one, of this or another rank, in place; `weights` as of
        `AdamW`."""
        self.adam(on, self.step, update, weights)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shapes of the parameters of which this rank has pieces."""
        return {piece.name: piece.shape for piece in self.pieces}

    def state(self) -> dict[tuple[str, int], dict[str, Tensor]]:
        """(parameter, first element) -> master, exp_avg, exp_avg_sq and step of each piece, and ema if averages are
        kept. The tensors are live: what is loaded into them is the new state."""
        averages = self.ema.averages if self.ema else [None] * len(self.zero.buckets)
        state: dict[tuple[str, int], dict[str, Tensor]] = {}
        for bucket, moments, average in zip(self.zero.buckets, self.moments, averages, strict=True):
            for p in bucket.pieces():
                first, second = (of[p.in_shard] for of in (moments.exp_avg, moments.exp_avg_sq))
                fields = {"master": p.master, "exp_avg": first, "exp_avg_sq": second, "step": self.step}
                state[p.name, p.start] = fields if average is None else fields | {"ema": average[p.in_shard]}
        return state
