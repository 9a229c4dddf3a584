"""How likely a model finds texts that are given: the log-probability of every token from one on, in one forward.

The prefill of generation with its logits read, so that a text is scored in every layout, number format and paging in
which it could be generated, and by the same functions. Texts that begin alike, as the choices of a question do, are fed
their common beginning once if they are neighbours.

Legend: N tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from dryvine.trainer.generate.decoder import Decoder, Reader
from dryvine.trainer.generate.feed import Feed, Stretch
from dryvine.trainer.generate.lane import common
from dryvine.trainer.generate.rollout import LaneRoom

LOGITS = 1 << 24  # numbers of logits at a time: 64 MiB


class Passage(NamedTuple):
    """Token ids, and the place of the first one that is scored, at least 1: the first token has nothing before it."""

    tokens: tuple[int, ...]
    first: int = 1


class Score(NamedTuple):
    """Of the tokens from `first` on: logarithms of their probabilities, FP64; whether each was the likeliest."""

    logprobs: Tensor
    best: Tensor


@dataclass
class Scorer:
    """Collective, as generation is."""

    decoder: Decoder
    room: LaneRoom

    def scores(self, passages: Iterable[Passage]) -> Iterator[Score]:
        """In order. Raises ValueError for a passage that the model cannot read."""
        caches, batches = self.decoder.caches(), self._batches(passages)
        while now := list(islice(batches, self.decoder.lanes)):
            sheets = [_Sheet(batch) for batch in now]
            for lane, sheet in enumerate(sheets):
                self.decoder.reserve(caches, lane, (len(sheet.batch), sheet.longest), self.room.positions)
            self.decoder.prefill(caches, {lane: sheet.first for lane, sheet in enumerate(sheets)}, self._reader(sheets))
            for lane, sheet in enumerate(sheets):
                if sheet.shared:
                    sources, targets, lengths = zip(*sheet.shared, strict=True)
                    self.decoder.copy(caches, lane, sources, targets, max(lengths))
            self.decoder.prefill(caches, {lane: sheet.late for lane, sheet in enumerate(sheets)}, self._reader(sheets))
            for sheet in sheets:
                yield from sheet.scores(self.decoder)

    def _batches(self, passages: Iterable[Passage]) -> Iterator[list[Passage]]:
        """As many neighbours as a lane has room for, and no more tokens than are fed at once."""
        batch: list[Passage] = []
        for passage in passages:
            self._check(passage)
            longest = max(len(one.tokens) for one in (*batch, passage))
            many = len(batch) + 1
            full = many > self.room.slots or many * longest > min(self.room.positions, self.decoder.budget)
            if batch and full:
                yield batch
                batch = []
            batch.append(passage)
        if batch:
            yield batch

    def _check(self, passage: Passage) -> None:
        reach = self.decoder.spec.shape.max_position
        if not 1 <= passage.first < len(passage.tokens):
            raise ValueError(f"a passage of {len(passage.tokens)} tokens has nothing from token {passage.first} on")
        if len(passage.tokens) - 1 > reach:
            raise ValueError(f"a passage of {len(passage.tokens)} tokens exceeds the model's {reach} positions and one")

    def _reader(self, sheets: Sequence[_Sheet]) -> Reader:
        def read(lane: int, feed: Feed, states_NH: Tensor) -> None:
            sheets[lane].read(feed, states_NH, self.decoder)

        return read


class _Sheet:
    """The passages of a lane, by slot; what is fed first, what follows on a copied beginning, and what was read."""

    def __init__(self, batch: Sequence[Passage]) -> None:
        self.batch, self.longest = batch, max(len(passage.tokens) for passage in batch) - 1
        self.first: list[Stretch] = []
        self.late: list[Stretch] = []
        self.shared: list[tuple[int, int, int]] = []  # (from slot, to slot, positions)
        self._lay_out()
        # Of the token that each position is followed by; what is not asked for is -1.
        self._next = torch.full((len(batch), self.longest), -1)
        for row, passage in zip(self._next, batch, strict=True):
            row[passage.first - 1 : len(passage.tokens) - 1] = torch.tensor(passage.tokens[passage.first :])
        self._found = torch.zeros(2, *self._next.shape, dtype=torch.float64)  # log-probability; whether it was the best

    def _lay_out(self) -> None:
        leader = 0
        for slot, (tokens, first) in enumerate(self.batch):
            shared = min(common(self.batch[leader].tokens[:-1], tokens), first - 1) if slot > leader else 0
            if 2 * shared < len(tokens):
                leader = slot
                self.first.append(Stretch(slot, 0, tokens[:-1]))
            else:
                self.shared.append((leader, slot, shared))
                self.late.append(Stretch(slot, shared, tokens[shared:-1]))

    def read(self, feed: Feed, states_NH: Tensor, decoder: Decoder) -> None:
        """What the last stage says to tokens that were fed."""
        slots, positions = feed.slots.cpu(), feed.positions.cpu()
        following = self._next[slots, positions]
        wanted = following >= 0
        rows, targets = states_NH[wanted.to(states_NH.device)], following[wanted]
        step = max(1, LOGITS // decoder.spec.shape.vocab)
        parts = [
            _read(decoder.logits(part), at) for part, at in zip(rows.split(step), targets.split(step), strict=True)
        ]
        if parts:
            self._found[:, slots[wanted], positions[wanted]] = torch.cat(parts, 1)

    def scores(self, decoder: Decoder) -> Iterator[Score]:
        """Of each passage. Collective."""
        mesh = decoder.mesh
        both = mesh.sum(self._found.to(mesh.device), "scores").cpu() if mesh.size > 1 else self._found
        for slot, passage in enumerate(self.batch):
            there = slice(passage.first - 1, len(passage.tokens) - 1)
            yield Score(both[0, slot, there], both[1, slot, there] > 0)


def _read(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """FP64 [2, N]: of each target, its log-probability, and whether nothing is likelier."""
    logprobs_NV = logits_NV.log_softmax(-1)
    targets_N1 = targets_N.to(logits_NV.device).unsqueeze(1)
    found_N1 = logprobs_NV.gather(1, targets_N1)
    best_N1 = logprobs_NV.argmax(-1, keepdim=True) == targets_N1
    return torch.cat((found_N1.double(), best_N1.double()), 1).t().cpu()
