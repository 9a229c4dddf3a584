"""MTP as a self-speculator: what comes out is what comes out without it, in fewer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dryvine.trainer.generate import decoder
from dryvine.trainer.generate.requests import Completion, Request
from dryvine.trainer.generate.sampler import Room, Sampler
from dryvine.trainer.generate.sampling import Ways, sample
from dryvine.trainer.generate.score import Passage
from dryvine.trainer.generate.speculate import Sampled, Speculator
from dryvine.trainer.model.decoder import Model
from tests.support.generate import SHAPES, by_request, draft_logits, largest_difference, requests_of
from tests.support.model import filled, tiny


def leaning(kept: float = 0.3, **changes: Any) -> Model:
    """A model whose next token depends mostly on the newest one, and whose MTP knows that: what layers add to the
    residual is made small, and each depth passes on the embedding that it reads."""
    model = filled(tiny(**({"mtp_depth": 1} | changes)))
    hidden, parameters = model.spec.shape.hidden, dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in parameters.items():
            if name.endswith(("attention.o.weight", "down.weight", "experts.down")):
                weight.mul_(kept)
            elif name.startswith("mtp.") and name.endswith(".project.weight"):
                weight.copy_(torch.cat((torch.eye(hidden), torch.zeros(hidden, hidden)), 1))
            elif name.startswith("mtp.") and name.endswith((".norm_e.weight", ".norm.weight")):
                weight.copy_(torch.ones(hidden) if "norm_e" in name else parameters["norm.weight"])
    return model


def speculating(model: Model, slots: int = 512) -> Sampler:
    return Sampler.alone(model, Room(slots), speculate=True)


def assert_same(plain: Sequence[Completion], guessed: Sequence[Completion]) -> None:
    others = by_request(iter(guessed))
    assert len(others) == len(plain) == len(guessed)
    for one in plain:
        other = others[one.request]
        assert (one.reason, one.why, one.tokens.tolist()) == (other.reason, other.why, other.tokens.tolist())
        assert torch.equal(one.routes, other.routes)
        assert torch.allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-5)


def share(completions: Sequence[Completion]) -> float:
    return sum(c.accepted for c in completions) / sum(c.drafted for c in completions)


@pytest.mark.parametrize("name", SHAPES)
def test_speculation_changes_no_token(name: str) -> None:
    model, requests = leaning(**SHAPES[name]), requests_of(16)
    plain = list(Sampler.alone(model).generate(requests))
    guessed = list(speculating(model, 7).generate(requests))
    assert_same(plain, guessed)
    assert max(largest_difference(model, completion) for completion in guessed) < 1e-5
    assert 0.1 < share(guessed) < 0.95
    assert sum(c.drafted for c in plain) == 0


@pytest.mark.parametrize(("slots", "depth"), [(1, 1), (3, 1), (512, 1), (1, 2), (3, 3)])
def test_slots_order_and_depths_change_no_token(slots: int, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "STRETCH", 5)
    model = leaning(mtp_depth=depth)
    requests = requests_of(10) + requests_of(6, seed=1, temperature=0.0, stop=frozenset(range(0, 67, 9)))
    plain = list(Sampler.alone(model).generate(requests))
    guessed = list(speculating(model, slots).generate(requests[::-1]))
    assert_same(plain, guessed)
    assert {one.reason for one in guessed} == {"length", "stop"}
    # Neither do they change what is guessed.
    counts = {c.request: (c.drafted, c.accepted) for c in speculating(model).generate(requests)}
    assert counts == {c.request: (c.drafted, c.accepted) for c in guessed}


@pytest.mark.parametrize(("depth", "temperature"), [(1, 0.0), (1, 1.0), (3, 1.0)])
def test_a_module_that_knows_the_model_makes_several_tokens_of_nearly_every_step(
    depth: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, steps = leaning(kept=0.0, mtp_depth=depth), 0
    step = decoder.Decoder.step

    def counted(*given: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(*given)

    monkeypatch.setattr(decoder.Decoder, "step", counted)
    (ended,) = speculating(model).generate([Request((1, 2, 3), 41, temperature, seed=5)])
    assert len(ended.tokens) == 41
    assert share([ended]) > 0.9
    assert steps <= 3 + 41 / (1 + depth)
    assert 41 <= ended.accepted + steps <= 41 + depth


def expected_counts(model: Model, completion: Completion) -> tuple[int, int]:
    """How many drafts there are, and how many are right, by the training forward of MTP over the whole answer."""
    request, drafted, accepted = completion.request, 0, 0
    tokens = [*request.prompt, *completion.tokens.tolist()]
    ways, guesses = Ways.of([request], torch.device("cpu")), draft_logits(model, tokens)
    newest, draft = len(request.prompt) - 1, None
    while newest < len(tokens) - 1:
        right = (tokens[newest] if draft is None else draft) == tokens[newest + 1]
        drafted, accepted = drafted + (draft is not None), accepted + (draft is not None and right)
        newest += 1 + right
        if newest < len(tokens):
            place = np.array([newest + 1], np.uint64)
            draft = int(sample(guesses[newest - 1 : newest], ways, place)[0])
    return drafted, accepted


def test_drafts_are_what_the_training_forward_of_mtp_predicts() -> None:
    # Strong layers: what MTP has in its cache matters for every draft.
    model = leaning(kept=6.0)
    completions = list(speculating(model, 5).generate(requests_of(40, max_tokens=20)))
    for completion in completions:
        assert (completion.drafted, completion.accepted) == expected_counts(model, completion)
    assert sum(completion.accepted for completion in completions) > 50


def test_endings_within_an_accepted_draft() -> None:
    """By a stop token, the budget, and a callback: at every length, so both on the certain token and on the draft."""
    model, base = leaning(kept=0.1), Request((5, 6), 30, 0.8, seed=4)
    (free,) = speculating(model).generate([base])
    assert free.accepted > 8
    tokens = free.tokens.tolist()
    for length in range(1, 11):
        asked = [
            replace(base, max_tokens=length),
            replace(base, stop=frozenset(tokens[length - 1 : length])),
        ]
        assert_same(list(Sampler.alone(model).generate(asked)), list(speculating(model, 1).generate(asked)))
        seen: list[int] = []
        until = lambda _, so_far: seen.append(len(so_far)) or len(so_far) == length  # noqa: B023, E731
        (called,) = speculating(model).generate([base], until)
        assert (called.reason, called.tokens.tolist()) == ("callback", tokens[:length])
        assert seen == list(range(1, length + 1))
        assert largest_difference(model, called) < 1e-5


def test_a_callback_that_raises_and_a_request_that_is_cancelled_hurt_no_other() -> None:
    model = leaning()
    sampler, requests = speculating(model, 4), [Request((1, 2), 9 + i, seed=i, group=0) for i in range(8)]
    alone = by_request(Sampler.alone(model).generate(requests))

    def until(request: Request, tokens: list[int]) -> bool:
        return bool(request.seed == 2 and 1 // (3 - len(tokens)) and False)

    ended = {}
    for completion in sampler.generate(requests, until):
        ended[completion.request] = completion
        sampler.cancel(requests[6])
    assert (ended[requests[2]].reason, len(ended[requests[2]].tokens)) == ("failed", 3)
    assert ended[requests[6]].reason == "cancelled"
    others = [request for request in requests if request.seed not in (2, 6)]
    assert_same([alone[request] for request in others], [ended[request] for request in others])


def test_a_request_may_fill_the_models_positions() -> None:
    model, request = leaning(), Request((1, 2, 3), 62, seed=1)
    assert_same(list(Sampler.alone(model).generate([request])), list(speculating(model).generate([request])))


def test_drafts_whose_numbers_are_not_finite_spoil_neither_answer_nor_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    model = leaning()
    with torch.no_grad():
        dict(model.named_parameters())["embed.weight"][13] = float("inf")

    def guess(_: Speculator, states: Tensor, sampled: Sampled, *__: object) -> Tensor:
        return torch.full_like(sampled.tokens[:, :1], 13)

    monkeypatch.setattr(Speculator, "drafts", guess)
    samplers = Sampler.alone(model), speculating(model, 2)
    plain, guessed = ({c.request: c for c in sampler.generate(requests_of(24))} for sampler in samplers)
    failed = {request for request, completion in plain.items() if completion.reason == "failed"}
    assert 0 < len(failed) < 12
    assert failed == {request for request, completion in guessed.items() if completion.reason == "failed"}
    assert_same(*([c for c in each.values() if c.request not in failed] for each in (plain, guessed)))


def test_texts_are_scored_alike() -> None:
    model, passage = leaning(), Passage(tuple(range(20)), 3)
    (plain,), (other,) = Sampler.alone(model).score([passage]), speculating(model).score([passage])
    assert torch.equal(plain.logprobs, other.logprobs)


def test_a_model_without_mtp_is_refused() -> None:
    with pytest.raises(ValueError, match="no MTP"):
        speculating(filled(tiny()))
