"""What the answers of a lane have sampled and how they sample, as columns over its slots.

A step of a small model on a GPU takes a millisecond, in which Python handles few of hundreds of answers one by one. So
what happens to every answer in every step is arithmetic on whole columns.

Legend: S slots, L tokens, D drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dryvine.trainer.generate.requests import Request

Integers = NDArray[np.int64]
FIRST = 64  # tokens that there is room for at first


class Slots(NamedTuple):
    """A row for each slot. Columns are written in place."""

    tokens: Integers  # [S, L], sampled, of which `counts` are filled
    logprobs: NDArray[np.float64]  # [S, L]
    drafts: Integers  # [S, D], guesses of the next tokens; -1 before the first step
    newest: Integers  # the token to feed
    counts: Integers
    prompt: Integers  # its length
    most: Integers  # tokens to sample at most
    drafted: Integers
    accepted: Integers
    temperatures: NDArray[np.float64]
    top_p: NDArray[np.float64]
    seeds: NDArray[np.uint64]

    @staticmethod
    def of(requests: Sequence[Request], drafts: int) -> Slots:
        """Before the first step."""
        size = len(requests)
        return Slots(
            np.zeros((size, FIRST), np.int64),
            np.zeros((size, FIRST)),
            np.full((size, drafts), -1, np.int64),
            np.array([request.prompt[-1] for request in requests], np.int64),
            np.zeros(size, np.int64),
            np.array([len(request.prompt) for request in requests], np.int64),
            np.array([request.max_tokens for request in requests], np.int64),
            np.zeros(size, np.int64),
            np.zeros(size, np.int64),
            np.array([request.temperature for request in requests], np.float64),
            np.array([request.top_p for request in requests], np.float64),
            np.array([request.seed % (1 << 64) for request in requests], np.uint64),
        )

    def cached(self) -> Integers:
        """[S]: how many of a slot's tokens are in the cache, once it has sampled one."""
        return self.prompt + self.counts - 1

    def fed(self) -> Integers:
        """[S, 1 + D]: what the next step feeds. Where there is no guess yet, any token will do."""
        newest_S1 = self.newest.reshape(-1, 1)
        return np.concatenate((newest_S1, np.where(self.drafts < 0, newest_S1, self.drafts)), 1)

    def positions(self) -> int:
        """The most that an answer may have in the cache, without drafts."""
        return int((self.prompt + self.most - 1).max(initial=0))

    def beside(self, other: Slots) -> Slots:
        """Those of the other behind these."""
        width = max(self.tokens.shape[1], other.tokens.shape[1])
        pairs = zip(self._of_width(width), other._of_width(width), strict=True)
        return Slots(*(np.concatenate(pair) for pair in pairs))

    def moved(self, moves: Sequence[tuple[int, int]], number: int) -> Slots:
        """The first `number` slots, after moves (from slot, to slot)."""
        if moves:
            sources, targets = map(list, zip(*moves, strict=True))
            for column in self:
                column[targets] = column[sources]
        return Slots(*(column[:number] for column in self))  # type: ignore[arg-type]

    def with_room(self) -> Slots:
        """With room for another token in every slot."""
        width = self.tokens.shape[1]
        return self._of_width(2 * width) if self.counts.max(initial=0) == width else self

    def add(self, rows: Integers, tokens: Integers, logprobs: NDArray[np.float64]) -> None:
        """Another sampled token of some slots."""
        at = self.counts[rows]
        self.tokens[rows, at], self.logprobs[rows, at] = tokens, logprobs
        self.newest[rows], self.counts[rows] = tokens, at + 1

    def _of_width(self, width: int) -> Slots:
        behind = ((0, 0), (0, width - self.tokens.shape[1]))
        return self._replace(tokens=np.pad(self.tokens, behind), logprobs=np.pad(self.logprobs, behind))
