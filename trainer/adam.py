"""AdamW on flat slices of the state: by a library's kernel on a CPU, by our own on a GPU.

On a GPU (`adam_kernel.py`) the clip, the update and the cast to the weights' dtype are one pass over memory; torch's
fused kernel needs one pass more for each of the other two, and has no BF16 moments in torch 2.11. On a CPU torch's
fused kernel is used. For state in host memory DeepSpeed's CPU Adam is preferred where it can be built (a C++ compiler,
and DeepSpeed installed): it is compiled for the machine's vector instructions. Both CPU kernels process the last
elements of a call with scalar code, which rounds differently; callers pass multiples of the vector width
(`buckets.LANES`).

Matrices decay and vectors do not; both lie in one shard, matrices first. The kernel updates both in one launch: with
one for each, a GPU was idle while the host issued the next, about 0.1 ms a bucket. CPU kernels take one decay a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from dryvine.comm.mesh import Mesh
from dryvine.trainer.cpu_adam import CpuAdamOp, load_cpu_adam
from dryvine.trainer.ramps import OptimConfig

CHUNK = 1 << 24  # elements of BF16 moments that are FP32 at one time: 128 MiB for both


class Operands(NamedTuple):
    """What AdamW reads and writes: four flat tensors of equal length."""

    master: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    matrices: int  # the first so many elements are of matrices, the rest of vectors

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self[:4]

    def map(self, function: Callable[[Tensor], Tensor]) -> Operands:
        """With what `function` makes of each tensor."""
        master, grad, exp_avg, exp_avg_sq = map(function, self.tensors)
        return Operands(master, grad, exp_avg, exp_avg_sq, self.matrices)

    def part(self, where: slice) -> Operands:
        start, end, _ = where.indices(len(self.master))
        inside = min(max(self.matrices - start, 0), end - start)
        return self.map(lambda tensor: tensor[where])._replace(matrices=inside)


class Update(NamedTuple):
    """What an update is, beside its operands."""

    rate: float  # learning rate
    factor: float  # gradients are multiplied by it first: it undoes the loss scale, and clips
    decay: float  # weight decay, of matrices


class AdamW(Protocol):
    """Updates a master and its moments in place, and sets `weights`, if given, to the new master, rounded to their
    dtype. `updates` is the number of updates made before. The gradient is undefined afterwards."""

    name: str

    def __call__(self, on: Operands, updates: Tensor, update: Update, weights: Tensor | None = None) -> None: ...


def _by_decay(on: Operands, decay: float) -> Iterator[tuple[Operands, float]]:
    """The matrices and the vectors, where there are any, each with its decay."""
    if on.matrices:
        yield on.part(slice(0, on.matrices)), decay
    if on.matrices < len(on.master):
        yield on.part(slice(on.matrices, len(on.master))), 0.0


class TorchAdamW:
    """torch's fused kernel on a CPU, for FP32 operands."""

    name = "torch's fused AdamW"

    def __init__(self, config: OptimConfig) -> None:
        self.config = config

    def __call__(self, on: Operands, updates: Tensor, update: Update, weights: Tensor | None = None) -> None:
        on.grad.mul_(update.factor)
        for part, decay in _by_decay(on, update.decay):
            self._step(part, updates, update.rate, decay)
        if weights is not None:
            weights.copy_(on.master)

    def _step(self, on: Operands, updates: Tensor, rate: float, decay: float) -> None:
        adamw(
            [on.master],
            [on.grad],
            [on.exp_avg],
            [on.exp_avg_sq],
            max_exp_avg_sqs=[],
            # The kernel increments the count, so each call gets a copy.
            state_steps=[updates.clone()],
            fused=True,
            amsgrad=False,
            beta1=self.config.betas[0],
            beta2=self.config.betas[1],
            lr=rate,
            eps=self.config.eps,
            weight_decay=decay,
            maximize=False,
        )


class DeepSpeedAdamW:
    """DeepSpeed's CPU Adam, called through its compiled module: its optimizer class would own parameters and steps.

    The module's object updates powers of the betas incrementally while steps are consecutive, and recomputes them
    otherwise. With a new object for each call, results depend on the number of the step alone, and not on how many
    slices a step has or whether the run was restarted.
    """

    name = "DeepSpeed's CPU Adam"

    def __init__(self, config: OptimConfig, op: CpuAdamOp) -> None:
        self.config, self._op = config, op

    def __call__(self, on: Operands, updates: Tensor, update: Update, weights: Tensor | None = None) -> None:
        on.grad.mul_(update.factor)
        for part, decay in _by_decay(on, update.decay):
            settings = (update.rate, *self.config.betas, self.config.eps, decay)
            number, adamw_mode, log, correct_bias = 0, True, False, True
            self._op.create_adam(number, *settings, adamw_mode, log)
            self._op.adam_update(number, int(updates) + 1, *settings, correct_bias, *part.tensors)
        if weights is not None:
            weights.copy_(on.master)


class RoundedMoments:
    """AdamW on BF16 moments by an implementation for FP32: by FP32 copies of a bounded chunk at a time, rounded back to
    nearest."""

    def __init__(self, exact: AdamW) -> None:
        self.exact, self.name = exact, exact.name

    def __call__(self, on: Operands, updates: Tensor, update: Update, weights: Tensor | None = None) -> None:
        for start in range(0, len(on.master), CHUNK):
            part = slice(start, start + CHUNK)
            self._step(on.part(part), updates, update, None if weights is None else weights[part])

    def _step(self, on: Operands, updates: Tensor, update: Update, weights: Tensor | None) -> None:
        exact = on._replace(exp_avg=on.exp_avg.float(), exp_avg_sq=on.exp_avg_sq.float())
        self.exact(exact, updates, update, weights)
        on.exp_avg.copy_(exact.exp_avg)
        on.exp_avg_sq.copy_(exact.exp_avg_sq)


def adam_on(device: torch.device, config: OptimConfig) -> AdamW:
    """The AdamW for state on `device`."""
    if device.type == "cuda":
        from dryvine.trainer.adam_kernel import KernelAdamW  # needs triton, which only GPU hosts must have

        return KernelAdamW(config)
    return for_moments(TorchAdamW(config), config)


def for_moments(adam: AdamW, config: OptimConfig) -> AdamW:
    """`adam`, which takes FP32 moments, for those of the config."""
    return adam if config.moments == "fp32" else RoundedMoments(adam)


def choose_adam(config: OptimConfig, mesh: Mesh) -> tuple[AdamW, str]:
    """The AdamW for state in host memory, the same on all ranks, and a log line that names it. Collective."""
    own = load_cpu_adam()
    reasons = cast(list[str], mesh.gather(own if isinstance(own, str) else "", "who has DeepSpeed's CPU Adam"))
    lacking = next(((rank, reason) for rank, reason in enumerate(reasons) if reason), None)
    if isinstance(own, str) or lacking:
        rank, reason = lacking or (mesh.rank, "")
        made: AdamW = TorchAdamW(config)
        why = f", as rank {rank} has no {DeepSpeedAdamW.name} ({reason})"
    else:
        made, why = DeepSpeedAdamW(config, own), ""
    # torchrun allows a rank one unless OMP_NUM_THREADS says otherwise, and the update is as slow as that.
    threads = torch.get_num_threads()
    count = "1 thread" if threads == 1 else f"{threads} threads"
    return for_moments(
        made, config
    ), f"optim.offload: masters and moments in host memory, stepped by {made.name} on {count}{why}"
