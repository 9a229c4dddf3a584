"""AdamW in FP64, to compare implementations with."""

from __future__ import annotations

from torch import Tensor

from dryvine.trainer.ramps import OptimConfig

HALF_ULP = {"fp32": 2.0**-22, "bf16": 2.0**-8 * 1.001}  # relative; FP32's with room for its own arithmetic


def fp64_adamw(
    before: dict[str, Tensor], grad: Tensor, rate: float, decay: float, config: OptimConfig
) -> dict[str, Tensor]:
    """The master and moments after an update (arXiv 1711.05101); `before` also has `step`, the updates made so far."""
    (b1, b2), t = config.betas, float(before["step"]) + 1
    master, first, second = (before[k].double() for k in ("master", "exp_avg", "exp_avg_sq"))
    first, second = b1 * first + (1 - b1) * grad, b2 * second + (1 - b2) * grad**2
    slope = first / (1 - b1**t) / ((second / (1 - b2**t)).sqrt() + config.eps)
    return {"master": master * (1 - rate * decay) - rate * slope, "exp_avg": first, "exp_avg_sq": second}
