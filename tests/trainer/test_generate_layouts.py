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
from dryvine.trainer.generate.score import Passage
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
    drafted: int


def plain(completions: Iterator[Completion]) -> list[Plain]:
    """In the order of their seeds."""
    made = [
        Plain(c.request, c.reason, c.tokens.numpy(), c.logprobs.numpy(), c.routes.numpy(), c.drafted)
        for c in completions
    ]
    return sorted(made, key=lambda one: one.request.seed)


class Ranked(NamedTuple):
    """What a rank has made: answers with the initial weights, with four slots only, with MTP's guesses, after a step of
    training; and scores of texts that are given, with the initial weights."""

    before: list[Plain]
    few: list[Plain]
    guessed: list[Plain]
    after: list[Plain]
    scores: list[NDArray[np.float64]]


def passages() -> list[Passage]:
    """Of mixed lengths; some begin as the one before."""
    begun = tuple(range(5, 17))
    texts = [begun[:2], *((*begun, *range(n, 2 * n)) for n in range(1, 8)), tuple(range(20, 44)), begun[:5]]
    return [Passage(text, max(1, len(text) - 9)) for text in texts]


def rollouts(rank: int, config: Config) -> Ranked:
    """For `local.run`."""
    rig = rig_of(config)
    sampler = Sampler.of_rig(rig)
    scores = [np.stack((score.logprobs.numpy(), score.best.numpy())) for score in sampler.score(passages())]
    before = plain(sampler.generate(requests()))
    few = plain(Sampler.of_rig(rig, Room(slots=4)).generate(requests()))
    guessed = plain(Sampler.of_rig(rig, Room(slots=8), speculate=True).generate(requests()))
    go(rig, 1)
    return Ranked(before, few, guessed, plain(sampler.generate(requests())), scores)


@cache
def alone(config: Config) -> Ranked:
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
    assert any((a.logprobs[0] != b.logprobs[0]) for a, b in zip(reference.before, reference.after, strict=True))
    assert [one.shape[1] for one in reference.scores] == [len(text) - first for text, first in passages()]
    for one in each:
        assert_same(one.before, reference.before, 1e-5)
        assert_same(one.few, reference.before, 1e-5)
        assert_same(one.guessed, reference.before, 1e-5)
        assert sum(completion.drafted for completion in one.guessed) > 50
        assert_same(one.after, reference.after, 1e-4)
        for ours, theirs in zip(one.scores, reference.scores, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    for other in each[1:]:
        for mine, theirs in zip(each[0][:4], other[:4], strict=True):
            assert_same(mine, theirs, 0)
