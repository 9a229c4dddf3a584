"""AdamW over the shards that this rank owns, and gradient clipping.

A library does the arithmetic (`adam.py`); FP32 masters, summed gradients and sharding come from `parallel.zero`. The
norm is taken over the owned shards of all ranks, so it counts every parameter once in any layout. Buckets are updated
in the order in which the next forwards read them, and the new weights of one are sent while the next is updated.

BF16 moments are rounded to nearest from FP32 results, a bounded chunk at a time: the kernel's own mixed form exists on
CUDA only, and not in torch 2.11. Stochastic rounding would need random bits that any layout agrees on; what it would
gain is measured in docs/fp8.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dryvine.parallel.zero import Zero
from dryvine.trainer.adam import Operands, TorchAdamW, choose_adam
from dryvine.trainer.ema import Ema
from dryvine.trainer.ramps import OptimConfig

CHUNK = 1 << 24  # elements of BF16 moments that are FP32 at one time: 128 MiB for both
MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Moments:
    """Running means of a shard's gradient and of its square, in FP32 or BF16."""

    exp_avg: Tensor
    exp_avg_sq: Tensor


class UpdateWitness(Protocol):
    """Observes an update, bucket by bucket (`witness.py`)."""

    def before(self, number: int, rate: float) -> None:
        """Called before bucket `number` is updated; its gradients are already clipped."""

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
        self.adam, self.chosen = choose_adam(config, zero.mesh) if offload else (TorchAdamW(config), "")

    def reduce(self, scale: float) -> float:
        """Sum the gradients, which are scaled by `scale`, over all copies. Returns the global norm, unscaled. Each rank
        then holds the sums of its pieces, still scaled. Collective."""
        self.zero.reduce()
        return float(self.zero.grad_norm()) / scale

    def update(self, rate: float, norm: float, scale: float, witness: UpdateWitness | None = None) -> None:
        """Clip by the global norm, update the masters, and start sending the new weights to all copies. Collective."""
        # One pass over the gradients undoes the scale and clips.
        clip = min(1.0, self.config.clip / (norm + 1e-6))
        if self.ema:
            self.ema.before_update()
        for number in self.zero.gathers_turn:
            bucket = self.zero.buckets[number]
            bucket.grad.mul_(clip / scale)
            if witness:
                witness.before(number, rate)
            self.step_shard(self.operands(number), bucket.segments(bucket.index), rate)
            if witness:
                witness.after(number)
            self.zero.send(number)
        self.step += 1
        if self.ema:
            self.ema.after_update()

    def operands(self, number: int) -> Operands:
        """The tensors of this rank's shard of a bucket; not copies."""
        bucket, moments = self.zero.buckets[number], self.moments[number]
        return Operands(bucket.master, bucket.grad, moments.exp_avg, moments.exp_avg_sq)

    def step_shard(self, whole: Operands, segments: Iterable[tuple[bool, slice]], rate: float) -> None:
        """Update the operands of a shard, of this or another rank, in place; `segments` as of `Bucket.segments`."""
        for matrices, part in segments:
            decay = self.config.weight_decay if matrices else 0.0
            on = whole.part(part.start, part.stop)
            if self.config.moments == "fp32":
                self.adam(on, self.step, rate, decay)
                continue
            for start in range(0, len(on.master), CHUNK):
                self._step_rounded(on.part(start, start + CHUNK), rate, decay)

    def _step_rounded(self, on: Operands, rate: float, decay: float) -> None:
        """Update with BF16 moments: by FP32 copies, rounded back."""
        exact = on._replace(exp_avg=on.exp_avg.float(), exp_avg_sq=on.exp_avg_sq.float())
        self.adam(exact, self.step, rate, decay)
        on.exp_avg.copy_(exact.exp_avg)
        on.exp_avg_sq.copy_(exact.exp_avg_sq)

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
