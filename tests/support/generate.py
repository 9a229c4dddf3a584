"""What tests of generation compare with: the training forward over whole sequences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dryvine.parallel.stage import Flight, State
from dryvine.trainer.generate.requests import Completion
from dryvine.trainer.model.decoder import Model


def training_forward(model: Model, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """FP32 log-probabilities of the token after each [T, V], and the experts chosen, int64 [MoE layers, T, K], as the
    phases of a training step compute them."""
    shape = model.spec.shape
    flight = Flight(torch.tensor([[*tokens, *[0] * (1 + shape.mtp_depth)]]), 0.0, training=False)
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
    logits = functional.linear(x, parameters["head.weight"].float()).detach()
    return logits.log_softmax(-1), torch.stack(chosen) if chosen else torch.empty(0, len(tokens), shape.top_k)


def largest_difference(model: Model, completion: Completion) -> float:
    """Between a completion's log-probabilities and those of the training forward at every prefix, at the request's
    temperature. Also asserts that every token went to the same experts."""
    prompt, tokens = completion.request.prompt, completion.tokens.tolist()
    logprobs, chosen = training_forward(model, [*prompt, *tokens][:-1])
    assert torch.equal(completion.routes.long(), chosen)
    there = logprobs[len(prompt) - 1 :]
    there = (there / (completion.request.temperature or 1.0)).log_softmax(-1)
    return float((there.gather(1, completion.tokens.unsqueeze(1)).squeeze(1) - completion.logprobs).abs().max())
