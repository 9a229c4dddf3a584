"""One rank, every schedule that one rank can run, overlap on and off: the same training, on a CPU and on a GPU.

`test_layouts.py` does this for many CPU ranks. Here are what one GPU can show: streams in place of waits, F&B pairs on
them, and arithmetic that must come to what the CPU's does.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dryvine.trainer.config import Config
from dryvine.trainer.ramps import points
from dryvine.trainer.step import train_step
from tests.support.documents import short_documents
from tests.support.rig import rig_of

Tiny = Callable[..., Config]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SCHEDULES = ("gpipe", "zb1p", "interleaved parallel.chunks=3", "zbv", "dualpipev")
# Sizes that FP8 takes on a GPU.
WIDE = (
    "model.hidden=128", "model.ffn=256", "model.expert_ffn=128", "model.q_lora=64", "model.kv_lora=64",
    "model.nope_dim=64", "model.rope_dim=16", "model.v_dim=64",
)  # fmt: skip


def trained(config: Config, device: str, steps: int = 1) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of each step, and on the host the last step's gradients, before the update, and the weights after it."""
    rig = rig_of(config, device)
    losses, grads, update = [], dict[str, Tensor](), rig.update

    def noting(*given: Any) -> None:
        grads.update({f"grad {name}": w.gradient().cpu().clone() for name, w in rig.model.named_parameters()})
        update(*given)

    rig.update = noting  # type: ignore[method-assign]
    for point in islice(points(config.batch, config.data.seq_len), steps):
        played = train_step(rig, point).played
        losses += [float(loss) for name in sorted(played.losses) for loss in played.losses[name]]
    found = {name: weight.detach().cpu() for name, weight in rig.model.named_parameters()}
    return losses, found | grads


def one_rank(tiny: Tiny, schedule: str, *more: str) -> Config:
    name, *rest = schedule.split()
    return tiny("parallel.pp=1", "parallel.ep=1", f"parallel.schedule={name}", *rest, *more)


def check_gradients(found: dict[str, Tensor], truth: dict[str, Tensor], bound: float) -> None:
    for name, value in truth.items():
        if name.startswith("grad "):
            assert float((found[name] - value).norm() / value.norm()) < bound, name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_gives_the_gradients_of_the_plainest(tiny: Tiny, schedule: str, device: str) -> None:
    """On a CPU in FP32, to the order of sums; on a GPU also what the CPU has."""
    losses, truth = trained(one_rank(tiny, "one_f_one_b"), "cpu")
    found_losses, found = trained(one_rank(tiny, schedule), device)
    assert sum(found_losses) == pytest.approx(sum(losses), rel=1e-5)
    check_gradients(found, truth, 1e-5)


WAYS = {
    "fp32": (),
    "bf16": ("run.dtype=bf16", *WIDE),
    "fp8": ("run.dtype=bf16", "fp8.preset=deepseek_v3", "fp8.gemm=triton", *WIDE),
}


def check_bits(one: Config, other: Config) -> None:
    (losses, values), (other_losses, other_values) = (trained(config, "cuda", steps=3) for config in (one, other))
    different = [name for name, value in values.items() if not torch.equal(value, other_values[name])]
    assert not different, f"{len(different)} of {len(values)} tensors: {different}"
    assert losses == other_losses


@needs_cuda
@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("numerics", WAYS)
def test_the_same_run_twice_has_the_same_bits(tiny: Tiny, numerics: str, overlap: str) -> None:
    """Off, this is arithmetic alone; on, also that no stream reads what another has not written or has given away."""
    config = one_rank(tiny, "dualpipev", f"parallel.overlap={overlap}", *WAYS[numerics])
    check_bits(config, config)


@needs_cuda
@pytest.mark.parametrize("numerics", WAYS)
def test_overlap_does_not_change_a_bit(tiny: Tiny, numerics: str) -> None:
    """DualPipeV on one rank is pairs of F and B: three streams run what with overlap off runs in turn."""
    check_bits(*(one_rank(tiny, "dualpipev", f"parallel.overlap={way}", *WAYS[numerics]) for way in ("on", "off")))


@needs_cuda
@pytest.mark.parametrize("schedule", ["one_f_one_b", "zb1p", "dualpipev"])
@pytest.mark.parametrize("numerics", ["bf16", "fp8"])
def test_graphs_do_not_change_a_bit(tiny: Tiny, numerics: str, schedule: str) -> None:
    """Three steps: without graphs for what is made once, recorded, replayed. Of FP8's, none counts tiles."""
    more = ("fp8.guard_every=0",) if numerics == "fp8" else ()
    check_bits(*(one_rank(tiny, schedule, f"parallel.graphs={way}", *more, *WAYS[numerics]) for way in ("on", "off")))


@needs_cuda
@pytest.mark.parametrize("recompute", ["[]", "['norm','swiglu','mla_up']"])
def test_graphs_over_documents_do_not_change_a_bit(tiny: Tiny, tmp_path: Path, recompute: str) -> None:
    """Documents of a block of the kernel at most, whose gradients it sums in one order."""
    source = f'data.source="{short_documents(tmp_path / "short")}"'
    words = (source, "data.mask=document", f"model.recompute={recompute}", *WAYS["bf16"])
    check_bits(*(one_rank(tiny, "one_f_one_b", f"parallel.graphs={way}", *words) for way in ("on", "off")))


@needs_cuda
@pytest.mark.parametrize("numerics", ["bf16", "fp8"])
def test_a_gpu_trains_like_the_cpu_to_rounding(tiny: Tiny, numerics: str) -> None:
    """The mean of a step's losses. (A single balance loss moves by percents when one token's choice was a tie.)"""
    fp8 = ("fp8.preset=deepseek_v3",) if numerics == "fp8" else ()
    config = one_rank(tiny, "one_f_one_b", "run.dtype=bf16", *fp8, *WIDE)
    steps = 5
    (losses, _), (found, _) = (trained(config, device, steps) for device in ("cpu", "cuda"))
    means, found_means = (torch.tensor(some).view(steps, -1).mean(1).tolist() for some in (losses, found))
    assert found_means == pytest.approx(means, rel=5e-3)
