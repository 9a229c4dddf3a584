"""AdamW's arithmetic on flat parts of the state, by whichever library has it for the place where the state is.

torch's fused kernel runs on a GPU and on a CPU. For state in host memory DeepSpeed's CPU Adam is preferred where it can
be built (a C++ compiler, and DeepSpeed installed): it is compiled for the machine's own vectors. Both divide the last
elements of a call between vector and scalar code, which round differently; callers pass whole vectors
(`buckets.LANES`).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, cast

from torch import Tensor
from torch.optim.adamw import adamw

from dryvine.comm.mesh import Mesh
from dryvine.trainer.cpu_adam import CpuAdamOp, load_cpu_adam
from dryvine.trainer.ramps import OptimConfig


class Operands(NamedTuple):
    """What AdamW reads and writes, of equal sizes."""

    master: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def part(self, start: int, end: int) -> Operands:
        return Operands(*(tensor[start:end] for tensor in self))


class AdamW(Protocol):
    """Steps FP32 operands in place. `updates` are those made before."""

    name: str

    def __call__(self, on: Operands, updates: Tensor, rate: float, decay: float) -> None: ...


class TorchAdamW:
    """torch's fused kernel, of whichever device the operands are on."""

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
            # The kernel counts the step by itself, so each call gets a count of its own.
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
    """DeepSpeed's CPU Adam, by its compiled module: its optimizer class would own parameters and steps.

    The module's object multiplies up powers of the betas from call to call where steps follow each other, and takes
    them anew where they do not. With one object a call, bits depend on the number of the step alone, and not on how
    many parts a step has or whether the run was restarted.
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
    """What steps state that is in host memory, the same on all ranks, and a line that says so. Collective."""
    own = load_cpu_adam()
    reasons = cast(list[str], mesh.gather(own if isinstance(own, str) else "", "who has DeepSpeed's CPU Adam"))
    lacking = next(((rank, reason) for rank, reason in enumerate(reasons) if reason), None)
    if isinstance(own, str) or lacking:
        rank, reason = lacking or (mesh.rank, "")
        made: AdamW = TorchAdamW(config)
        why = f", as rank {rank} has no {DeepSpeedAdamW.name} ({reason})"
    else:
        made, why = DeepSpeedAdamW(config, own), ""
    return made, f"optim.offload: masters and moments in host memory, stepped by {made.name}{why}"
