"""Decoding over the ranks of a run: lanes of sequences that pass through the pipeline one behind the other.

A lane is a batch with slots and caches of its own. Each data rank has enough lanes to keep its pipeline busy, and a
lane always takes the same route through the stages, since its latents are cached there: with DualPipe, half of the
lanes enter at each end and use the weights that each rank holds for both directions. Every rank makes the same
decisions from the same values, so only hidden states and sampled tokens are sent, with drafts of the next ones if MTP
makes some. All ranks wait for the tokens of all lanes at the end of a step: with W lanes on each of R routes, a
pipeline of p stages is busy for W of W + p - 1 turns. (Sending each lane's tokens back as they are made would close the
gap, with messages that depend on when sequences end.)

Legend: S sequences, H hidden, N tokens, M MoE layers of the model, K choices per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dryvine.comm.mesh import Mesh
from dryvine.comm.pending import Pending
from dryvine.comm.wire import P2PWire
from dryvine.trainer.generate.cache import Cache
from dryvine.trainer.generate.feed import Feed, LaneStep, Stretch, prefill_feed, step_feed
from dryvine.trainer.generate.replay import Replay, Size, graph_size
from dryvine.trainer.generate.sampling import Drawn
from dryvine.trainer.generate.stage import CachedStage, draw

STRETCH = 512  # most tokens of a sequence in one prefill: the rows of its mask


class Span(NamedTuple):
    """The first `length` tokens of a slot."""

    lane: int
    slot: int
    length: int


Caches = dict[tuple[int, int], Cache]  # of this rank: by wave and stage
Reader = Callable[[int, Feed, Tensor], None]  # lane, what was fed, states [N, H] behind the last stage


class Decoder:
    """`routes[r][s]` is the pipeline rank of stage s for lanes of route r; `parts` are this rank's stages. A lane is
    numbered data rank x waves + wave, and takes route wave mod routes. Every method is collective."""

    def __init__(
        self,
        mesh: Mesh,
        routes: Sequence[Sequence[int]],
        parts: Mapping[int, CachedStage],
        budget: int,
        drafts: int,
        replay: Replay | None = None,
    ) -> None:
        """`budget`: tokens that a rank feeds at once, at most. `drafts`: how many tokens a step guesses for each slot,
        as many as MTP has depths, or none. `replay`: what runs steps without drafts as graphs, if anything."""
        self.mesh, self.routes, self.parts, self.budget, self.drafts = mesh, routes, parts, budget, drafts
        self._replay = replay
        self._kept: Caches | None = None
        self._end = len(routes[0]) - 1  # the last stage
        # Two lanes behind each other on every stage and route.
        self.waves = 1 if mesh.pp == 1 else 2 * mesh.pp
        self.lanes = mesh.data_ranks * self.waves
        self.spec = next(iter(parts.values())).spec
        self._wire = P2PWire(mesh)

    def caches(self) -> Caches:
        """Empty caches for the lanes of this rank."""
        return {
            (wave, stage): self.parts[stage].cache()
            for wave in range(self.waves)
            for stage, rank in enumerate(self._route(wave))
            if rank == self.mesh.pp_rank
        }

    def kept_caches(self) -> Caches:
        """Those of the last call of `keep`, or new ones. Slots hold numbers of before, which no new answer reads."""
        kept, self._kept = self._kept, None
        return kept or self.caches()

    def keep(self, caches: Caches) -> None:
        """Nobody uses these any more. Graphs have their addresses; without graphs they are freed."""
        if self._replay is not None:
            self._kept = caches

    def reserve(self, caches: Caches, lane: int, size: Size, most: int) -> None:
        """Make room for so many slots of so many positions in a lane. Caches that have grown in both directions hold
        `most` positions of all slots together, or with graphs, whose sizes are rounded up, four times as many."""
        if self._replay is not None:
            size, most = graph_size(*size), 4 * most
        for cache in self._caches_of(caches, lane):
            cache.reserve(*size, most)

    def copy(self, caches: Caches, lane: int, sources: Sequence[int], targets: Sequence[int], positions: int) -> None:
        """Copy the first `positions` positions of some slots of a lane to others."""
        for cache in self._caches_of(caches, lane):
            cache.copy(sources, targets, positions)

    def clear(self, caches: Caches, lane: int, slot: int) -> None:
        """Zero a slot whose contents are not finite, so that the slot's next answer is not affected."""
        for cache in self._caches_of(caches, lane):
            cache.clear(slot)

    @torch.no_grad()
    def prefill(self, caches: Caches, pieces: Mapping[int, Sequence[Stretch]], read: Reader | None = None) -> None:
        """Feed tokens to lanes without sampling. `read` gets the states behind the last stage, on the rank that has
        them; what is read is not gone on from, and MTP does not see it."""
        depths = 0 if read else self.drafts
        rounds = {lane: list(_rounds(some, self.budget)) for lane, some in pieces.items()}
        for number in range(max(map(len, rounds.values()), default=0)):
            now = {lane: some[number] for lane, some in rounds.items() if number < len(some)}
            waves = sorted({lane % self.waves for lane in now})
            device, rope = self.mesh.device, self.spec.rope
            feeds = {wave: prefill_feed(now.get(self._lane(wave), ()), depths, rope, device) for wave in waves}
            for wave, states_NH in self._pass(caches, feeds).items():
                if depths:
                    self.parts[self._end].read(states_NH, feeds[wave], caches[wave, self._end])
                if read is not None and len(states_NH):
                    read(self._lane(wave), feeds[wave], states_NH)

    def logits(self, x_NH: Tensor) -> Tensor:
        """FP32 [N, V], of the last stage's states."""
        return self.parts[self._end].logits(x_NH)

    @torch.no_grad()
    def step(self, caches: Caches, steps: Sequence[LaneStep]) -> Pending[list[Drawn]]:
        """Feed every slot in use and sample the next tokens: for all lanes, on every rank. `wait` is collective too."""
        waves = [w for w in range(self.waves) if any(len(steps[lane].tokens) for lane in self._lanes_of(w))]
        own = {wave: steps[self._lane(wave)] for wave in waves}
        drawn = self._drawn(caches, own) if self._replay is None else self._replayed(self._replay, caches, own)
        sizes = [len(step.tokens) for step in steps]
        return Pending(lambda: self._exchange({lane: coming.wait() for lane, coming in drawn.items()}, sizes))

    def _drawn(self, caches: Caches, own: Mapping[int, LaneStep]) -> dict[int, Pending[Drawn]]:
        """By lane, of the waves that end on this rank."""
        feeds = {wave: step_feed(one, self.spec, self.mesh.device) for wave, one in own.items()}
        return {
            self._lane(wave): self.parts[self._end].draw(x_NH, feeds[wave], caches[wave, self._end], own[wave])
            for wave, x_NH in self._pass(caches, feeds).items()
        }

    def _replayed(self, replay: Replay, caches: Caches, own: Mapping[int, LaneStep]) -> dict[int, Pending[Drawn]]:
        """The same by graphs."""
        return {
            self._lane(wave): draw(replay.step(caches[wave, self._end], step), step)
            for wave, step in own.items()
            if len(step.tokens)
        }

    def routes_of(self, caches: Caches, spans: Sequence[Span]) -> list[Tensor]:
        """The experts that cached tokens chose: int16 [M, length, K] for each span."""
        s, sizes = self.spec.shape, [span.length for span in spans]
        if not spans:
            return []
        lanes = np.repeat([span.lane for span in spans], sizes)
        slots = torch.from_numpy(np.repeat([span.slot for span in spans], sizes))
        positions = torch.from_numpy(np.concatenate([np.arange(size) for size in sizes]))
        out = torch.zeros(s.layers - s.first_dense, len(lanes), s.top_k, dtype=torch.int32, device=self.mesh.device)
        for lane in sorted({span.lane for span in spans}):
            of_lane = torch.from_numpy(np.flatnonzero(lanes == lane))
            at, rows, columns = (part.to(out.device) for part in (of_lane, slots[of_lane], positions[of_lane]))
            for (_, stage), cache in self._held(caches, lane):
                for mixture, routes in zip(self.parts[stage].mixtures, cache.routes, strict=True):
                    out[mixture, at] = routes[rows, columns].int()
        if self.mesh.size > 1:
            out = self.mesh.sum(out, "experts chosen")
        return list(out.short().cpu().split(sizes, 1))

    def _route(self, wave: int) -> Sequence[int]:
        return self.routes[wave % len(self.routes)]

    def _lane(self, wave: int) -> int:
        """The number of this data rank's lane of a wave."""
        return self.mesh.data_rank * self.waves + wave

    def _lanes_of(self, wave: int) -> range:
        """The lanes of a wave on all data ranks."""
        return range(wave, self.lanes, self.waves)

    def _held(self, caches: Caches, lane: int) -> Iterator[tuple[tuple[int, int], Cache]]:
        data, wave = divmod(lane, self.waves)
        return (pair for pair in caches.items() if data == self.mesh.data_rank and pair[0][0] == wave)

    def _caches_of(self, caches: Caches, lane: int) -> list[Cache]:
        return [cache for _, cache in self._held(caches, lane)]

    def _pass(self, caches: Caches, feeds: Mapping[int, Feed]) -> dict[int, Tensor]:
        """Run feeds, by wave, through all stages. Returns the states [N, H] of the waves that end on this rank."""
        states: dict[int, Tensor | None] = {}
        ended, leaving = {}, []
        for wave, stage in self._order(feeds):
            x_NH = self._arrive(wave, stage, feeds[wave], states) if stage else None
            x_NH = self.parts[stage](x_NH, feeds[wave], caches[wave, stage])
            _, *onward = self._route(wave)[stage:]
            if not onward:
                ended[wave] = x_NH
            elif onward[0] == self.mesh.pp_rank:
                states[wave] = x_NH
            else:
                leaving.append(self._send(wave, stage, onward[0], x_NH))
        for pending in leaving:
            pending.wait()
        return ended

    def _order(self, waves: Mapping[int, Feed]) -> list[tuple[int, int]]:
        """The (wave, stage) pairs that this rank runs, in order. A wave enters when the one before it on its route
        has left the first stage. All ranks count turns alike, so messages are received in the order in which they
        are sent, and ranks never wait for each other in a ring."""
        turns = [
            (wave // len(self.routes) + stage, wave, stage)
            for wave in waves
            for stage, rank in enumerate(self._route(wave))
            if rank == self.mesh.pp_rank
        ]
        return [(wave, stage) for _, wave, stage in sorted(turns)]

    def _arrive(self, wave: int, stage: int, feed: Feed, states: dict[int, Tensor | None]) -> Tensor | None:
        """The state that a stage starts from: embedded tokens, or what the stage before sent."""
        *_, source = self._route(wave)[:stage]
        if source == self.mesh.pp_rank:
            return states.pop(wave)
        if not len(feed.tokens):
            return self._nothing()
        like = torch.empty(len(feed.tokens), self.spec.shape.hidden, dtype=self.spec.dtype, device="meta")
        channel = (wave % len(self.routes), "down")
        return self._wire.receive((like,), source, channel, f"stage {stage}, lane {wave}").wait()[0]

    def _send(self, wave: int, stage: int, target: int, x_NH: Tensor) -> Pending[None]:
        """Send a stage's output to another rank. A lane without tokens sends nothing."""
        if not len(x_NH):
            return Pending.done(None)
        channel = (wave % len(self.routes), "down")
        return self._wire.send((x_NH,), target, channel, f"behind stage {stage}, lane {wave}")

    def _nothing(self) -> Tensor:
        return torch.empty(0, self.spec.shape.hidden, dtype=self.spec.dtype, device=self.mesh.device)

    def _exchange(self, drawn: Mapping[int, Drawn], sizes: Sequence[int]) -> list[Drawn]:
        """The tokens that the last stage of each lane has sampled, on every rank. Collective."""
        if self.mesh.size == 1:
            return [drawn[lane] for lane in range(self.lanes)]
        ends, many = np.cumsum([0, *sizes]), 1 + self.drafts
        table = torch.zeros(int(ends[-1]), many + many + self.drafts, dtype=torch.float64)
        for lane, parts in drawn.items():
            table[ends[lane] : ends[lane + 1]] = torch.from_numpy(np.concatenate(parts, 1))
        every = self.mesh.sum(table.to(self.mesh.device), "sampled tokens").cpu().numpy()
        columns = (np.split(every[start:end], (many, many + many), 1) for start, end in pairwise(ends))
        return [Drawn(tokens.astype(np.int64), logs, drafts.astype(np.int64)) for tokens, logs, drafts in columns]


def _rounds(pieces: Sequence[Stretch], budget: int) -> Iterator[list[Stretch]]:
    """Pieces in batches of at most `budget` tokens; longer ones are split over several batches."""
    batch: list[Stretch] = []
    room = budget
    for slot, start, tokens, after in pieces:
        whole, step = (*tokens, *after), min(STRETCH, budget)
        for first in range(0, len(tokens), step):
            end = min(first + step, len(tokens))
            piece = Stretch(slot, start + first, whole[first:end], whole[end : end + len(after)])
            # Two pieces of a sequence see each other's latents, and so never share a batch.
            if len(piece.tokens) > room or (batch and batch[-1].slot == slot):
                yield batch
                batch, room = [], budget
            batch.append(piece)
            room -= len(piece.tokens)
    if batch:
        yield batch
