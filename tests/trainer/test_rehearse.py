"""A rehearsal launches what a step launches and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from dryvine.comm import local
from dryvine.trainer.config import Config
from dryvine.trainer.rehearse import rehearse, report_loads
from tests.support.rig import go, rig_of

FP8 = ("fp8.preset=deepseek_v3", "run.dtype=bf16")


def trained(
    rank: int, config: Config, rehearsed: bool
) -> tuple[list[float], dict[str, NDArray[np.float32]], dict[str, int]]:
    """For `local.run`: two steps, perhaps after a rehearsal."""
    rig = rig_of(config)
    if rehearsed:
        rehearse(rig)
    before = dict(rig.dispatcher.meter.take())
    losses = go(rig, 2)
    state = dict(rig.model.named_parameters()) | {f"bias {n}": t for n, t in rig.model.buffers.items()}
    return losses, {name: tensor.detach().float().numpy().copy() for name, tensor in state.items()}, before


@pytest.mark.parametrize("extra", [pytest.param((), id="fp32"), pytest.param(FP8, id="fp8", marks=pytest.mark.long)])
def test_a_rehearsed_run_has_the_same_bits(tinier: Callable[..., Config], extra: tuple[str, ...]) -> None:
    config = tinier("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe", *extra)
    plain, rehearsed = (local.run(trained, 4, config, twice) for twice in (False, True))
    for (losses, state, _), (losses_after, state_after, counted) in zip(plain, rehearsed, strict=True):
        assert losses_after == losses
        assert not counted
        assert all(np.array_equal(state_after[name], tensor) for name, tensor in state.items())


def test_a_kernel_loaded_after_the_rehearsal_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    knobs = pytest.importorskip("triton.knobs", reason="triton is for Linux only")
    hooks = knobs.runtime.kernel_load_start_hook
    report_loads(3)
    hooks(None, None, "gather_kernel", {}, "key")
    hooks.remove(hooks.calls[-1])
    assert "rank 3 loads the kernel gather_kernel in the middle of the run" in capsys.readouterr().err
