"""AdamW over the pieces this rank owns, and the clip.

torch's fused AdamW does the arithmetic; FP32 masters, summed gradients and sharding come from `parallel.zero`. The
norm is taken over the owned pieces of all ranks, so it counts every parameter once whatever the layout.
"""

from __future__ import annotations

import torch

from dryvine.parallel.zero import Piece, Zero
from dryvine.trainer.plan import OptimConfig


class Optimizer:
    """AdamW on this rank's pieces of the parameters. Matrices decay, vectors (norm weights) do not."""

    def __init__(self, zero: Zero, config: OptimConfig) -> None:
        self.zero, self.config = zero, config
        self.pieces = list(zero.pieces())
        groups = [
            {"params": [p.master for p in self.pieces if p.matrix is matrix], "weight_decay": decay}
            for matrix, decay in ((True, config.weight_decay), (False, 0.0))
        ]
        self.adam = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)

    def reduce(self, scale: float) -> float:
        """Sum the gradients, which are `scale` times the true ones, over all their copies and give the true global
        norm; each rank then holds its pieces, still scaled."""
        self.zero.reduce()
        return float(self.zero.grad_norm()) / scale

    def update(self, rate: float, norm: float, scale: float) -> None:
        """Clip by the global norm, step the masters, give every copy the new values. The pass that clips unscales."""
        clip = min(1.0, self.config.clip / (norm + 1e-6))
        for bucket in self.zero.buckets:
            bucket.shard.mul_(clip / scale)
        for piece in self.pieces:
            piece.master.grad = piece.grad
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.zero.publish()

    def state(self) -> dict[tuple[str, int], dict[str, torch.Tensor]]:
        """(parameter, first element) -> master, exp_avg, exp_avg_sq and step of each piece; live tensors.

        The moments of a piece that has never stepped are made here, zero, so that a checkpoint can be loaded into them.
        """
        return {(piece.name, piece.start): {"master": piece.master, **self._moments(piece)} for piece in self.pieces}

    def _moments(self, piece: Piece) -> dict[str, torch.Tensor]:
        state = self.adam.state[piece.master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=piece.master.device)
            state["exp_avg"] = torch.zeros_like(piece.master)
            state["exp_avg_sq"] = torch.zeros_like(piece.master)
        return dict(state)
