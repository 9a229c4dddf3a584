"""Generation on one process: decoding is the training forward, whatever is in the batch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from dryvine.trainer.generate.requests import Completion, Request
from dryvine.trainer.generate.sampler import Room, Sampler
from dryvine.trainer.generate.sampling import Ways, sample, uniforms
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.shape import Yarn
from tests.support.generate import largest_difference
from tests.support.model import filled, tiny

SHAPES: dict[str, dict[str, Any]] = {
    "v3": {},
    "no q_lora": {"q_lora": None},
    "no groups": {"groups": 1, "group_limit": 1},
    "v2: softmax, not normalised": {"score": "softmax", "normalise": False, "groups": 2, "group_limit": 1},
    "no shared expert": {"shared": 0},
    "two shared experts": {"shared": 2},
    "dense only": {"first_dense": 3},
    "mixtures only": {"first_dense": 0},
    "yarn": {"yarn": Yarn(factor=4.0, original=16, mscale=0.7), "max_position": 64},
    "odd nope, wide values": {"nope_dim": 7, "v_dim": 19},
    "mtp": {"mtp_depth": 1},
}


def requests_of(count: int, seed: int = 0, **changes: Any) -> list[Request]:
    """Of different lengths, ways and groups."""
    rng = random.Random(seed)
    shared = tuple(rng.randrange(67) for _ in range(9))
    made = []
    for i in range(count):
        prompt = tuple(rng.randrange(67) for _ in range(rng.randint(1, 20)))
        group = rng.choice([None, 0, 1])
        ways: dict[str, Any] = {
            "max_tokens": rng.randint(1, 24),
            "temperature": rng.choice([0.0, 0.7, 1.0, 1.5]),
            "top_p": rng.choice([1.0, 0.9, 0.4]),
            "seed": i,
            "stop": frozenset([3]),
            "group": group,
        }
        made.append(Request(prompt if group is None else shared + prompt, **(ways | changes)))
    return made


def sampler_of(model: Model, slots: int = 512) -> Sampler:
    return Sampler.alone(model, Room(slots))


def by_request(completions: Iterator[Completion]) -> dict[Request, Completion]:
    return {completion.request: completion for completion in completions}


def same(one: Completion, other: Completion) -> bool:
    return (
        one.reason == other.reason and torch.equal(one.tokens, other.tokens) and torch.equal(one.routes, other.routes)
    )


@pytest.mark.parametrize("name", SHAPES)
def test_decoding_is_the_training_forward_at_every_prefix(name: str) -> None:
    model = filled(tiny(**SHAPES[name]))
    completions = list(sampler_of(model, slots=7).generate(requests_of(16)))
    assert len(completions) == 16
    assert max(largest_difference(model, completion) for completion in completions) < 1e-5


@pytest.mark.parametrize("slots", [1, 3, 512])
def test_neither_company_nor_order_nor_slots_change_an_answer(slots: int) -> None:
    model, requests = filled(tiny()), requests_of(24)
    together = by_request(sampler_of(model).generate(requests))
    shuffled = random.Random(1).sample(requests, len(requests))
    again = by_request(sampler_of(model, slots).generate(shuffled))
    for request, completion in together.items():
        assert same(completion, again[request])
        (alone,) = sampler_of(model).generate([request])
        assert same(completion, alone)
