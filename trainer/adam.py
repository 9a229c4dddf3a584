"""AdamW on flat slices of the state, by a library's kernel for the device on which the state is.

torch's fused kernel runs on a GPU and on a CPU. For state in host memory DeepSpeed's CPU Adam is preferred where it can
be built (a C++ compiler, and DeepSpeed installed): it is compiled for the machine's vector instructions. Both process
the last elements of a call with scalar code, which rounds differently; callers pass multiples of the vector width
(`buckets.LANES`).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from dryvine.comm.mesh import Mesh
from dryvine.trainer.cpu_adam import CpuAdamOp, load_cpu_adam
from dryvine.trainer.ramps import OptimConfig


class Operands(NamedTuple):
    """What AdamW reads and writes: four flat tensors of equal length."""

    master: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def part(self, start: int, end: int) -> Operands:
        return Operands(*(tensor[start:end] for tensor in self))


class AdamW(Protocol):
    """Updates FP32 operands in place. `updates` is the number of updates made before."""

    name: str

    def __call__(self, on: Operands, updates: Tensor, rate: float, decay: float) -> None: ...


class TorchAdamW:
    """torch's fused kernel, on the device of the operands."""

    name = "torch's fused AdamW"

    def __init__(self, config: OptimConfig) -> None:
        self.config = config

    def __call__(self, on: Operands, updates: Tensor, rate: float, decay: float) -> None:
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

    def __call__(self, on: Operands, updates: Tensor, rate: float, decay: float) -> None:
        settings = (rate, *self.config.betas, self.config.eps, decay)
        number, adamw_mode, log, correct_bias = 0, True, False, True
        self._op.create_adam(number, *settings, adamw_mode, log)
        self._op.adam_update(number, int(updates) + 1, *settings, correct_bias, *on)


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
    return made, f"optim.offload: masters and moments in host memory, stepped by {made.name} on {count}{why}"
