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

from dryvine.trainer.generate.decoder import Drawn, LaneStep
from dryvine.trainer.generate.feed import Stretch
from dryvine.trainer.generate.requests import Reason, Request
from dryvine.trainer.generate.sampling import Ways

Until = Callable[[Request, list[int]], bool]


@dataclass
class Answer:
    """The completion so far. Once it has ended it has a `reason`; `why` says what failed."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: Reason | None = None
    why: str = ""

    @property
    def cached(self) -> int:
        """How many of its tokens are in the cache, once it has sampled one."""
        return len(self.request.prompt) + len(self.tokens) - 1

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

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.live: list[Answer] = []
        self._ways: Ways | None = None
        self._newest = self._positions = np.zeros(0, np.int64)

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
                shared = common(self.live[other].request.prompt[:-1], request.prompt[:-1])
                joined.shared.append((other, slot, shared))
            if shared < len(request.prompt) - 1:
                joined.feed.append(Stretch(slot, shared, request.prompt[shared:-1]))
            self.live.append(answer)
        self._changed()
        return joined

    def step(self) -> LaneStep:
        """The inputs of the next step."""
        return LaneStep(self._newest, self._positions, self._ways)

    def take(self, drawn: Drawn, until: Until | None) -> None:
        """Give each answer its sampled token."""
        for answer, token, logprob in zip(self.live, drawn.tokens.tolist(), drawn.logprobs.tolist(), strict=True):
            answer.take(token, logprob, until)
        self._newest, self._positions = drawn.tokens, self._positions + 1

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
        requests = [answer.request for answer in self.live]
        self._ways = Ways.of(requests, self.device) if requests else None
        self._newest = np.array([(a.tokens or a.request.prompt)[-1] for a in self.live], np.int64)
        self._positions = np.array([len(a.request.prompt) + len(a.tokens) - 1 for a in self.live], np.int64)


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common prefix of two sequences."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
