"""The cast kernels under Triton's CPU interpreter, bit for bit against their definitions. Run by test_fp8_kernels.py.

Its own process: TRITON_INTERPRET must be set before triton is first imported, and the interpreter's casts are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dryvine.comm.dispatch.counts import DeviceCounts
from dryvine.trainer.fp8 import casts, fused
from dryvine.trainer.tensors.groups import ExpertGroups, tables_of
from dryvine.trainer.tensors.quantized import E5M6, Quantized
from tests.support.interpreter import right_casts


@pytest.fixture(autouse=True, scope="module")
def _right_casts() -> Iterator[None]:
    with right_casts():
        yield


def _inputs() -> dict[str, Callable[..., Tensor]]:
    generator = torch.Generator().manual_seed(7)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def spread(*size: int) -> Tensor:
        return normal(*size) * 10.0 ** (torch.rand(*size, generator=generator) * 12 - 8)

    def fault(*size: int) -> Tensor:
        x = normal(*size)
        x[0, 0], x[1, 3], x[2, -1], x[-1, 5] = torch.nan, torch.inf, -torch.inf, -0.0
        return x

    return {
        "normal": normal,
        "spread": spread,
        "zero": lambda *size: torch.zeros(size),
        "subnormal": lambda *size: normal(*size) * 2.0**-130,
        "huge": lambda *size: normal(*size) * 1e37,
        "not finite": fault,
    }


INPUTS = _inputs()


def _parts(value: Any) -> list[Tensor]:
    if isinstance(value, Quantized):
        return [value.values.view(torch.uint8), value.scales]
    if isinstance(value, E5M6):
        return [value.high, value.low, value.scales]
    return [value] if isinstance(value, Tensor) else [part for item in value for part in _parts(item)]


def _bits(x: Tensor) -> Tensor:
    """Integers to compare; a NaN is a NaN, whatever its payload."""
    if not x.is_floating_point():
        return x
    return torch.where(x.isnan(), torch.full_like(x, torch.nan), x).view({2: torch.int16, 4: torch.int32}[x.itemsize])


def _same(kernel: Any, defined: Any) -> None:
    for ours, theirs in zip(_parts(kernel), _parts(defined), strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        different = _bits(ours.contiguous()) != _bits(theirs.contiguous())
        assert not different.any(), f"{int(different.sum())} of {different.numel()} differ"


@pytest.mark.parametrize("scales", ["fp32", "ue8m0"])
@pytest.mark.parametrize("kind", INPUTS)
def test_rows(kind: str, scales: Any) -> None:
    for shape in [(5, 128), (33, 200), (0, 128)]:
        x = INPUTS[kind](*shape).bfloat16() if shape[0] else torch.empty(shape, dtype=torch.bfloat16)
        _same(casts.quantize_rows.kernel(x, scales), casts.quantize_rows(x, scales))


@pytest.mark.parametrize(
    ("kind", "counts"), [*((kind, (0, 129, 0, 3)) for kind in INPUTS), ("normal", (40,)), ("not finite", (128, 1))]
)
def test_columns(kind: str, counts: tuple[int, ...]) -> None:
    groups = ExpertGroups(counts, torch.device("cpu"))
    x = INPUTS[kind](sum(counts), 200).bfloat16()
    _same(casts.quantize_both.kernel(x, groups), casts.quantize_both(x, groups))
    saved = casts.quantize_rows(x)
    _same(casts.quantize_columns.kernel(saved, groups, "ue8m0"), casts.quantize_columns(saved, groups, "ue8m0"))


COUNTS = (0, 129, 256, 1, 0)


def test_tables_of_counts_on_the_device() -> None:
    for counts in (COUNTS, (0, 0), (700,), (1,) * 130):
        ours, theirs = (ExpertGroups(counts, torch.device("cpu")).tables, known(counts).tables)
        made = tables_of.kernel(torch.tensor(counts), sum(counts), known(counts).blocks)
        assert [t.tolist() for t in made] == [t.tolist() for t in theirs]
        live = int(ours.starts[-1])
        assert theirs.blocks[:live].tolist() == ours.blocks.tolist()
        assert (theirs.blocks[live:, 1] == theirs.blocks[live:, 2]).all()


def test_casts_by_counts_on_the_device() -> None:
    """More blocks than there are: the live ones are the same, and nothing is written beyond the last."""
    x, exact, bound = (
        INPUTS["normal"](sum(COUNTS), 200).bfloat16(),
        ExpertGroups(COUNTS, torch.device("cpu")),
        known(COUNTS),
    )
    live = exact.blocks
    assert bound.blocks > live
    kept = casts.quantize_rows(x)
    for ours, theirs in (
        (casts.quantize_both.kernel(x, bound)[1], casts.quantize_both(x, exact)[1]),
        (casts.quantize_columns.kernel(kept, bound), casts.quantize_columns(kept, exact)),
    ):
        _same(Quantized(ours.values[:, : 128 * live], ours.scales[:, :live]), theirs)


def known(counts: tuple[int, ...]) -> ExpertGroups:
    """Groups whose host knows the sum of the counts alone."""
    return ExpertGroups(DeviceCounts(torch.tensor(counts), sum(counts)), torch.device("cpu"))


def test_no_rows_at_all() -> None:
    groups = ExpertGroups((0, 0), torch.device("cpu"))
    x = torch.empty(0, 256, dtype=torch.bfloat16)
    _same(casts.quantize_both.kernel(x, groups), casts.quantize_both(x, groups))


@pytest.mark.parametrize(("kind", "shape"), [*((kind, (2, 144, 208)) for kind in INPUTS), ("normal", (256, 128))])
def test_blocks(kind: str, shape: tuple[int, ...]) -> None:
    w = INPUTS[kind](*shape) if len(shape) == 2 else torch.stack([INPUTS[kind](*shape[1:]) for _ in range(shape[0])])
    for scales in ("fp32", "ue8m0"):
        whole, transposed = casts.quantize_blocks(w, scales)  # type: ignore[arg-type]
        _same(casts.quantize_blocks.kernel(w, scales), (whole, transposed))
        _same(casts.transpose_blocks.kernel(whole), transposed)
        _same(casts.transpose_blocks(whole), transposed)


@pytest.mark.parametrize(("kind", "weighted"), [("spread", True), ("not finite", True), ("subnormal", False)])
def test_swiglu(kind: str, weighted: bool) -> None:
    counts = (0, 129, 2)
    groups = ExpertGroups(counts, torch.device("cpu"))
    h, dy = INPUTS[kind](131, 512).bfloat16(), INPUTS["normal"](131, 256).bfloat16()
    weights = INPUTS["normal"](131, 1).flatten() if weighted else None
    _same(fused.swiglu_rows.kernel(h, weights), fused.swiglu_rows(h, weights))
    kept = casts.quantize_rows(h)
    ours = fused.swiglu_backward.kernel(dy, kept, weights, groups)
    theirs = fused.swiglu_backward(dy, kept, weights, groups)
    _same(ours[:3], theirs[:3])
    if weighted:
        gate, up = kept.dequantize().chunk(2, -1)
        terms = dy.float() * torch.nn.functional.silu(gate) * up
        bound = 8 * 2.0**-24 * terms.abs().sum(-1)  # 256 terms by a tree: eight roundings of at most all magnitudes
        finite = theirs[3].isfinite()
        assert (finite == ours[3].isfinite()).all()
        assert ((ours[3] - theirs[3]).abs() <= bound)[finite].all()


@pytest.mark.parametrize("kind", INPUTS)
def test_rmsnorm(kind: str) -> None:
    x, weight = INPUTS[kind](4, 384).bfloat16(), INPUTS["normal"](384, 1).flatten()
    _same(fused.rmsnorm_rows.kernel(x, weight, 1e-6), fused.rmsnorm_rows(x, weight, 1e-6))
    part = torch.cat((x, x), 1)[:, :384]  # as the latent of MLA comes, in wider rows
    _same(fused.rmsnorm_rows.kernel(part, weight, 1e-6), fused.rmsnorm_rows(part, weight, 1e-6))


@pytest.mark.parametrize("kind", INPUTS)
def test_e5m6(kind: str) -> None:
    x = INPUTS[kind](37, 256).bfloat16()
    packed = casts.pack_e5m6(x)
    _same(casts.pack_e5m6.kernel(x), packed)
    _same(casts.unpack_e5m6.kernel(packed), casts.unpack_e5m6(packed))
