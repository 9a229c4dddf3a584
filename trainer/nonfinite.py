"""Steps whose gradients are not finite: the rank and tensor at fault, and when the run has to end.

The norm is summed over all ranks, so all of them skip the update together without further communication. Only then is
the cause searched, in what a rank still has of its own: its losses, its weights, and its gradients before they were
summed with those of other copies, after which every copy would have the NaN. Lowering a loss scale instead, as FP16
trainers do, helps against overflow only; with BF16's range a gradient that is not finite means bad data, a faulty
kernel or a faulty GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dryvine.comm.mesh import Mesh
from dryvine.parallel.executor import Played
from dryvine.parallel.zero import Zero
from dryvine.trainer.fp8.guard import culprits
from dryvine.trainer.ramps import Point
from dryvine.trainer.run_rows import append

NAMED = 3  # culprits of a rank in the printed line; skipped.jsonl has them all


class Diverged(RuntimeError):
    """Several steps in a row had gradients that are not finite."""


@dataclass(frozen=True)
class Blame:
    """What is not finite on a rank. A bad weight or loss spreads to all gradients that depend on it, so weights and
    losses, if any are named, are closer to the cause."""

    weights: list[str]
    losses: list[str]  # "balance.layers.4 of microbatches 0 3", in forward order: the fault is before the first
    gradients: list[str]  # this rank's own, before the sum
    sums: list[str]  # of gradients that are finite on every rank: FP32 overflowed

    def __bool__(self) -> bool:
        return any(asdict(self).values())

    def __str__(self) -> str:
        kinds = {"weight": self.weights, "": self.losses, "gradient": self.gradients, "sum of gradients": self.sums}
        named = [f"{kind} {name}".strip() for kind, names in kinds.items() for name in names]
        more = len(named) - NAMED
        return ", ".join(named[:NAMED]) + (f" and {more} more" if more > 0 else "")


@dataclass(frozen=True)
class NonfiniteStep:
    """A skipped update: the data of the step, and what was not finite on which ranks."""

    step: int
    first: int  # number of its first sequence
    sequences: int
    ranks: dict[int, Blame]

    def __str__(self) -> str:
        who = "; ".join(f"rank {rank}: {blame}" for rank, blame in self.ranks.items()) or "nothing found afterwards"
        data = f"sequences {self.first} to {self.first + self.sequences - 1}"
        return f"step {self.step} ({data}) skipped, gradients not finite: {who}"

    def append_to(self, folder: Path) -> None:
        """Add a line to skipped.jsonl."""
        append(folder, "skipped.jsonl", asdict(self))


def blame(point: Point, played: Played, zero: Zero, mesh: Mesh) -> NonfiniteStep:
    """Find what is not finite on which rank, after a reduction whose norm was not. Collective."""
    by_rank = _gather(mesh, _own(played, zero))
    if not by_rank:
        # Every rank's own gradients are finite: their sum has overflowed.
        sums = culprits((piece.name, piece.grad) for piece in zero.pieces())
        by_rank = _gather(mesh, Blame([], [], [], sums))
    return NonfiniteStep(point.step + 1, point.data_first, point.sequences, by_rank)


def diverged_line(steps: Sequence[NonfiniteStep]) -> str:
    """The error of a run that ends after consecutive skipped `steps`."""
    return (
        f"{len(steps)} steps in a row were skipped, nothing after step {steps[0].step - 1} is in the weights; "
        f"the last: {steps[-1]}; lower optim.lr, fix or leave out what is named (skipped.jsonl has every name), or "
        f"raise optim.skips; the same command goes on from the last checkpoint"
    )


def _own(played: Played, zero: Zero) -> Blame:
    members = [member for bucket in zero.buckets for member in bucket.members]
    losses = {
        name: [m for m, loss in zip(played.microbatches[name], of, strict=True) if not bool(loss.isfinite())]
        for name, of in played.losses.items()
    }
    bad_losses = [f"{name} of microbatches {' '.join(map(str, bad))}" for name, bad in losses.items() if bad]
    grads = culprits((member.name, member.grad) for member in members)
    return Blame(culprits((member.name, member.parameter.detach()) for member in members), bad_losses, grads, [])


def _gather(mesh: Mesh, own: Blame) -> dict[int, Blame]:
    """The reports of all ranks, without empty ones."""
    return {
        rank: one for rank, one in enumerate(mesh.gather(own, "what is not finite")) if isinstance(one, Blame) and one
    }
