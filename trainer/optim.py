"""AdamW over the pieces this rank owns, and the clip.

torch's fused AdamW does the arithmetic; FP32 masters, summed gradients and sharding come from `parallel.zero`. The
norm is taken over the owned pieces of all ranks, so it counts every parameter once whatever the layout.

BF16 moments are rounded to nearest from FP32 results, a bounded chunk at a time: the kernel's own mixed form exists on
CUDA alone, and not in torch 2.11. Stochastic rounding would need random bits that any layout agrees on; what it would
gain is measured in docs/fp8.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from dryvine.parallel.zero import Piece, Zero
from dryvine.trainer.ema import Ema
from dryvine.trainer.ramps import OptimConfig

CHUNK = 1 << 24  # elements of BF16 moments that are FP32 at one time: 128 MiB for both
MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Moments:
    """Running means of a piece's gradient and of its square, in FP32 or BF16."""

    exp_avg: Tensor
    exp_avg_sq: Tensor


class Optimizer:
    """AdamW on this rank's pieces of the parameters. Matrices decay, vectors (norm weights) do not."""

    def __init__(self, zero: Zero, config: OptimConfig) -> None:
        self.zero, self.config = zero, config
        self.pieces = list(zero.pieces())
        dtype = MOMENTS[config.moments]
        self.moments = [Moments(*(torch.zeros_like(p.master, dtype=dtype) for _ in range(2))) for p in self.pieces]
        self.step = torch.zeros((), dtype=torch.float32, device=zero.mesh.device)  # updates made
        self.ema = Ema([bucket.master for bucket in zero.buckets], config.ema) if config.ema else None

    def reduce(self, scale: float) -> float:
        """Sum the gradients, which are `scale` times the true ones, over all their copies and give the true global
        norm; each rank then holds its pieces, still scaled."""
        self.zero.reduce()
        return float(self.zero.grad_norm()) / scale

    def update(self, rate: float, norm: float, scale: float) -> None:
        """Clip by the global norm, in the pass that unscales, and step the masters. Publishing is the caller's."""
        clip = min(1.0, self.config.clip / (norm + 1e-6))
        for bucket in self.zero.buckets:
            bucket.grad_shard.mul_(clip / scale)
        if self.ema:
            self.ema.before_update()
        for matrix in (True, False):
            some = [(p, m) for p, m in zip(self.pieces, self.moments, strict=True) if p.matrix is matrix]
            if self.config.moments == "fp32":
                self._adamw([(p.master, p.grad, m.exp_avg, m.exp_avg_sq) for p, m in some], rate, matrix)
                continue
            for chunk in _chunks(some):
                self._rounded(chunk, rate, matrix)
        self.step += 1
        if self.ema:
            self.ema.after_update()

    def _rounded(self, chunk: Wide, rate: float, matrix: bool) -> None:
        """A step of BF16 moments, with FP32 in between."""
        wide = [(master, grad, first.float(), second.float()) for master, grad, first, second in chunk]
        self._adamw(wide, rate, matrix)
        for (_, _, *rounded), (_, _, *exact) in zip(chunk, wide, strict=True):
            for low, high in zip(rounded, exact, strict=True):
                low.copy_(high)

    def _adamw(self, wide: Wide, rate: float, matrix: bool) -> None:
        """One call of the fused kernel; it counts the step by itself, so each call has counts of its own."""
        if not wide:
            return
        masters, grads, firsts, seconds = (list(of) for of in zip(*wide, strict=True))
        config = self.config
        adamw(
            masters, grads, firsts, seconds, [], [self.step.clone() for _ in masters], fused=True, amsgrad=False,
            beta1=config.betas[0], beta2=config.betas[1], lr=rate, eps=config.eps,
            weight_decay=config.weight_decay if matrix else 0.0, maximize=False,
        )  # fmt: skip

    def state(self) -> dict[tuple[str, int], dict[str, Tensor]]:
        """(parameter, first element) -> master, exp_avg, exp_avg_sq and step of each piece, and ema if there is one;
        live tensors."""
        averages = self.ema.averages if self.ema else [None] * len(self.zero.buckets)
        averaged = (a for b, a in zip(self.zero.buckets, averages, strict=True) for _ in b.pieces())  # a bucket's
        return {
            (p.name, p.start): {"master": p.master, "exp_avg": m.exp_avg, "exp_avg_sq": m.exp_avg_sq, "step": self.step}
            | ({} if average is None else {"ema": average[p.in_shard]})
            for p, m, average in zip(self.pieces, self.moments, averaged, strict=True)
        }


Wide = list[tuple[Tensor, Tensor, Tensor, Tensor]]  # master, gradient, exp_avg, exp_avg_sq: of equal sizes


def _chunks(some: list[tuple[Piece, Moments]]) -> Iterator[Wide]:
    """The pieces in runs of at most CHUNK elements; longer ones are cut."""
    chunk: Wide = []
    room = CHUNK
    for piece, moments in some:
        of = (piece.master, piece.grad, moments.exp_avg, moments.exp_avg_sq)
        at, size = 0, piece.master.numel()
        while at < size:
            end = min(size, at + room)
            chunk.append(tuple(t[at:end] for t in of))  # type: ignore[arg-type]
            room -= end - at
            at = end
            if not room:
                yield chunk
                chunk, room = [], CHUNK
    if chunk:
        yield chunk
