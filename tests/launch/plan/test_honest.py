"""Plans against runs of gloo ranks: state and messages to the byte, the allocator's peak within 5%."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dryvine.comm import local
from dryvine.launch.plan.copies import SAVES
from dryvine.launch.plan.hardware import load_hardware
from dryvine.launch.plan.plan import Plan, make
from dryvine.trainer.config import Config
from dryvine.trainer.cpu_adam import load_cpu_adam
from dryvine.trainer.run_plan import make_plan
from tests.support.live import RankBytes, measure

LAYOUTS = {
    "one rank": ("optim.moments=bf16",),
    "dualpipe": ("parallel.pp=2", "parallel.schedule=dualpipe"),
    "experts": ("parallel.ep=2",),
    # So many tokens that the step is fullest in the pipeline: gloo copies sums, and when it drops the copy varies.
    "data, bf16": ("parallel.dp=2", "optim.moments=bf16", "run.dtype=bf16", "parallel.microbatch_sequences=8"),
    "dualpipev": ("parallel.pp=2", "parallel.schedule=dualpipev"),
    "dualpipe and experts": ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe"),
    "interleaved": ("parallel.pp=2", "parallel.schedule=interleaved", "parallel.chunks=2"),
    "offload": ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe", "optim.offload=cpu"),
    "zb1p": ("parallel.pp=2", "parallel.schedule=zb1p", "parallel.microbatch_sequences=2"),
}


QUICK = ("dualpipe and experts", "zb1p")


@pytest.mark.parametrize(
    "overrides",
    [pytest.param(o, id=name, marks=() if name in QUICK else pytest.mark.long) for name, o in LAYOUTS.items()],
)
def test_bytes_are_as_planned(tiny: Callable[..., Config], overrides: tuple[str, ...]) -> None:
    config = tiny(*overrides)
    plan = make(make_plan(config), load_hardware("cpu"))
    p = config.parallel
    if config.optim.offload == "cpu":
        load_cpu_adam()  # compiled before ranks have a deadline
    for rank, found in enumerate(local.run(measure, p.world, config)):
        compare(plan, rank // (p.dp * p.ep), found)


def compare(plan: Plan, pp_rank: int, found: RankBytes) -> None:
    planned = plan.ranks[pp_rank]
    host = {kind: size for kind, size in planned.host.items() if kind != SAVES}  # nothing is saved here
    assert found.host == host
    assert found.state == {kind: planned.kinds[kind] for kind in found.state}
    assert found.sent == {link: size for link, size in plan.dispatch_bytes_of(pp_rank).items() if size}
    assert planned.total + sum(host.values()) == pytest.approx(found.peak, rel=0.05)
