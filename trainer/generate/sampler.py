"""The public sampler: built from a rig, whose live weights it reads, or from a model alone.

It has no weights of its own, so nothing is sent or checked after an update: the model that generates is the model that
trains. A second engine would need the weights again in its own layout, and would round differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch

from dryvine.comm.dispatch.single_rank import SingleRank
from dryvine.comm.mesh import Layout, Mesh, make_mesh
from dryvine.trainer.generate.decoder import Decoder
from dryvine.trainer.generate.lane import Until
from dryvine.trainer.generate.layers import ToExperts
from dryvine.trainer.generate.replay import Replay, make_replay
from dryvine.trainer.generate.requests import Completion, Request
from dryvine.trainer.generate.rollout import LaneRoom, Rollout
from dryvine.trainer.generate.score import Passage, Score, Scorer
from dryvine.trainer.generate.stage import CachedStage
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.rig import Rig
from dryvine.trainer.run_plan import RunPlan

ALONE = 1 << 14  # tokens fed at once where no run's microbatch says otherwise


@dataclass(frozen=True)
class Room:
    """The limits of a rank: answers in progress, and bytes of their latents and routes."""

    slots: int = 2048
    cache_bytes: int = 1 << 30


class Sampler:
    """Generates with a model whose weights are read in place: after an update, with the new ones. In a layout of
    several ranks, every rank makes the same calls with the same requests and gets the same completions."""

    def __init__(self, decoder: Decoder, room: Room) -> None:
        shape, dtype = decoder.spec.shape, decoder.spec.dtype
        layers = sum(part.cached_layers for part in decoder.parts.values())
        row = layers * ((shape.kv_lora + shape.rope_dim) * dtype.itemsize + 2 * shape.top_k)
        most = int(decoder.mesh.max(torch.tensor(row, device=decoder.mesh.device), "bytes of a cached token"))
        slots = min(room.slots, decoder.budget // (1 + decoder.drafts)) // decoder.waves
        self._decoder = decoder
        self._room = LaneRoom(max(1, slots), max(1, room.cache_bytes // (max(1, most) * decoder.waves)))
        self._cancelled: set[Request] = set()

    @staticmethod
    def of_rig(rig: Rig, room: Room | None = None, speculate: bool = False) -> Sampler:
        """A sampler over the live weights of a training layout; `speculate`: MTP guesses tokens ahead, which changes
        none. Collective. Raises ValueError if there is no MTP to guess with."""
        parts, drafts = _parts(rig.model, {}, speculate), _drafts(rig.model, speculate)
        graphs = rig.config.parallel.graphs != "off" and isinstance(rig.dispatcher, SingleRank)
        replay = make_replay(parts) if graphs and not drafts else None
        return Sampler(_decoder(rig.plan, rig.mesh, parts, drafts, replay), room or Room())

    @staticmethod
    def in_layout(
        model: Model, mesh: Mesh, plan: RunPlan, room: Room | None = None, speculate: bool = False
    ) -> Sampler:
        """A sampler over this rank's part of a model, which records no graphs: other threads may launch meanwhile.
        Collective."""
        parts, drafts = _parts(model, {}, speculate), _drafts(model, speculate)
        return Sampler(_decoder(plan, mesh, parts, drafts, None), room or Room())

    @staticmethod
    def alone(
        model: Model,
        room: Room | None = None,
        experts: Mapping[str, ToExperts] | None = None,
        speculate: bool = False,
    ) -> Sampler:
        """A sampler over a model of one stage in this process; `experts` by layer, if their weights are elsewhere."""
        device, drafts = torch.device(model.spec.device), _drafts(model, speculate)
        mesh: Mesh = make_mesh(Layout(), device, timedelta(minutes=10))
        parts = _parts(model, experts or {}, speculate)
        replay = None if experts or drafts else make_replay(parts)
        return Sampler(Decoder(mesh, ((0,),), parts, ALONE, drafts, replay), room or Room())

    def generate(
        self, requests: Iterable[Request], until: Until | None = None, meanwhile: Callable[[], None] = lambda: None
    ) -> Iterator[Completion]:
        """Completions in the order in which they end; requests are taken from the iterable as there is room. `until` is
        asked after each token, with the tokens so far, whether to end there; not after one that ends the answer anyway.
        What is wrong with one request, or raised by `until` for it, ends that one with reason "failed". `meanwhile` is
        called in every step while a GPU computes it; what it raises ends the call. To stop, drop the iterator."""
        return Rollout(self._decoder, self._room, iter(requests), until, meanwhile, self._cancelled).completions()

    def score(self, passages: Iterable[Passage]) -> Iterator[Score]:
        """Log-probabilities of texts that are given, in their order. Raises ValueError for one that the model cannot
        read: empty, or longer than its positions."""
        return Scorer(self._decoder, self._room).scores(passages)

    def cancel(self, *requests: Request) -> None:
        """End these requests before their next token. Call it between two completions, and on every rank between the
        same two."""
        self._cancelled.update(requests)


def _decoder(
    plan: RunPlan, mesh: Mesh, parts: Mapping[int, CachedStage], drafts: int, replay: Replay | None
) -> Decoder:
    budget = plan.config.parallel.microbatch_sequences * plan.config.data.seq_len
    return Decoder(mesh, plan.schedule.routes, parts, budget, drafts, replay)


def _parts(model: Model, experts: Mapping[str, ToExperts], speculate: bool) -> dict[int, CachedStage]:
    return {number: CachedStage(model, stage, experts, speculate) for number, stage in model.stages.items()}


def _drafts(model: Model, speculate: bool) -> int:
    depth = model.spec.shape.mtp_depth
    if speculate and not depth:
        raise ValueError("this model has no MTP to speculate with: leave `speculate` out, or train with mtp_depth = 1")
    return depth if speculate else 0
