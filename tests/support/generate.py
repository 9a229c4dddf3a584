"""What tests of generation share: kinds of models, requests, and the training forward over whole sequences, which they
compare with."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dryvine.parallel.stage import Flight, State
from dryvine.trainer.generate.requests import Completion, Request
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.shape import Yarn

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


def by_request(completions: Iterator[Completion]) -> dict[Request, Completion]:
    return {completion.request: completion for completion in completions}


def same(one: Completion, other: Completion) -> bool:
    return (
        one.reason == other.reason and torch.equal(one.tokens, other.tokens) and torch.equal(one.routes, other.routes)
    )


def training_forward(model: Model, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """FP32 log-probabilities of the token after each [T, V], and the experts chosen, int64 [MoE layers, T, K], as the
    phases of a training step compute them."""
    shape = model.spec.shape
    padded = torch.tensor([[*tokens, *[0] * (1 + shape.mtp_depth)]], device=model.spec.device)
    flight = Flight(padded, 0.0, training=False)
    state: State = ()
    chosen = []
    for number in sorted(model.stages):
        for phase in model.stages[number].phases:
            if phase.name == "head":
                break
            state = phase.forward(state, flight).wait()
            if phase.name == "attention":
                chosen.append(state[3])
    parameters = dict(model.named_parameters())
    x = state[0].float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + shape.norm_eps) * parameters["norm.weight"].float()
    head = parameters["head.weight"]
    logits = functional.linear(x.to(head.dtype), head).detach().float()
    routes = torch.stack(chosen).cpu() if chosen else torch.empty(0, len(tokens), shape.top_k)
    return logits.log_softmax(-1).cpu(), routes


def largest_difference(model: Model, completion: Completion) -> float:
    """Between a completion's log-probabilities and those of the training forward at every prefix, at the request's
    temperature. Also asserts that every token went to the same experts."""
    prompt, tokens = completion.request.prompt, completion.tokens.tolist()
    logprobs, chosen = training_forward(model, [*prompt, *tokens][:-1])
    assert torch.equal(completion.routes.long(), chosen)
    there = said_of(logprobs, completion)
    return float((there - completion.logprobs).abs().max())


def said_of(logprobs: Tensor, completion: Completion) -> Tensor:
    """FP32 [n]: what `training_forward`'s log-probabilities say of a completion's tokens, at its temperature."""
    there = logprobs[len(completion.request.prompt) - 1 :]
    there = (there / (completion.request.temperature or 1.0)).log_softmax(-1)
    return there.gather(1, completion.tokens.unsqueeze(1)).squeeze(1)


def draft_logits(model: Model, tokens: Sequence[int]) -> Tensor:
    """What MTP of depth 1 predicts at each position for the token after the next one, as a training step computes it:
    FP32 [T - 1, V]."""
    flight = Flight(torch.tensor([[*tokens, 0, 0]]), 0.0, training=False)
    state: State = ()
    *phases, _ = model.stages[0].phases
    for phase in phases:
        state = phase.forward(state, flight).wait()
    parameters = dict(model.named_parameters())
    x = state[0] * torch.rsqrt(state[0].square().mean(-1, keepdim=True) + model.spec.shape.norm_eps)
    return functional.linear(x * parameters["mtp.0.norm.weight"], parameters["head.weight"]).detach()[:-1]
