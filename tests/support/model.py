"""What the model's tests share: a dispatcher for one rank in plain indexing, tiny shapes, and a loop over phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dryvine.comm.pending import Pending
from dryvine.parallel.stage import Flight, Stage, State
from dryvine.parallel.wgrad import Closure
from dryvine.trainer.fp8.engines.emulate import Emulate
from dryvine.trainer.fp8.fp8 import FP8
from dryvine.trainer.fp8.recipe import preset
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.shape import Shape, blocks
from dryvine.trainer.model.spec import Spec


@dataclass(frozen=True)
class AloneHandle:
    counts: list[int]
    token: Tensor  # [R], which token a row is of
    choice: Tensor  # [R], which of its choices
    size: tuple[int, ...]  # (T, K)


class Alone:
    """`Dispatcher` of a single rank: rows are sorted by expert with plain indexing, nothing is sent."""

    def __init__(self, experts: int) -> None:
        self.experts = experts

    def plan_routing(self, experts_TK: Tensor, label: str = "") -> Pending[Any]:
        order = experts_TK.flatten().argsort(stable=True)
        counts = torch.bincount(experts_TK.flatten(), minlength=self.experts).tolist()
        top_k = experts_TK.shape[1]
        return Pending.done(AloneHandle(counts, order // top_k, order % top_k, tuple(experts_TK.shape)))

    def dispatch(self, rows: tuple[Tensor, ...], pairs: Tensor | None, handle: Any) -> Pending[tuple[Tensor, ...]]:
        sent = tuple(t[handle.token] for t in rows)
        return Pending.done(sent if pairs is None else (*sent, pairs[handle.token, handle.choice]))

    def combine(self, rows: Tensor, pairs: Tensor | None, handle: Any) -> Pending[tuple[Tensor, ...]]:
        total = torch.zeros(handle.size[0], *rows.shape[1:], device=rows.device)
        total = total.index_add_(0, handle.token, rows.float()).to(rows.dtype)
        if pairs is None:
            return Pending.done((total,))
        back = torch.zeros(handle.size, dtype=pairs.dtype, device=pairs.device)
        back[handle.token, handle.choice] = pairs
        return Pending.done((total, back))


def tiny(**changes: Any) -> Shape:
    """A V3 in miniature: one dense and two MoE layers, q_lora, groups, one shared expert."""
    facts = Shape(
        layers=3, first_dense=1, hidden=32, ffn=48, expert_ffn=24, heads=4, q_lora=20, kv_lora=16,
        nope_dim=8, rope_dim=4, v_dim=8, routed=8, shared=1, top_k=3, groups=4, group_limit=2,
        score="sigmoid", normalise=True, route_scale=2.5, vocab=67, max_position=64, init_std=0.1,
    )  # fmt: skip
    return Shape(**(facts.model_dump() | changes))


def in_fp8(shape: Shape, dispatcher: Any = None, **recipe: Any) -> tuple[Model, FP8]:
    """All blocks on one rank as one stage, filled: BF16 with FP8 products, emulated."""
    fp8 = FP8(preset("deepseek_v3", **recipe), Emulate(), "")
    names = tuple(block.name for block in blocks(shape))
    model = Model(Spec(shape, torch.bfloat16, "cpu", fp8=fp8), {0: names}, dispatcher or Alone(shape.routed))
    model.initialise(0)
    return model, fp8


def whole(shape: Shape, *, dtype: torch.dtype = torch.float32, device: str = "cpu", stages: int = 1) -> Model:
    """All blocks on one rank, in `stages` stages as equal as numbers allow; not filled."""
    names = [block.name for block in blocks(shape)]
    cuts = [len(names) * i // stages for i in range(stages + 1)]
    held = {i: tuple(names[cuts[i] : cuts[i + 1]]) for i in range(stages)}
    return Model(Spec(shape, dtype, device), held, Alone(shape.routed))


def filled(shape: Shape, seed: int = 0, **ways: Any) -> Model:
    """`whole`, with random weights, norms away from 1 and biases away from 0, so that nothing is neutral."""
    model = whole(shape, **ways)
    model.initialise(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for _, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.add_(torch.empty(weight.shape).uniform_(-0.3, 0.3, generator=generator))
        for bias in model.buffers.values():
            bias.uniform_(-0.1, 0.1, generator=generator)
    return model


def random_tokens(shape: Shape, sequences: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(shape.vocab, (sequences, length + 1 + shape.mtp_depth), generator=generator)


def run_forward(stages: Sequence[Stage], flights: Sequence[Flight]) -> dict[str, Tensor]:
    """Every phase of every stage in order; the losses of all flights together."""
    state: State = ()
    for stage, flight in zip(stages, flights, strict=True):
        for phase in stage.phases:
            state = phase.forward(state, flight).wait()
    return {name: loss for flight in flights for name, loss in flight.losses.items()}


def run_backward(stages: Sequence[Stage], flights: Sequence[Flight]) -> list[list[Closure]]:
    """Every backward in reverse. Returns the weight-gradient closures, one list per phase, not yet run."""
    grads: tuple[Tensor | None, ...] = ()
    left: list[list[Closure]] = []
    for stage, flight in reversed(list(zip(stages, flights, strict=True))):
        for phase in reversed(stage.phases):
            result = phase.backward(grads, flight)
            grads = result.value.wait()
            left.append(result.closures)
    return left


def train(model: Model, tokens: Tensor, loss_scale: float = 1.0) -> dict[str, Tensor]:
    """One microbatch forward and backward, weight gradients at the end; returns the losses."""
    stages = [model.stages[number] for number in sorted(model.stages)]
    flights = [Flight(tokens, loss_scale) for _ in stages]
    losses = run_forward(stages, flights)
    for closures in run_backward(stages, flights):
        for closure in closures:
            closure()
    return losses


def validate(model: Model, tokens: Tensor) -> dict[str, Tensor]:
    stages = [model.stages[number] for number in sorted(model.stages)]
    return run_forward(stages, [Flight(tokens, 0.0, training=False) for _ in stages])
