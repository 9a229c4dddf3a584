"""Generation in training layouts: every rank gets what one process gets, before and after an update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from dryvine.comm import local
from dryvine.trainer import verify
from dryvine.trainer.config import Config
from dryvine.trainer.generate.requests import Completion, Request
from dryvine.trainer.generate.sampler import Room, Sampler
from tests.support.rig import go, rig_of

Tiny = Callable[..., Config]

LAYOUTS = [
    (2, 1, 1, "dualpipe"),
    (1, 2, 1, "one_f_one_b"),
    (1, 1, 2, "one_f_one_b"),
    *(
        pytest.param(*layout, marks=pytest.mark.long)
        for layout in (
            (2, 1, 1, "one_f_one_b"),
            (2, 1, 1, "dualpipev"),
            (2, 2, 1, "dualpipe"),
            (2, 1, 2, "interleaved"),
        )
    ),
]


def requests() -> list[Request]:
    prefix = (7, 3, 250, 11)
    return [
        Request((*prefix, *range(i % 5)), 3 + i % 9, 0.0 if i == 4 else 1.0, 1.0, i, frozenset([5]), i // 4)
        for i in range(14)
    ]


class Plain(NamedTuple):
    """A completion without tensors, which pipes would share and not copy."""

    request: Request
    reason: str
    tokens: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    routes: NDArray[np.int16]


def plain(completions: Iterator[Completion]) -> list[Plain]:
    """In the order of their seeds."""
    made = [Plain(c.request, c.reason, c.tokens.numpy(), c.logprobs.numpy(), c.routes.numpy()) for c in completions]
    return sorted(made, key=lambda one: one.request.seed)


def rollouts(rank: int, config: Config) -> list[list[Plain]]:
    """For `local.run`: with the initial weights, with four slots only, and after a step of training."""
    rig = rig_of(config)
    sampler = Sampler.of_rig(rig)
    before = plain(sampler.generate(requests()))
    few = plain(Sampler.of_rig(rig, Room(slots=4)).generate(requests()))
    go(rig, 1)
    return [before, few, plain(sampler.generate(requests()))]


@cache
def alone(config: Config) -> list[list[Plain]]:
    return rollouts(0, config)


def assert_same(ours: list[Plain], theirs: list[Plain], limit: float) -> None:
    assert len(ours) == len(theirs) == 14
    for one, other in zip(ours, theirs, strict=True):
        assert one[:2] == other[:2]
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.routes, other.routes)
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=limit)


@pytest.mark.parametrize(("pp", "ep", "dp", "schedule"), LAYOUTS)
def test_a_layout_generates_what_one_process_generates(tiny: Tiny, pp: int, ep: int, dp: int, schedule: str) -> None:
    ranks = (f"parallel.pp={pp}", f"parallel.ep={ep}", f"parallel.dp={dp}", f"parallel.schedule={schedule}")
    config = tiny('run.out="unused"', "optim.lr=1e-2", *ranks)
    each = local.run(rollouts, pp * ep * dp, config)
    reference = alone(verify.alone(config))
    assert any((a.logprobs[0] != b.logprobs[0]) for a, b in zip(reference[0], reference[2], strict=True))
    for before, few, after in each:
        assert_same(before, reference[0], 1e-5)
        assert_same(few, reference[0], 1e-5)
        assert_same(after, reference[2], 1e-4)
    for other in each[1:]:
        for ours, theirs in zip(each[0], other, strict=True):
            assert_same(ours, theirs, 0)
