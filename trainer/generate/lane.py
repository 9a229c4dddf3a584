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

from dryvine.trainer.generate.feed import LaneStep, Stretch
from dryvine.trainer.generate.requests import Reason, Request
from dryvine.trainer.generate.sampling import Drawn, Ways

Until = Callable[[Request, list[int]], bool]


@dataclass
class Answer:
    """The completion so far. Once it has ended it has a `reason`; `why` says what failed."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: Reason | None = None
    why: str = ""
    drafts: list[int] = field(default_factory=list)  # guesses of the next tokens, or none
    drafted: int = 0
    accepted: int = 0

    @property
    def cached(self) -> int:
        """How many of its tokens are in the cache, once it has sampled one."""
        return len(self.request.prompt) + len(self.tokens) - 1

    def follow(self, tokens: list[int], logprobs: list[float], drafts: list[int], until: Until | None) -> None:
        """What a step made of this answer: its tokens, in so far as the drafts were right, and the next drafts."""
        right = [token for token in tokens if token >= 0]
        self.drafted += len(self.drafts)
        self.accepted += min(len(self.drafts), len(right) - 1)
        self.drafts = drafts
        for token, logprob in zip(right, logprobs, strict=False):
            if self.reason is None:
                self.take(token, logprob, until)

    def take(self, token: int, logprob: float, until: Until | None) -> None:
        """Add a sampled token, and end the answer if it was the last."""
        if logprob != logprob:
            self.fail("the model's logits are not finite")
            return
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in self.request.stop:
            self.reason = "stop"
        elif len(self.tokens) == self.request.max_tokens:
            self.reason = "length"
        elif until is not None:
            self._ask(until)

    def fail(self, why: str) -> None:
        self.reason, self.why = "failed", why

    def _ask(self, until: Until) -> None:
        """Call the user's callback. An error in it ends this answer only."""
        try:
            if until(self.request, self.tokens):
                self.reason = "callback"
        except Exception as error:
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
        self._ways = Ways.of((), device)

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
        self._changed()
        return joined

    def _shared(self, one: Sequence[int], other: Sequence[int]) -> int:
        """How many of the positions that two prompts feed first are equal. MTP has seen `drafts` tokens more there."""
        return max(0, min(common(one, other) - self.drafts, len(one) - 1, len(other) - 1))

    def step(self) -> LaneStep:
        """The inputs of the next step."""
        newest = [(answer.tokens or answer.request.prompt)[-1] for answer in self.live]
        # Where there is no guess yet, any will do.
        rows = [
            (token, *(answer.drafts or [token] * self.drafts)) for token, answer in zip(newest, self.live, strict=True)
        ]
        positions = np.array([answer.cached for answer in self.live], np.int64)
        return LaneStep(np.array(rows, np.int64).reshape(-1, 1 + self.drafts), positions, self._ways)

    def take(self, drawn: Drawn, until: Until | None) -> None:
        """Give each answer its sampled tokens."""
        if not self.drafts:
            columns = (drawn.tokens[:, 0].tolist(), drawn.logprobs[:, 0].tolist())
            for answer, token, logprob in zip(self.live, *columns, strict=True):
                answer.take(token, logprob, until)
            return
        for answer, *its in zip(self.live, *(part.tolist() for part in drawn), strict=True):
            answer.follow(*its, until)

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
        self._changed()
        return moves

    def _changed(self) -> None:
        self._ways = Ways.of([answer.request for answer in self.live], self.device)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common prefix of two sequences."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
