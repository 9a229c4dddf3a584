"""DualPipe: microbatches enter at both ends, so that one direction's forward hides under the other's backward.

DeepSeek-V3, arXiv 2412.19437, section 3.2.1; the eight steps are those of the 2025 open-source release. Bubble
(P/2-1)(F&B+B-3W), P+1 microbatches held, two copies of the weights. DualPipeV (the same steps on one folded pipe) is
here too, because the only difference is how many of each step and what "the other direction" means: a direction is the
opposite route in DualPipe, the second half of the one route in DualPipeV.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

from dryvine.parallel.schedule.ir import Kind, Op, Schedule, Slot
from dryvine.parallel.schedule.rules import Generator, Sizes, one_chunk, opposite, vee

MakeOp = Callable[[Kind, int, int], Op]  # kind, phase (0: the direction that is nearer to this rank), index -> op


class _Writer:
    """The slots of one rank. Each direction's microbatches pass in order; deferred W leave first in, first out."""

    def __init__(self, make_op: MakeOp) -> None:
        self.make_op, self.slots = make_op, list[Slot]()
        self.count: Counter[tuple[Kind, int]] = Counter()
        self.deferred: deque[Op] = deque()

    def _next(self, kind: Kind, phase: int) -> Op:
        index = self.count[kind, phase]
        self.count[kind, phase] += 1
        return self.make_op(kind, phase, index)

    def forward(self, phase: int) -> None:
        self.slots.append((self._next("F", phase),))

    def backward(self, phase: int, split: bool = False) -> None:
        op = self._next("B", phase)
        self.slots.append((op._replace(kind="I") if split else op,))
        if split:
            self.deferred.append(op._replace(kind="W"))

    def pair(self, forward: int, backward: int) -> None:
        self.slots.append((self._next("F", forward), self._next("B", backward)))

    def weight(self) -> None:
        self.slots.append((self.deferred.popleft(),))


def _eight_steps(write: _Writer, inner: int, half: int, share: int) -> None:
    """`inner`: ranks between this one and its end; `half`: ranks before the turn; `share`: microbatches a direction."""
    outer = half - inner - 1
    for _ in range(2 * outer):  # 1: F0
        write.forward(0)
    for _ in range(inner + 1):  # 2: F0 F1
        write.forward(0)
        write.forward(1)
    for _ in range(outer):  # 3: I1 W F1
        write.backward(1, split=True)
        write.weight()
        write.forward(1)
    for i in range(share - 2 * half + inner + 1):  # 4: F0&B1 F1&B0
        if i == 0 and outer == 0:  # at the turn the first pair would wait for itself: F0 feeds what B1 waits for
            write.forward(0)
            write.backward(1)
        else:
            write.pair(0, 1)
        write.pair(1, 0)
    for _ in range(outer):  # 5: B1 F1&B0
        write.backward(1)
        write.pair(1, 0)
    middle, odd = divmod(inner + 1, 2)
    for i in range(inner + 1):  # 6: B1 B0, the second half split
        write.backward(1, split=i > middle or (i == middle and not odd))
        write.backward(0, split=i >= middle)
    for _ in range(outer):  # 7: W I0
        write.weight()
        write.backward(0, split=True)
    for _ in range(inner + 1):  # 8: W
        write.weight()


def _dualpipe_rank(rank: int, sizes: Sizes) -> tuple[Slot, ...]:
    share, near = sizes.microbatches // 2, int(rank >= sizes.pp // 2)

    def make_op(kind: Kind, phase: int, index: int) -> Op:
        route = near ^ phase
        stage = sizes.pp - 1 - rank if route else rank
        return Op(kind, stage, index + route * share, route)

    write = _Writer(make_op)
    _eight_steps(write, min(rank, sizes.pp - 1 - rank), sizes.pp // 2, share)
    return tuple(write.slots)


def _make_dualpipe(sizes: Sizes) -> Schedule:
    ranks = tuple(_dualpipe_rank(rank, sizes) for rank in range(sizes.pp))
    return Schedule("dualpipe", sizes.microbatches, opposite(sizes.pp), ranks)


def _dualpipev_rank(rank: int, sizes: Sizes) -> tuple[Slot, ...]:
    stages = (rank, 2 * sizes.pp - 1 - rank)
    write = _Writer(lambda kind, phase, index: Op(kind, stages[phase], index))
    _eight_steps(write, rank, sizes.pp, sizes.microbatches)
    return tuple(write.slots)


def _make_dualpipev(sizes: Sizes) -> Schedule:
    ranks = tuple(_dualpipev_rank(rank, sizes) for rank in range(sizes.pp))
    return Schedule("dualpipev", sizes.microbatches, vee(sizes.pp), ranks)


def _allows_dualpipe(sizes: Sizes) -> bool:
    even = sizes.pp % 2 == 0 and sizes.microbatches % 2 == 0
    return one_chunk(sizes) and even and sizes.microbatches >= 2 * sizes.pp


def _allows_dualpipev(sizes: Sizes) -> bool:
    return sizes.chunks == 2 and sizes.microbatches >= 2 * sizes.pp


dualpipe = Generator(_make_dualpipe, _allows_dualpipe, "pp even, microbatches even and at least twice pp, chunks 1")
dualpipev = Generator(_make_dualpipev, _allows_dualpipev, "microbatches at least twice pp, chunks 2", chunks=2)
