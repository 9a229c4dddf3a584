"""AdamW over the pieces that this rank owns, and the clip.

torch's fused AdamW does the arithmetic; FP32 masters, summed gradients and sharding come from `parallel.zero`. The
norm is taken over the owned pieces of all ranks, so it counts every parameter once in any layout.

BF16 moments are rounded to nearest from FP32 results, a bounded chunk at a time: the kernel's own mixed form exists on
CUDA only, and not in torch 2.11. Stochastic rounding would need random bits that any layout agrees on; what it would
gain is measured in docs/fp8.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

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
        """Sum the gradients, which are `scale` times the true ones, over all their copies. Returns the true global
        norm. Each rank then holds the sums of its pieces, still scaled. Collective."""
        self.zero.reduce()
        return float(self.zero.grad_norm()) / scale

    def update(self, rate: float, norm: float, scale: float) -> None:
        """Clip by the global norm and step the masters. The weights follow when the caller publishes them."""
        # One pass over the gradients undoes the scale and clips.
        clip = min(1.0, self.config.clip / (norm + 1e-6))
        for bucket in self.zero.buckets:
            bucket.grad_shard.mul_(clip / scale)
        if self.ema:
            self.ema.before_update()
        for matrix in (True, False):
            self._step_pieces(matrix, rate)
        self.step += 1
        if self.ema:
            self.ema.after_update()

    def _step_pieces(self, matrix: bool, rate: float) -> None:
        """Of the matrices, or of the vectors."""
        alike = [(p, m) for p, m in zip(self.pieces, self.moments, strict=True) if p.matrix is matrix]
        decay = self.config.weight_decay if matrix else 0.0
        if self.config.moments == "fp32":
            self._adamw([Operands(p.master, p.grad, m.exp_avg, m.exp_avg_sq) for p, m in alike], rate, decay)
            return
        for chunk in _chunks(alike):
            self._adamw_rounded(chunk, rate, decay)

    def _adamw_rounded(self, chunk: list[Operands], rate: float, decay: float) -> None:
        """A step of BF16 moments: FP32 copies of them are stepped and rounded back."""
        exact = [one._replace(exp_avg=one.exp_avg.float(), exp_avg_sq=one.exp_avg_sq.float()) for one in chunk]
        self._adamw(exact, rate, decay)
        for low, high in zip(chunk, exact, strict=True):
            low.exp_avg.copy_(high.exp_avg)
            low.exp_avg_sq.copy_(high.exp_avg_sq)

    def _adamw(self, operands: list[Operands], rate: float, decay: float) -> None:
        """One call of the fused kernel."""
        if not operands:
            return
        masters, grads, averages, squares = (list(column) for column in zip(*operands, strict=True))
        adamw(
            masters,
            grads,
            averages,
            squares,
            max_exp_avg_sqs=[],
            # The kernel counts the step by itself, so each call gets counts of its own.
            state_steps=[self.step.clone() for _ in masters],
            fused=True,
            amsgrad=False,
            beta1=self.config.betas[0],
            beta2=self.config.betas[1],
            lr=rate,
            eps=self.config.eps,
            weight_decay=decay,
            maximize=False,
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shapes of the parameters that this rank has pieces of."""
        return {piece.name: piece.shape for piece in self.pieces}

    def state(self) -> dict[tuple[str, int], dict[str, Tensor]]:
        """(parameter, first element) -> master, exp_avg, exp_avg_sq and step of each piece, and ema if averages are
        kept. The tensors are live: what is loaded into them is the new state."""
        state = {
            (p.name, p.start): {"master": p.master, "exp_avg": m.exp_avg, "exp_avg_sq": m.exp_avg_sq, "step": self.step}
            for p, m in zip(self.pieces, self.moments, strict=True)
        }
        if self.ema:
            for bucket, average in zip(self.zero.buckets, self.ema.averages, strict=True):
                for piece in bucket.pieces():
                    state[piece.name, piece.start]["ema"] = average[piece.in_shard]
        return state


class Operands(NamedTuple):
    """What AdamW reads and writes, of equal sizes."""

    master: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def part(self, start: int, end: int) -> Operands:
        return Operands(*(tensor[start:end] for tensor in self))


def _chunks(alike: list[tuple[Piece, Moments]]) -> Iterator[list[Operands]]:
    """The pieces in runs of at most CHUNK elements; a piece may be cut."""
    chunk: list[Operands] = []
    room = CHUNK
    for piece, moments in alike:
        whole = Operands(piece.master, piece.grad, moments.exp_avg, moments.exp_avg_sq)
        start, size = 0, piece.master.numel()
        while start < size:
            end = min(size, start + room)
            chunk.append(whole.part(start, end))
            room -= end - start
            start = end
            if not room:
                yield chunk
                chunk, room = [], CHUNK
    if chunk:
        yield chunk
