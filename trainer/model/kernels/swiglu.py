"""`model/swiglu.py` on a GPU, one kernel each way: a program takes a row, so that the gradient of the row's weight is
summed in FP32 in one order and needs no second pass. FP32 inside, rounded once.

Bytes moved for an element of F in BF16: forward 6, backward 10. Legend as in model/swiglu.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # columns at a time: 16 bytes of each tensor for a thread


@triton.jit
def gated_kernel(h, weights, y, F, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    for first in range(0, F, BLOCK):
        c = first + tl.arange(0, BLOCK)
        gate = tl.load(h + row * 2 * F + c, mask=c < F, other=0.0).to(tl.float32)
        up = tl.load(h + row * 2 * F + F + c, mask=c < F, other=0.0).to(tl.float32)
        out = gate / (1.0 + tl.exp(-gate)) * up
        if WEIGHTED:
            weight = tl.load(weights + row).to(tl.float32)
            out = tl.where(weight == 0.0, 0.0, out * weight)
        tl.store(y + row * F + c, out.to(y.dtype.element_ty), mask=c < F)


@triton.jit
def gated_backward_kernel(dy, h, weights, dh, dweights, F, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    # Of the row's weight: every column's dy * silu(gate) * up, added up at the end.
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, F, BLOCK):
        c = first + tl.arange(0, BLOCK)
        gate = tl.load(h + row * 2 * F + c, mask=c < F, other=0.0).to(tl.float32)
        up = tl.load(h + row * 2 * F + F + c, mask=c < F, other=0.0).to(tl.float32)
        d = tl.load(dy + row * F + c, mask=c < F, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        if WEIGHTED:
            total += d * silu * up
            d = d * tl.load(weights + row).to(tl.float32)
        # d silu(gate) / d gate
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(dh + row * 2 * F + c, (d * up * slope).to(dh.dtype.element_ty), mask=c < F)
        tl.store(dh + row * 2 * F + F + c, (d * silu).to(dh.dtype.element_ty), mask=c < F)
    if WEIGHTED:
        tl.store(dweights + row, tl.sum(total, 0).to(dweights.dtype.element_ty))


def swiglu_forward(gate_up_N2F: Tensor, weights_N: Tensor | None) -> Tensor:
    rows, width = gate_up_N2F.shape[0], gate_up_N2F.shape[1] // 2
    h, y = gate_up_N2F.contiguous(), gate_up_N2F.new_empty(rows, width)
    if rows:
        # A kernel without weights never reads them: any pointer will do.
        weights = h if weights_N is None else weights_N.contiguous()
        gated_kernel[(rows,)](
            h, weights, y, width, weights_N is not None, min(BLOCK, triton.next_power_of_2(width)), num_warps=8
        )
    return y


def swiglu_backward(dy_NF: Tensor, gate_up_N2F: Tensor, weights_N: Tensor | None) -> tuple[Tensor, Tensor | None]:
    rows, width = dy_NF.shape
    dy, h = dy_NF.contiguous(), gate_up_N2F.contiguous()
    weights = None if weights_N is None else weights_N.contiguous()
    dh, dweights = torch.empty_like(h), None if weights is None else torch.empty_like(weights)
    if rows:
        gated_backward_kernel[(rows,)](
            dy, h, h if weights is None else weights, dh, h if dweights is None else dweights, width,
            weights is not None, min(BLOCK, triton.next_power_of_2(width)), num_warps=8,
        )  # fmt: skip
    return dh, dweights
