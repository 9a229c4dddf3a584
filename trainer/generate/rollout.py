"""One call of `Sampler.generate`: requests enter slots as there is room, all lanes step together, completions come out.

The control flow is a pure function of the requests and of the sampled tokens. Every rank runs all of it, so ranks agree
on every slot without communication. There is no scheduler process that could fail; the price is that callbacks run on
every rank and must return the same there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from dryvine.trainer.generate.decoder import Decoder, Span
from dryvine.trainer.generate.feed import Stretch
from dryvine.trainer.generate.lane import Answer, Lane, Until
from dryvine.trainer.generate.requests import Completion, Request
from dryvine.trainer.model.shape import Shape


class LaneRoom(NamedTuple):
    """The limits of a lane: slots, and cached positions over all of them."""

    slots: int
    positions: int


class Rollout:
    """`cancelled` holds requests to end; the caller may add some between two completions."""

    def __init__(
        self,
        decoder: Decoder,
        room: LaneRoom,
        requests: Iterator[Request],
        until: Until | None,
        meanwhile: Callable[[], None],
        cancelled: set[Request],
    ) -> None:
        self._decoder, self._room, self._requests, self._until = decoder, room, requests, until
        self._meanwhile, self._cancelled = meanwhile, cancelled
        self._lanes = [Lane(decoder.mesh.device, decoder.drafts) for _ in range(decoder.lanes)]
        self._caches = decoder.kept_caches()
        self._next: Answer | None = None  # taken from the iterable, and waiting for room
        self._last: tuple[int | None, int] = (None, 0)  # the group that joined last, and its lane

    def completions(self) -> Iterator[Completion]:
        """All completions, in the order in which they end."""
        try:
            yield from self._to_the_end()
        finally:
            self._decoder.keep(self._caches)

    def _to_the_end(self) -> Iterator[Completion]:
        while True:
            for answer in self._admit():
                yield self._completion(answer, self._no_routes())
            if not any(lane.live for lane in self._lanes):
                return
            coming = self._decoder.step(self._caches, [lane.step() for lane in self._lanes])
            self._meanwhile()  # a GPU computes now
            for lane, drawn in zip(self._lanes, coming.wait(), strict=True):
                lane.take(drawn, self._until)
            yield from self._leave()
            while self._cancel():
                yield from self._leave()

    def _cancel(self) -> bool:
        """End the answers to cancelled requests. Returns whether there are some."""
        if not self._cancelled:
            return False
        found = [answer for lane in self._lanes for answer in lane.live if answer.request in self._cancelled]
        for answer in found:
            answer.reason = "cancelled"
        self._cancelled.clear()
        return bool(found)

    def _leave(self) -> Iterator[Completion]:
        """The answers that have ended, with their routes. The last slots move into the free ones."""
        ended = [
            (answer, Span(number, slot, lane.cached(slot)))
            for number, lane in enumerate(self._lanes)
            for slot, answer in lane.ended()
        ]
        if not ended:
            return
        routes = self._decoder.routes_of(self._caches, [span for _, span in ended])
        for answer, span in ended:
            if answer.reason == "failed":
                self._decoder.clear(self._caches, span.lane, span.slot)
        for number, lane in enumerate(self._lanes):
            if moves := lane.leave():
                sources, targets = zip(*moves, strict=True)
                length = max(lane.cached(slot) for slot in targets)
                self._decoder.copy(self._caches, number, sources, targets, length)
        for (answer, _), chosen in zip(ended, routes, strict=True):
            yield self._completion(answer, chosen)

    def _admit(self) -> list[Answer]:
        """Give slots to waiting requests while there are both. Returns the requests that are impossible."""
        refused: list[Answer] = []
        if self._peek() is None:
            return refused
        joining: list[list[Answer]] = [[] for _ in self._lanes]
        longest = [lane.longest for lane in self._lanes]
        while (answer := self._peek()) is not None:
            if why := _refusal(answer.request, self._decoder.spec.shape):
                answer.fail(why)
                refused.append(answer)
            elif (lane := self._lane_for(answer.request, joining, longest)) is not None:
                joining[lane].append(answer)
                longest[lane] = max(longest[lane], self._needed(answer.request))
                self._last = (answer.request.group, lane)
            else:
                break
            self._next = None
        self._join(joining, longest)
        return refused

    def _needed(self, request: Request) -> int:
        """Cached positions that a request needs; drafts may lie behind its last token."""
        return _positions(request) + self._decoder.drafts

    def _peek(self) -> Answer | None:
        if self._next is None:
            self._next = next((Answer(request) for request in self._requests), None)
        return self._next

    def _lane_for(self, request: Request, joining: list[list[Answer]], longest: list[int]) -> int | None:
        """The lane of the request's group, or else the emptiest lane; only one with room."""

        def held(lane: int) -> int:
            return len(self._lanes[lane].live) + len(joining[lane])

        def fits(lane: int) -> bool:
            slots = held(lane) + 1
            positions = slots * max(longest[lane], self._needed(request))
            return slots == 1 or (slots <= self._room.slots and positions <= self._room.positions)

        group, last = self._last
        if group is not None and group == request.group and fits(last):
            return last
        free = [lane for lane in range(len(self._lanes)) if fits(lane)]
        return min(free, key=held, default=None)

    def _join(self, joining: list[list[Answer]], longest: list[int]) -> None:
        """Feed the prompts of new answers; a prefix shared by a group is fed once."""
        feeds: dict[int, list[Stretch]] = {}
        late: dict[int, list[Stretch]] = {}
        shared = {}
        for number, (lane, answers) in enumerate(zip(self._lanes, joining, strict=True)):
            if answers:
                joined = lane.join(answers)
                size = (len(lane.live), longest[number])
                self._decoder.reserve(self._caches, number, size, self._room.positions)
                followers = {target for _, target, _ in joined.shared}
                feeds[number] = [piece for piece in joined.feed if piece.slot not in followers]
                late[number] = [piece for piece in joined.feed if piece.slot in followers]
                shared[number] = joined.shared
        self._decoder.prefill(self._caches, feeds)
        for number, copies in shared.items():
            if copies:
                sources, targets, lengths = zip(*copies, strict=True)
                self._decoder.copy(self._caches, number, sources, targets, max(lengths))
        self._decoder.prefill(self._caches, late)

    def _completion(self, answer: Answer, routes: torch.Tensor) -> Completion:
        assert answer.reason is not None
        tokens, logprobs = torch.from_numpy(answer.tokens), torch.from_numpy(answer.logprobs).float()
        counts = answer.drafted, answer.accepted
        return Completion(answer.request, tokens, logprobs, routes, answer.reason, answer.why, *counts)

    def _no_routes(self) -> torch.Tensor:
        s = self._decoder.spec.shape
        return torch.empty(s.layers - s.first_dense, 0, s.top_k, dtype=torch.int16)


def _positions(request: Request) -> int:
    """All tokens of a request but the last, which is never fed."""
    return len(request.prompt) + request.max_tokens - 1


def _refusal(request: Request, shape: Shape) -> str | None:
    """Why a request is impossible, and the fix; None if it is possible."""
    wrong = next((token for token in request.prompt if not 0 <= token < shape.vocab), None)
    reach = shape.max_position
    checks = [
        (not request.prompt, "the prompt is empty: give one token at least, such as the document's beginning"),
        (wrong is not None, f"token {wrong} of the prompt is not in the vocabulary of {shape.vocab}: encode it anew"),
        (request.max_tokens < 1, f"max_tokens = {request.max_tokens}: ask for one token at least"),
        (
            _positions(request) > reach,
            f"prompt of {len(request.prompt)} + max_tokens {request.max_tokens} exceed the model's {reach} positions: "
            f"shorten the prompt or lower max_tokens",
        ),
        (
            not 0 <= request.temperature < math.inf,
            f"temperature = {request.temperature}: 0 (the best token) or a positive number",
        ),
        (not 0 < request.top_p <= 1, f"top_p = {request.top_p}: a number above 0, and 1 at most"),
    ]
    return next((why for is_wrong, why in checks if is_wrong), None)
