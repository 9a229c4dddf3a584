"""Which answer is in which slot: joining, ending, and what each feeds next. Plain values, the same on every rank.

This is continuous batching: an answer that ends leaves its slot in the same step, the last one moves into it, and the
next request joins. So the slots in use are always the first ones, and no step multiplies an empty row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dryvine.trainer.generate.feed import LaneStep, Stretch
from dryvine.trainer.generate.requests import Reason, Request
from dryvine.trainer.generate.sampling import Drawn, Ways
from dryvine.trainer.generate.slots import Integers, Slots

Until = Callable[[Request, list[int]], bool]


@dataclass
class Answer:
    """A request with a slot. Once it has ended it has a `reason`, and what it sampled; `why` says what failed."""

    request: Request
    reason: Reason | None = None
    why: str = ""
    tokens: Integers = field(default_factory=lambda: np.empty(0, np.int64))
    logprobs: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    drafted: int = 0
    accepted: int = 0

    def fail(self, why: str) -> None:
        self.reason, self.why = "failed", why

    def ask(self, until: Until, tokens: list[int]) -> None:
        """Call the user's callback. An error in it ends this answer only."""
        try:
            if until(self.request, tokens):
                self.reason = "callback"
        except (Exception, SystemExit) as error:
            self.fail(f"the callback raised {type(error).__name__}: {error}")


class Join(NamedTuple):
    """What answers that joined a lane need first: tokens to feed, and prefixes to copy from another slot."""

    feed: list[Stretch]
    shared: list[tuple[int, int, int]]  # (from slot, to slot, positions)


class Lane:
    """The answers of a lane, by slot."""

    def __init__(self, device: torch.device, drafts: int) -> None:
        """`drafts`: guesses in each step."""
        self.device, self.drafts = device, drafts
        self.live: list[Answer] = []
        self._slots = Slots.of((), drafts)
        self._changed()

    def join(self, answers: Sequence[Answer]) -> Join:
        """Put answers into slots. All of a prompt but its last token is fed before the first step, which feeds the
        last. A prefix that another answer of the same group has cached, or will have after the first feed, is
        copied."""
        first = {a.request.group: slot for slot, a in reversed([*enumerate(self.live)])}
        joined = Join([], [])
        for slot, answer in enumerate(answers, len(self.live)):
            request, shared = answer.request, 0
            other = first.setdefault(request.group, slot) if request.group is not None else slot
            if other != slot:
                shared = self._shared(self.live[other].request.prompt, request.prompt)
                joined.shared.append((other, slot, shared))
            if shared < len(request.prompt) - 1:
                after = request.prompt[-1:] * self.drafts
                joined.feed.append(Stretch(slot, shared, request.prompt[shared:-1], after))
            self.live.append(answer)
        self._slots = self._slots.beside(Slots.of([answer.request for answer in answers], self.drafts))
        self._changed()
        return joined

    def _shared(self, one: Sequence[int], other: Sequence[int]) -> int:
        """How many of the positions that two prompts feed first are equal. MTP has seen `drafts` tokens more there."""
        return max(0, min(common(one, other) - self.drafts, len(one) - 1, len(other) - 1))

    @property
    def longest(self) -> int:
        """Cached positions that the longest answer may need; drafts may lie behind its last token."""
        return self._slots.positions() + self.drafts if self.live else 0

    def cached(self, slot: int) -> int:
        """How many of the slot's tokens are in the cache."""
        return int(self._slots.cached()[slot])

    def step(self) -> LaneStep:
        """The inputs of the next step."""
        return LaneStep(self._slots.fed(), self._slots.cached(), self._ways)

    def take(self, drawn: Drawn, until: Until | None) -> None:
        """Give each answer its sampled tokens, in so far as the drafts were right, and its next drafts."""
        s = self._slots
        right_S, guessed_S = (drawn.tokens >= 0).sum(1), (s.drafts >= 0).sum(1)
        s.drafted[:] += guessed_S
        s.accepted[:] += np.minimum(guessed_S, right_S - 1)
        s.drafts[:] = drawn.drafts
        rows = np.arange(len(self.live))
        for tokens_S, logprobs_S, place in zip(drawn.tokens.T, drawn.logprobs.T, range(1 + self.drafts), strict=True):
            rows = rows[right_S[rows] > place]
            rows = self._add(rows, tokens_S[rows], logprobs_S[rows], until)

    def _add(self, rows: Integers, tokens: Integers, logprobs: NDArray[np.float64], until: Until | None) -> Integers:
        """Add a token to each of these slots. Returns those that go on."""
        wrong = np.isnan(logprobs)
        for slot in rows[wrong]:
            self.live[slot].fail("the model's logits are not finite")
        rows, tokens, logprobs = rows[~wrong], tokens[~wrong], logprobs[~wrong]
        self._slots = s = self._slots.with_room()
        s.add(rows, tokens, logprobs)
        stop = np.isin(tokens, self._stops)
        for at in np.flatnonzero(stop):  # it may stop other answers only
            stop[at] = int(tokens[at]) in self.live[rows[at]].request.stop
        full = (s.counts[rows] == s.most[rows]) & ~stop
        for slot in rows[stop]:
            self.live[slot].reason = "stop"
        for slot in rows[full]:
            self.live[slot].reason = "length"
        rows = rows[~(stop | full)]
        return rows if until is None else self._ask(rows, until)

    def _ask(self, rows: Integers, until: Until) -> Integers:
        for slot in rows:
            self.live[slot].ask(until, self._slots.tokens[slot, : self._slots.counts[slot]].tolist())
        return np.array([slot for slot in rows if self.live[slot].reason is None], np.int64)

    def ended(self) -> list[tuple[int, Answer]]:
        """The slots of answers that have ended, which now have all that they sampled."""
        found = [(slot, answer) for slot, answer in enumerate(self.live) if answer.reason is not None]
        for slot, answer in found:
            s, count = self._slots, self._slots.counts[slot]
            answer.tokens, answer.logprobs = s.tokens[slot, :count].copy(), s.logprobs[slot, :count].copy()
            answer.drafted, answer.accepted = int(s.drafted[slot]), int(s.accepted[slot])
        return found

    def leave(self) -> list[tuple[int, int]]:
        """Remove the answers that have ended. Returns the moves: (from slot, to slot)."""
        staying = [slot for slot, answer in enumerate(self.live) if answer.reason is None]
        if len(staying) == len(self.live):
            return []
        holes = [slot for slot in range(len(staying)) if self.live[slot].reason is not None]
        moves = list(zip(staying[len(staying) - len(holes) :], holes, strict=True))
        for source, target in moves:
            self.live[target] = self.live[source]
        del self.live[len(staying) :]
        self._slots = self._slots.moved(moves, len(staying))
        self._changed()
        return moves

    def _changed(self) -> None:
        self._ways = Ways.of_columns(self._slots.temperatures, self._slots.top_p, self._slots.seeds, self.device)
        self._stops = np.array(sorted(frozenset().union(*{a.request.stop for a in self.live})), np.int64)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common prefix of two sequences."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
