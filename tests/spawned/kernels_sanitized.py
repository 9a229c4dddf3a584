"""Every Triton kernel once, at small ragged sizes, for compute-sanitizer. Not collected by pytest.

    python3 -m tests.spawned.kernels_sanitized                                      # fills Triton's cache, some seconds
    compute-sanitizer --tool memcheck --error-exitcode 9 python3 -m tests.spawned.kernels_sanitized
    compute-sanitizer --tool racecheck --error-exitcode 9 python3 -m tests.spawned.kernels_sanitized

The allocator's caching is off, or an access past the end of a tensor would land in its neighbour and be fine. Kernels
are found in the modules and counted as they are launched: one that did not run makes the exit code 1.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from dryvine.comm.dispatch import by_rank, token_plan
from dryvine.comm.dispatch.by_rank import ByRank
from dryvine.comm.dispatch.exchange import GroupExchange
from dryvine.comm.dispatch.flat import Flat
from dryvine.comm.dispatch.token_plan import PlanGroup
from dryvine.parallel.stage import Flight
from dryvine.parallel.wgrad import Closure
from dryvine.trainer.adam import Operands, Update
from dryvine.trainer.adam_kernel import KernelAdamW
from dryvine.trainer.fp8 import casts, fused
from dryvine.trainer.fp8.engines.triton import Triton
from dryvine.trainer.fp8.fp8 import FP8
from dryvine.trainer.fp8.kernels import hopper
from dryvine.trainer.fp8.recipe import preset
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.kernels import grouped
from dryvine.trainer.model.norm import norm_backward
from dryvine.trainer.model.shape import Shape, blocks
from dryvine.trainer.model.spec import Spec
from dryvine.trainer.ramps import OptimConfig
from dryvine.trainer.tensors.groups import ExpertGroups
from tests.support import norm as helpers_norm

MODULES = (
    "dryvine.comm.dispatch.kernels", "dryvine.comm.dispatch.plan_kernels",
    "dryvine.trainer.adam_kernel", "dryvine.trainer.tensors.group_tables",
    "dryvine.trainer.fp8.kernels.casts", "dryvine.trainer.fp8.kernels.fused",
    "dryvine.trainer.fp8.kernels.hopper", "dryvine.trainer.model.kernels.gate",
    "dryvine.trainer.model.kernels.grouped", "dryvine.trainer.model.kernels.loss",
    "dryvine.trainer.model.kernels.norm", "dryvine.trainer.model.kernels.qkv", "dryvine.trainer.model.kernels.swiglu",
)  # fmt: skip
COUNTS = (1, 0, 129, 70)
SHAPE = Shape(
    layers=2, first_dense=1, hidden=144, ffn=256, expert_ffn=128, heads=2, q_lora=80, kv_lora=48, nope_dim=64,
    rope_dim=16, v_dim=64, routed=6, shared=1, top_k=3, groups=2, group_limit=2, score="sigmoid", normalise=True,
    vocab=160, max_position=64, mtp_depth=1, init_std=0.02, recompute=("norm", "mla_up", "swiglu"),
)  # fmt: skip


def kernels() -> Iterator[tuple[str, Any]]:
    """By name, those that are launched: their names end in _kernel."""
    for module in MODULES:
        for name, value in vars(importlib.import_module(module)).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                yield f"{module.removeprefix('dryvine.')}.{name}", value


def watch() -> set[int]:
    """The ids of the kernels launched from now on."""
    launched: set[int] = set()
    run = JITFunction.run

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched.add(id(self))
        return run(self, *args, **kwargs)

    JITFunction.run = noting
    return launched


def random(*size: int) -> Tensor:
    return torch.randn(*size, device="cuda").bfloat16()


def quantisers() -> None:
    groups, rows, width = ExpertGroups(COUNTS, torch.device("cuda")), sum(COUNTS), 256
    x, weights = random(rows, width), torch.rand(rows, device="cuda")
    for scales in ("fp32", "ue8m0"):
        saved = casts.quantize_rows(x, scales)
        casts.quantize_columns(x, groups, scales)
        casts.quantize_columns(saved, groups, scales)
        casts.quantize_both(x, groups, scales)
        casts.transpose_blocks(casts.quantize_blocks(random(3, 144, 272), scales)[0])
        fused.rmsnorm_rows(x, torch.rand(width, device="cuda").bfloat16(), 1e-6, scales)
        for weighting in (weights, None):
            _, kept = fused.swiglu_rows(x, weighting, scales)
            fused.swiglu_backward(random(rows, width // 2), kept, weighting, groups, scales)
    casts.unpack_e5m6(casts.pack_e5m6(x))


def products() -> None:
    groups, rows = ExpertGroups(COUNTS, torch.device("cuda")), sum(COUNTS)
    a = casts.quantize_rows(random(rows, 272))
    whole, each = (casts.quantize_blocks(random(*size))[0] for size in ((144, 272), (len(COUNTS), 144, 272)))
    one = ExpertGroups((rows,), torch.device("cuda"))
    hopper.product(a, whole)
    hopper.product(a, each, groups)
    for split in (one, groups):
        columns = [casts.quantize_columns(random(rows, size), split) for size in (144, 272)]
        hopper.wgrad(*columns, split, torch.zeros(len(split.counts), 144, 272, device="cuda"))
    grouped.wgrad(random(rows, 144), random(rows, 272), groups, torch.zeros(len(COUNTS), 144, 272, device="cuda"))


def tokens() -> None:
    """What `nvlink` makes of everybody's rows, with room for all and for less, its own apart from the others'."""
    ranks, most, experts, top_k, rank = 3, 37, 12, 3, 1
    drawn = torch.rand(ranks, most, experts, device="cuda").argsort(dim=2)[..., :top_k].int()
    own = token_plan.choices_to_send(drawn[rank, :30].long(), most)
    for room in (ranks * most * top_k, most * top_k // 2):
        found = token_plan.places(ByRank(drawn, own, rank), drawn[rank, :30].long(), PlanGroup(experts), room)
        rows = by_rank.gather_by_rank(ByRank(random(ranks, most, 72), random(30, 72), rank), found.token)
        partial = by_rank.sum_present(rows, found.row).view(ranks, most, 72)
        by_rank.sum_by_rank(ByRank(partial, partial[rank], rank), found.total)


def norms() -> None:
    """Programs of four steps, whose loads run ahead of them, and a last one of less."""
    norm_backward(*helpers_norm.case(1701, 2048, torch.bfloat16, "cuda"))


def model(recipe: Any) -> None:
    """All phases forward and backward, with a number of tokens that fits no tile."""
    fp8 = FP8(recipe, Triton(), "") if recipe.fp8 else None
    names = tuple(block.name for block in blocks(SHAPE))
    made = Model(Spec(SHAPE, torch.bfloat16, "cuda", fp8=fp8), {0: names}, Flat(GroupExchange(None), SHAPE.routed))
    made.initialise(0)
    flight = Flight(torch.randint(SHAPE.vocab, (3, 37 + 2), device="cuda"), 1.0)
    state: Any = ()
    phases = made.stages[0].phases
    for phase in phases:
        state = phase.forward(state, flight).wait()
    grads: Any = ()
    later: list[Closure] = []
    for phase in reversed(phases):
        result = phase.backward(grads, flight)
        grads = result.value.wait()
        later += result.closures
    for closure in later:
        closure()
    for name, weight in made.named_parameters():
        assert weight.gradient().isfinite().all(), name


def update() -> None:
    """At a size that is no multiple of a program's, moments in both dtypes."""
    for moments in (torch.float32, torch.bfloat16):
        on = Operands(
            *(torch.zeros(5003, device="cuda", dtype=dtype) for dtype in (*[torch.float32] * 2, *[moments] * 2)),
            matrices=4096,
        )
        weights = torch.zeros(5003, device="cuda", dtype=torch.bfloat16)
        KernelAdamW(OptimConfig())(on, torch.zeros((), device="cuda"), Update(1e-3, 1.0, 0.1), weights)


def main() -> int:
    torch.manual_seed(0)
    launched = watch()
    update()
    quantisers()
    products()
    tokens()
    norms()
    for recipe in (preset("bf16"), preset("deepseek_v3"), preset("deepseek_v3", dispatch="bf16")):
        model(recipe)
    torch.cuda.synchronize()
    every = dict(kernels())
    idle = [name for name, kernel in every.items() if id(kernel) not in launched]
    print(f"{len(every) - len(idle)} of {len(every)} kernels ran" + "".join(f"\n  not run: {name}" for name in idle))
    return 1 if idle else 0


if __name__ == "__main__":
    sys.exit(main())
