"""The engines that run on this GPU, on their real packages: no product errs more than its operands, by the recipe."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dryvine.trainer.fp8 import casts
from dryvine.trainer.fp8.engines.names import ENGINES, make_engine
from dryvine.trainer.fp8.engines.protocol import Engine
from dryvine.trainer.fp8.trial import fault
from dryvine.trainer.tensors.groups import ExpertGroups
from dryvine.trainer.tensors.quantized import Quantized

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU = torch.device("cuda")
GROUPS = [(100, 0, 28, 129), (1, 7), (0, 128), (256,), (4096, 4096)]


@pytest.fixture(params=[name for name in ENGINES if name != "emulate"])
def engine(request: pytest.FixtureRequest) -> Engine:
    made = make_engine(request.param)
    if reason := made.missing(GPU):
        pytest.skip(f"{request.param} {reason}")
    return made


def normal(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))).to(GPU)


def wide(q: Quantized) -> Tensor:
    return q.dequantize().double()


def holds(ours: Tensor, exact: Tensor, truth: Tensor) -> None:
    """`exact`: the product of the operands as they were cast, in FP64; `truth`: of what they were cast from."""
    allowed, error, own = (
        float((a.double() - b).norm() / b.norm()) for a, b in ((exact, truth), (ours, truth), (ours, exact))
    )
    print(f"error {error:.5f}, of the casts {allowed:.5f}; of the product alone {own:.1e}")
    assert error <= 1.05 * allowed
    assert own <= (4e-3 if ours.dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "n", "k"), [(70, 112, 144), (256, 384, 640), (3, 128, 128), (4096, 2048, 7168)])
def test_dense_products(engine: Engine, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, w = normal(m, k), normal(n, k)
    a, b = casts.quantize_rows(x), casts.quantize_blocks(w)[0]
    holds(engine.product(a, b, None, dtype), wide(a) @ wide(b).t(), x.double() @ w.double().t())


@pytest.mark.parametrize("counts", GROUPS, ids=str)
def test_grouped_products(engine: Engine, counts: tuple[int, ...]) -> None:
    groups = ExpertGroups(counts, GPU)
    x, w = normal(groups.rows, 1024), normal(len(counts), 512, 1024)
    a, b = casts.quantize_rows(x), casts.quantize_blocks(w)[0]
    exact, truth = (
        torch.cat([rows @ one.t() for rows, one in zip(left.split(counts), right, strict=True)])
        for left, right in ((wide(a), wide(b)), (x.double(), w.double()))
    )
    holds(engine.product(a, b, groups), exact, truth)


@pytest.mark.parametrize("counts", GROUPS, ids=str)
def test_weight_gradients(engine: Engine, counts: tuple[int, ...]) -> None:
    groups = ExpertGroups(counts, GPU)
    x, dy = normal(groups.rows, 1024), normal(groups.rows, 512)
    a, b = (casts.quantize_columns(part, groups) for part in (dy, x))
    total = torch.zeros(len(counts), 512, 1024, device=GPU)
    engine.wgrad(a, b, groups, total)
    parts = zip(dy.double().split(counts), x.double().split(counts), strict=True)
    spans = [slice(128 * first, 128 * last) for first, last in pairwise(groups.block_starts)]
    exact = torch.stack([wide(a)[:, s] @ wide(b)[:, s].t() for s in spans])
    holds(total, exact, torch.stack([left.t() @ right for left, right in parts]))
    assert not total[[expert for expert, count in enumerate(counts) if not count]].any()


def test_no_engine_has_a_fault(engine: Engine) -> None:
    assert fault(engine, GPU) is None
