"""The first promise: any layout gives the same training as one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from dryvine.trainer import verify
from dryvine.trainer.config import Config
from dryvine.trainer.deviations import Run, deviations

Tiny = Callable[..., Config]

LAYOUTS = [
    (pp, ep, dp, schedule)
    for pp, ep, dp in ((2, 1, 1), (4, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2), (2, 1, 2))
    for schedule in ("one_f_one_b", "dualpipe", "dualpipev")
    if not (pp == 1 and schedule == "dualpipe")  # which needs an even number of ranks
]


@cache
def _alone(config: Config) -> Run:
    return verify.play(config)


def layout(tiny: Tiny, pp: int, ep: int, dp: int, schedule: str, *more: str) -> Config:
    ranks = (f"parallel.pp={pp}", f"parallel.ep={ep}", f"parallel.dp={dp}", f"parallel.schedule={schedule}")
    return tiny('run.out="unused"', "batch.sequences=8", *ranks, *more)


@pytest.mark.parametrize(("pp", "ep", "dp", "schedule"), LAYOUTS)
def test_layout_trains_like_one_process(tiny: Tiny, pp: int, ep: int, dp: int, schedule: str) -> None:
    config = layout(tiny, pp, ep, dp, schedule)
    found = deviations(_alone(verify.alone(config)), verify.play(config))
    assert {d.kind.split()[0] for d in found} == {"loss", "gradient", "weight"}
    assert not [d for d in found if not d.fine]


def test_a_dispatch_in_rounds_trains_like_one_process(tiny: Tiny) -> None:
    config = layout(tiny, 1, 2, 1, "dualpipev", "comm.imbalance=1.01", "model.layers=3")
    found = deviations(_alone(verify.alone(config)), verify.play(config))
    assert not [d for d in found if not d.fine]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("pp", "ep", "schedule"),
    [
        (2, 2, "dualpipe"),
        *(pytest.param(*of, marks=pytest.mark.long) for of in ((2, 1, "dualpipev"), (2, 1, "one_f_one_b"))),
    ],
)
def test_overlap_does_not_change_a_bit(tiny: Tiny, pp: int, ep: int, schedule: str, dtype: str) -> None:
    more = (f"run.dtype={dtype}", "model.layers=3")
    runs = [
        verify.play(layout(tiny, pp, ep, 1, schedule, *more, f"parallel.overlap={overlap}"), steps=2)
        for overlap in ("on", "off")
    ]
    on, off = runs
    assert on.losses == off.losses
    assert on.norms == off.norms
    for name, weight in on.weights.items():
        np.testing.assert_array_equal(weight, off.weights[name], err_msg=name)


def test_a_missing_gradient_would_be_seen(tiny: Tiny) -> None:
    """What a layout bug looks like: one expert's share of one gradient left out."""
    run = _alone(verify.alone(layout(tiny, 1, 1, 1, "one_f_one_b")))
    name = "layers.3.experts.down"
    broken = {**run.grads, name: run.grads[name].copy()}
    broken[name][: broken[name].size // 8] = 0
    found = deviations(run, Run(run.losses, run.norms, broken, run.weights))
    assert [d.where for d in found if not d.fine] == [name]
