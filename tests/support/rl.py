"""A sampler in a few lines, for tests: every token by a forward pass over all that are before it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dryvine.parallel.stage import Flight, State
from dryvine.trainer.generate.requests import Completion, Request
from dryvine.trainer.rig import Rig


@dataclass
class NaiveSampler:
    """Of a rig of one rank and one stage."""

    rig: Rig

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for request in requests:
            yield self._complete(request)

    @torch.no_grad()
    def _complete(self, request: Request) -> Completion:
        draw = torch.Generator().manual_seed(request.seed)
        line, logprobs, routes = list(request.prompt), [], torch.empty(0)
        reason = "length"
        for _ in range(request.max_tokens):
            logits, routes = self._logits(line)
            temperature = request.temperature or 1.0
            logprob = (logits / temperature).log_softmax(-1)
            token = (
                int(logits.argmax()) if request.temperature == 0 else int(logprob.exp().multinomial(1, generator=draw))
            )
            line.append(token)
            logprobs.append(float(logprob[token]))
            if token in request.stop:
                reason = "stop"
                break
        tokens = torch.tensor(line[len(request.prompt) :])
        return Completion(request, tokens, torch.tensor(logprobs), routes, reason)  # type: ignore[arg-type]

    def _logits(self, line: list[int]) -> tuple[Tensor, Tensor]:
        """Of the token behind a line; and the routes of all in it, [MoE layers, tokens, K]."""
        model = self.rig.model
        extra = 1 + self.rig.config.model.mtp_depth
        flight = Flight(torch.tensor([line + [0] * extra]), 0.0, training=False)
        state: State = ()
        routes = []
        for phase in model.stages[0].phases:
            if phase.name == "head":
                break
            state = phase.forward(state, flight).wait()
            if phase.name == "attention":
                routes.append(state[3].to(torch.int16))
        x = model.root["norm"](state[0]).x
        return model.root["head"](x)[-1].float(), torch.stack(routes)
