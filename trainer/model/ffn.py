"""The SwiGLU FFN of dense layers and of shared experts, applied to every token. Legend: N tokens, H hidden."""

from __future__ import annotations

from torch import Tensor, nn

from dryvine.trainer.fp8.ffn import FP8FFN
from dryvine.trainer.model.recompute import through
from dryvine.trainer.model.spec import Spec
from dryvine.trainer.model.swiglu import swiglu
from dryvine.trainer.tensors.quantized import Quantized


class FFN(nn.Module):
    """[N, H] -> [N, H]. `gate_up` stacks both projections, the gate's first."""

    def __init__(self, spec: Spec, width: int) -> None:
        super().__init__()
        self.gate_up = spec.linear(spec.shape.hidden, 2 * width)
        self.down = spec.linear(width, spec.shape.hidden)
        self.fp8, self.again = spec.fp8, "swiglu" in spec.shape.recompute

    def forward(self, x_NH: Tensor, rows: Quantized | None = None) -> Tensor:
        """`rows`: x in FP8, if the preceding norm has cast it."""
        if self.fp8 is not None:
            ffn = FP8FFN(self.fp8, self.gate_up.weight, self.down.weight, self.fp8.all_rows(x_NH))
            return ffn(x_NH, rows=rows)
        gate_up = self.gate_up(x_NH)
        return through(lambda: (swiglu(gate_up),), self.down, self.again)
