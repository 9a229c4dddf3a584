"""Answers through the training layout: a forward pass that returns log-probabilities (`score`), and an update
(`learn`), both by the schedule, wires and dispatchers of pretraining.

Most frameworks compute old and reference probabilities in a second engine, which rounds differently. Here one model
definition computes all of them, so the ratio in the first update of a rollout is 1 to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dryvine.parallel.executor import Batch, Played
from dryvine.trainer.model.documents import Documents, documents_of
from dryvine.trainer.model.lesson import Lesson, Objective, Scored
from dryvine.trainer.model.shape import blocks
from dryvine.trainer.ramps import Point, gradient_scale
from dryvine.trainer.rig import Rig
from dryvine.trainer.rl.choices import LossChoices
from dryvine.trainer.rl.losses import Tokens, k3, objective, shares, token_losses
from dryvine.trainer.rl.rows import PackedRows, Packing, Sample, pack
from dryvine.trainer.step import summed, update


class PassOptions(NamedTuple):
    """How a forward pass over answers runs."""

    temperature: float
    replay: bool  # their routes, where they have some
    record: bool = False  # the routes that gates choose


@dataclass(frozen=True)
class _Pass:
    """`count` rows from `first` on: what one run of the schedule takes."""

    first: int
    count: int


@dataclass(frozen=True)
class UpdateResult:
    """The figures of an update, over all ranks."""

    norm: float  # of the gradient, before the clip
    loss: float
    sums: TokenSums
    largest_apart: float  # |log-probability of the trainer - of the sampler|
    other_routes: float  # share of the choices of experts, by token and layer, that the gate would make otherwise now
    bubble: float  # idle share of the worst rank's schedules

    @property
    def finite(self) -> bool:
        return math.isfinite(self.norm)


class TokenSums(NamedTuple):
    """Sums over the answers' tokens."""

    tokens: float
    k3: float  # of the trainer's policy against what answers were sampled with
    k3_reference: float
    clipped: float
    entropy: float

    def mean(self, name: str) -> float:
        return float(getattr(self, name)) / max(1.0, self.tokens)


def moe_layers(rig: Rig) -> list[str]:
    """The blocks whose routes a rollout records, in the order of `Sample.routes`."""
    return [block.name for block in blocks(rig.config.model) if block.kind == "moe"]


# -- forward


def score(rig: Rig, answers: Sequence[Sample], plan: PassOptions) -> list[Sample]:
    """The answers with the trainer's log-probabilities under the current weights as `old`, and with `plan.record` its
    routes too. The same on every rank. Collective."""
    packing = pack(answers, rig.config.data.seq_len)
    logprobs = torch.zeros(packing.rows, packing.length, dtype=torch.float64, device=rig.mesh.device)
    routes: dict[str, Tensor] = {}
    shape = rig.config.model
    if plan.record:
        size = (packing.rows, packing.length, shape.top_k)
        routes = {name: torch.zeros(size, dtype=torch.int32, device=rig.mesh.device) for name in moe_layers(rig)}
    for one in _passes(rig, packing):
        batch = _batch(rig, packing, one, plan, _record_logprobs, lambda _: ())
        played = rig.forward(one.count).run(replace(batch, training=False))
        _collect(rig, packing, one, played, "logprobs", logprobs)
        for name, own in routes.items():
            _collect(rig, packing, one, played, f"routes.{name}", own)
    whole = rig.mesh.sum(logprobs, "log-probabilities").float().cpu()
    found = [replace(a, old=whole[packing.places[i].row, packing.targets(i)]) for i, a in enumerate(answers)]
    if not plan.record:
        return found
    # The two copies of a DualPipe stage see different microbatches, so each row is recorded once.
    layers = torch.stack([rig.mesh.sum(own, "routes").cpu().to(torch.int16) for own in routes.values()])
    return [replace(a, routes=_routes_of(layers, packing, i)) for i, a in enumerate(found)]


def _routes_of(layers: Tensor, packing: Packing, number: int) -> Tensor:
    """[MoE layers, prompt and answer but the last token, K]."""
    place, answer = packing.places[number], packing.answers[number]
    row = layers[:, place.row]
    return torch.cat((row[:, place.prompt : place.prompt + len(answer.prompt) - 1], row[:, packing.targets(number)]), 1)


def _record_logprobs(scored: Scored, _: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {"logprobs": scored.logprobs}


def _collect(rig: Rig, packing: Packing, one: _Pass, played: Played, name: str, into: Tensor) -> None:
    """Copy what this rank recorded under a name to its rows of `into`, [R, T, ..]."""
    for microbatch, values in zip(played.microbatches.get(name, ()), played.losses.get(name, ()), strict=True):
        first = _first_row(rig, one, microbatch)
        rows = into[first : first + rig.config.parallel.microbatch_sequences]  # fewer where a pass is filled up
        rows.copy_(values.view(-1, packing.length, *values.shape[1:])[: len(rows)])


# -- an update


def learn(rig: Rig, answers: Sequence[Sample], choices: LossChoices, plan: PassOptions, step: int) -> UpdateResult:
    """Update the weights from all of `answers`. As in pretraining, a gradient that is not finite on any rank updates
    nothing. Gate biases stay as they are. Collective."""
    rl = rig.config.rl
    assert rl is not None
    parts = shares([len(answer.tokens) for answer in answers], choices.aggregate, rl.max_tokens)
    # Without a KL term, an answer with advantage 0 counts in the mean but needs no pass.
    taught = [i for i, answer in enumerate(answers) if answer.advantage or choices.has_kl_loss] or [0]
    packing = pack([answers[i] for i in taught], rig.config.data.seq_len)
    passes = list(_passes(rig, packing))
    point = Point(step, 0, sum(one.count for one in passes), packing.length)
    microbatches = point.sequences / rig.config.parallel.microbatch_sequences
    fields = _Fields.of(packing, [parts[i] for i in taught], microbatches)

    def accumulate(eager: bool) -> list[Played]:
        rig.optimizer.zero.zero_grads()
        played = []
        for one in passes:
            batch = _batch(rig, packing, one, plan, PolicyLoss(choices), fields.columns)
            executor = rig.training(one.count) if one is passes[-1] else rig.accumulating(one.count)
            share = gradient_scale(point) / microbatches
            played.append(executor.run(replace(batch, loss_scale=share, eager=eager)))
        return played

    rig.renew_copies()
    played, norm, _ = summed(rig, gradient_scale(point), accumulate)
    if math.isfinite(norm):
        update(rig, point, norm)
    rig.model.reset_loads()
    return _learnt(rig, norm, microbatches, played)


@dataclass(frozen=True)
class PolicyLoss:
    """The objective of an update: the columns are those of `Tokens`."""

    choices: LossChoices

    def __call__(self, scored: Scored, columns: tuple[Tensor, ...]) -> dict[str, Tensor]:
        tokens = Tokens(*columns)
        counted = tokens.share > 0
        terms = token_losses(self.choices, scored.logprobs, tokens)
        apart = torch.where(counted, scored.logprobs.detach() - tokens.sampled, 0.0)
        moved = torch.where(counted, scored.logprobs.detach() - tokens.reference, 0.0)
        entropies = torch.where(counted, scored.entropies, 0.0)
        sums = (counted, k3(-apart), k3(moved), terms.clipped, entropies)  # in the order of `TokenSums`
        return {
            "loss": objective(terms, tokens.share),
            "token_sums": torch.stack([column.sum().double() for column in sums]),
            "apart": apart.abs().max(),
        }


@dataclass(frozen=True)
class _Fields:
    """The per-token data of an update's answers: FP32, by answer, or by token end to end."""

    advantage: Tensor
    old: Tensor
    sampled: Tensor
    reference: Tensor
    share: Tensor

    @staticmethod
    def of(packing: Packing, parts: Sequence[float], microbatches: float) -> _Fields:
        """`parts`: the share of each token of each answer."""
        return _Fields(
            torch.tensor([answer.advantage for answer in packing.answers]),
            packing.end_to_end(lambda answer: answer.sampled if answer.old is None else answer.old),
            packing.end_to_end(lambda answer: answer.sampled),
            packing.end_to_end(lambda a: torch.zeros_like(a.sampled) if a.reference is None else a.reference),
            # Losses are means over microbatches, as in pretraining.
            torch.tensor([part * microbatches for part in parts]),
        )

    def columns(self, rows: PackedRows) -> tuple[Tensor, ...]:
        """`Tokens` of some rows."""
        by_token = (rows.of_tokens(values) for values in (self.old, self.sampled, self.reference))
        ends = rows.of_answers(self.share), rows.answer_numbers()
        return Tokens._make([rows.of_answers(self.advantage), *by_token, *ends])


def _learnt(rig: Rig, norm: float, microbatches: float, played: Sequence[Played]) -> UpdateResult:
    """The figures over all ranks, by two reductions."""
    device = rig.mesh.device
    losses = [loss for one in played for loss in one.losses.get("loss", ())]
    sums = [values for one in played for values in one.losses.get("token_sums", ())]
    others = [
        counts for one in played for name, some in one.losses.items() if name.startswith("other.") for counts in some
    ]
    apart = [value for one in played for value in one.losses.get("apart", ())]
    zeros = torch.zeros(1, dtype=torch.float64, device=device)
    own = torch.cat(
        (
            sum((loss.double().view(1) for loss in losses), zeros) / microbatches,
            sum(sums, zeros.expand(len(TokenSums._fields))),
            sum((counts.double() for counts in others), zeros.expand(2)),
        )
    )
    loss, *rest = rig.mesh.sum(own, "figures of an update").tolist()
    idle = sum(one.idle for one in played) / sum(one.ended - one.started for one in played)
    largest_apart = max((float(value) for value in apart), default=0.0)
    most = rig.mesh.max(torch.tensor([largest_apart, idle], dtype=torch.float64, device=device), "figures of an update")
    other, routed = rest[-2:]
    return UpdateResult(norm, loss, TokenSums(*rest[:-2]), float(most[0]), other / max(1.0, routed), float(most[1]))


# -- rows to microbatches


def _passes(rig: Rig, packing: Packing) -> Iterator[_Pass]:
    """As many full runs of the schedule as there are rows for, then the smallest legal one that takes the rest."""
    sizes = sorted(rig.plan.training)
    for first in range(0, packing.rows, sizes[-1]):
        left = packing.rows - first
        yield _Pass(first, next(size for size in sizes if size >= min(left, sizes[-1])))


def _first_row(rig: Rig, one: _Pass, microbatch: int) -> int:
    mesh = rig.mesh
    return one.first + (microbatch * mesh.data_ranks + mesh.data_rank) * rig.config.parallel.microbatch_sequences


def _batch(
    rig: Rig,
    packing: Packing,
    one: _Pass,
    plan: PassOptions,
    objective: Objective,
    columns: Callable[[PackedRows], tuple[Tensor, ...]],
) -> Batch:
    """This data rank's microbatches of a pass, with a loss scale of 0. `columns`: what the objective knows of rows."""
    size = rig.config.parallel.microbatch_sequences
    count = one.count // (size * rig.mesh.data_ranks)
    tokens, documents = [], []
    for first in (_first_row(rig, one, microbatch) for microbatch in range(count)):
        rows = PackedRows(packing, first, size)
        ids, numbers, shared = rows.tokens(1 + rig.config.model.mtp_depth)
        tokens.append(ids.to(rig.mesh.device))
        experts = _experts(rig, rows) if plan.replay else {}
        known = tuple(column.to(rig.mesh.device) for column in columns(rows))
        lesson = Lesson(objective, known, plan.temperature, experts, plan.record)
        documents.append(_documents(rig, numbers, shared, lesson))
    return Batch(tokens, 0.0, documents=documents)


def _documents(rig: Rig, numbers: np.ndarray, shared: np.ndarray, lesson: Lesson) -> Documents:
    """Documents with every MTP target's weight 0: MTP does not learn in RL."""
    depths = 1 + rig.config.model.mtp_depth
    nothing = np.zeros((len(numbers), numbers.shape[1] - depths), np.float32)
    return replace(documents_of(numbers, [nothing] * depths, rig.mesh.device, shared), lesson=lesson)


def _experts(rig: Rig, rows: PackedRows) -> dict[str, Tensor]:
    """The experts to replay, for the MoE layers on this rank."""
    names = moe_layers(rig)
    routes = rows.routes(len(names), rig.config.model.top_k).to(rig.mesh.device).long()
    return {name: own for name, own in zip(names, routes, strict=True) if name in rig.model.gates}
