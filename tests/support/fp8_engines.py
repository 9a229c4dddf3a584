"""Stand-ins for deep_gemm and transformer_engine: they multiply on a CPU, and refuse what the packages refuse.

What is asserted is what their sources assert or, where a kernel would go wrong unasked, assume: DeepGEMM 2.8.0
(csrc/apis/gemm.hpp, csrc/utils/layout.hpp, sm90_fp8_gemm_*.hpp), Transformer Engine 2.20.2 (cublaslt_gemm.cu,
cpp_extensions/gemm.py, float8_blockwise_tensor_storage.py). They return what E4M3 values times scales are in FP64.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dryvine.comm.integers import round_up

Pair = tuple[Tensor, Tensor]
E4M3 = torch.float8_e4m3fn


def wide(values: Tensor, scales: Tensor, tile: tuple[int, int]) -> Tensor:
    """FP64 values of a matrix [R, C] with scales [R / tile[0], C / tile[1]]."""
    rows, cols = values.shape
    whole = scales.double().repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)
    return values.double() * whole[:rows, :cols]


# ---- deep_gemm


def _k_major(t: Tensor) -> None:
    assert t.dtype == E4M3
    assert t.stride(-1) == 1
    assert t.dim() == 2 or t.stride(0) == t.shape[1] * t.shape[2], "batches next to each other"
    assert t.stride(-2) % 16 == 0, "TMA: rows 16 bytes apart or a multiple"
    assert t.data_ptr() % 16 == 0


def _row_scales(scales: Tensor, mn: int, k: int) -> None:
    """check_sf_layout for 1x128, and what get_mn_major_tma_aligned_tensor takes as it is: then TMA reads it."""
    assert scales.dtype == torch.float32
    assert scales.shape == (mn, round_up(k, 128) // 128)
    if scales.stride() == (1, round_up(mn, 4)):
        assert scales.data_ptr() % 16 == 0, "TMA: the address"


def _blocks(scales: Tensor, n: int, k: int) -> None:
    """check_sf_layout for 128x128 with sm90_sfb_check."""
    assert scales.dtype == torch.float32
    assert scales.shape[-2:] == (round_up(n, 128) // 128, round_up(k, 128) // 128)
    rows, cols = scales.shape[-2:]
    if scales.dim() == 3:
        assert scales.stride(-3) == rows * cols
    assert (scales.stride(-1) == 1 and scales.stride(-2) == cols) or scales.stride()[-2:] == (1, rows)


def _d(d: Tensor, m: int, n: int) -> None:
    assert d.shape == (m, n)
    assert d.stride(-1) == 1
    assert d.stride(-2) * d.element_size() % 16 == 0, "TMA"


def fp8_gemm_nt(
    a: Pair,
    b: Pair,
    d: Tensor,
    c: Tensor | None = None,
    recipe: tuple[int, int, int] = (1, 128, 128),
    compiled_dims: str = "nk",
) -> None:
    (m, k), (n, k_b) = a[0].shape, b[0].shape
    assert k == k_b
    for operand in (a[0], b[0]):
        _k_major(operand)
    _d(d, m, n)
    if not (m and n):
        return
    _row_scales(a[1], m, k)
    if recipe == (1, 128, 128):
        assert c is None
        assert d.dtype == torch.bfloat16
        _blocks(b[1], n, k)
        d.copy_(wide(*a, (1, 128)) @ wide(*b, (128, 128)).t())
        return
    assert recipe == (1, 1, 128)
    assert c is not None
    assert c.dtype == d.dtype == torch.float32
    assert c.stride() == d.stride()
    _row_scales(b[1], n, k)
    assert a[0].stride(0) == b[0].stride(0) == k, "the kernel takes rows to be K apart"
    assert "k" not in compiled_dims, "a kernel for every number of tokens"
    total = c.double() + wide(*a, (1, 128)) @ wide(*b, (1, 128)).t()
    d.copy_(total)


def m_grouped_fp8_gemm_nt_contiguous(a: Pair, b: Pair, d: Tensor, grouped_layout: Tensor) -> None:
    (m, k), (experts, n, k_b) = a[0].shape, b[0].shape
    assert k == k_b
    assert min(n, k, experts) > 0
    for operand in (a[0], b[0]):
        _k_major(operand)
    _d(d, m, n)
    assert d.dtype == torch.bfloat16
    assert grouped_layout.dtype == torch.int32
    assert grouped_layout.is_contiguous()
    assert grouped_layout.shape == (m,)
    assert m % 128 == 0, "get_mk_alignment_for_contiguous_layout"
    _row_scales(a[1], m, k)
    _blocks(b[1], n, k)
    left = wide(*a, (1, 128))
    for first in range(0, m, 128):
        block = slice(first, first + 128)
        (expert,) = set(grouped_layout[block].tolist()) - {-1}
        d[block] = (left[block] @ wide(b[0][expert], b[1][expert], (128, 128)).t()).to(d.dtype)


def k_grouped_fp8_gemm_nt_contiguous(*_: object) -> None:
    raise AssertionError("races on Hopper through 2.6.1")


# ---- transformer_engine


class Storage:
    """Float8BlockwiseQTensorStorage."""

    def __init__(
        self,
        rowwise_data: Tensor,
        rowwise_scale_inv: Tensor,
        columnwise_data: None,
        columnwise_scale_inv: None,
        fp8_dtype: str,
        quantizer: None,
        is_2D_scaled: bool,
    ) -> None:
        rows, cols = rowwise_data.shape
        across = round_up(cols, 128) // 128
        assert rowwise_data.dtype == torch.uint8
        assert rowwise_data.is_contiguous()
        assert fp8_dtype == "e4m3"
        assert rowwise_scale_inv.dtype == torch.float32
        assert rowwise_scale_inv.is_contiguous(), "only the address and the shape reach cuBLAS"
        # get_scale_shape
        shape = (round_up(rows, 128) // 128, round_up(across, 4)) if is_2D_scaled else (across, round_up(rows, 4))
        assert rowwise_scale_inv.shape == shape
        assert rowwise_scale_inv.data_ptr() % 16 == 0
        self.data, self.scales, self.two = rowwise_data, rowwise_scale_inv, is_2D_scaled

    def wide(self) -> Tensor:
        values = self.data.view(E4M3)
        return wide(values, self.scales, (128, 128)) if self.two else wide(values, self.scales.t(), (1, 128))


def general_gemm(
    A: Storage,
    B: Storage,
    out_dtype: torch.dtype,
    *,
    layout: str,
    out: Tensor,
    accumulate: bool = False,
    use_split_accumulator: bool = True,  # set by general_gemm itself, not by its grouped sister
) -> None:
    """out [rows of B, rows of A] (+)= B Aᵀ."""
    assert layout == "TN", "the others read copies by columns"
    (m, k), (n, k_b) = A.data.shape, B.data.shape
    assert k == k_b
    assert out.shape == (n, m)
    assert out.is_contiguous()
    assert out.dtype == out_dtype
    if not (m and n):
        return
    assert k % 16 == 0, "Leading dimension requirement"
    assert m % 8 == 0, "Outer dimension requirement on A"
    assert B.two or n % 8 == 0, "Outer dimension requirement on B"
    assert not (A.two and B.two), "2D by 2D"
    assert use_split_accumulator
    product = B.wide() @ A.wide().t()
    out.copy_(out.double() + product if accumulate else product)


def general_grouped_gemm(
    A: list[Storage],
    B: list[Storage],
    out: list[Tensor],
    quantization_params: list[None],
    out_dtype: torch.dtype,
    layout: str = "TN",
    m_splits: list[int] | None = None,
    accumulate: bool = False,
    use_split_accumulator: bool = False,
) -> None:
    assert len(A) == len(B) == len(out) == len(quantization_params) > 0
    assert m_splits is not None, "a std::vector"
    assert m_splits == [len(b.data) for b in B]
    for a, b, one in zip(A, B, out, strict=True):
        general_gemm(
            a,
            b,
            out_dtype,
            layout=layout,
            out=one,
            accumulate=accumulate,
            use_split_accumulator=use_split_accumulator,
        )


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(content)
    return module


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-ins where `import` finds them."""
    dtype = type("DType", (), {"kFloat8E4M3": "e4m3"})
    kernels = (fp8_gemm_nt, m_grouped_fp8_gemm_nt_contiguous, k_grouped_fp8_gemm_nt_contiguous)
    top = "transformer_engine.pytorch"
    for module in (
        _module("deep_gemm", __version__="2.8.0", **{kernel.__name__: kernel for kernel in kernels}),
        _module("transformer_engine_torch", DType=dtype),
        _module("transformer_engine"),
        _module(top),
        _module(f"{top}.tensor", Float8BlockwiseQTensorStorage=Storage),
        _module(f"{top}.cpp_extensions", general_gemm=general_gemm, general_grouped_gemm=general_grouped_gemm),
    ):
        monkeypatch.setitem(sys.modules, module.__name__, module)
