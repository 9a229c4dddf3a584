"""The backward of a norm against plain autograd in FP64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# (rows, width): a program of the kernel with several steps, and one with a last row alone; one row; narrow; wide; too
# wide for steps that overlap; none.
SIZES = [(601, 2048), (1, 64), (300, 144), (5, 24), (3, 7168), (300, 9000), (0, 16)]
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6


def case(rows: int, width: int, dtype: torch.dtype, device: str = "cpu", residual: bool = True) -> tuple[Tensor, ...]:
    """What `norm_backward` takes. Rows of x are a slice of wider ones, as MLA's key-value latent is; the residual's
    gradient is the same for all rows, as a sum's is."""
    generator = torch.Generator().manual_seed(5)
    sizes = (rows, width), (rows, width + 8), (width,), (width,)
    dy, wide, weight, other = (torch.randn(*size, generator=generator).to(dtype).to(device) for size in sizes)
    x = wide[:, 3 : width + 3]
    inverse = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS).float()
    return dy, x, inverse, weight, *([other.expand(rows, width)] if residual else [])


def assert_near(found: tuple[Tensor, Tensor], given: tuple[Tensor, ...]) -> None:
    """dx is rounded once, and of a sum over rows no addition is lost."""
    (dx, dweight), (dy, x, inverse, weight, *residual) = found, (t.cpu() for t in given)
    assert (dx.dtype, dweight.dtype) == (x.dtype, torch.float32)
    leaves: Any = x.double().requires_grad_(), weight.double().requires_grad_()
    unit = leaves[0] * torch.rsqrt(leaves[0].square().mean(-1, keepdim=True) + EPS)
    true_dx, true_dweight = torch.autograd.grad(unit * leaves[1], leaves, dy.double())
    true_dx += sum(residual)
    rounding = 1.001 * 2**-8 if x.dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(dx.cpu().double(), true_dx, rtol=rounding, atol=1e-5)
    terms = (dy.double() * x.double() * inverse.double()).abs().sum(0)
    # Three roundings a term, and those of the additions on a sum's way.
    assert ((dweight.cpu().double() - true_dweight).abs() <= 2.0**-24 * 16 * terms).all()
