"""Decoding steps as CUDA graphs: a step is hundreds of small kernels, which a host launches more slowly than a GPU runs
them.

A graph has fixed sizes and addresses. So sequences and cached positions are filled up to powers of two, a graph is
recorded for each pair of these sizes, and all are dropped when the cache moves. What fills up are tokens of slots that
no answer has: they write to position 0 there, which an answer that takes the slot writes anew before it is read. Sizes
are first run without a graph, which loads their kernels, and recorded when they come again.

Sampling stays outside, since requests differ in it. Within a graph nothing is read by the host and nothing is sent, so
this is for one stage with all experts, whose products find their rows' counts on the device (`make_replay`).

Legend: S sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dryvine.comm.live_steps import LiveStep, LiveSteps
from dryvine.parallel.graphs import CudaRecorder, Recorder
from dryvine.trainer.generate.cache import Cache
from dryvine.trainer.generate.feed import Feed, LaneStep, grid_feed
from dryvine.trainer.generate.stage import CachedStage
from dryvine.trainer.model.grouped import reads_counts

SLOTS, POSITIONS = 16, 64  # the smallest graph
Size = tuple[int, int]  # sequences, cached positions


@dataclass(frozen=True)
class _Recorded:
    steps: list[LiveStep]  # a graph
    logits: Tensor  # where they are after a replay


class Replay:
    """Steps of one stage, which is the whole model. All graphs share memory: logits are valid until the next step."""

    def __init__(self, part: CachedStage, recorder: Recorder) -> None:
        self.part, self._recorder = part, recorder
        self._given: dict[Size, Tensor] = {}  # int64 [2, S]: tokens and positions of the next step
        self._recorded: dict[Size, _Recorded] = {}
        self._memory: Tensor | None = None  # of the cache that graphs have the address of
        self._pool = recorder.pool()

    def step(self, cache: Cache, step: LaneStep) -> Tensor:
        """Feed a token to each of the first S slots: FP32 logits [S, V]. The cache has room for a graph's size."""
        live = len(step.tokens)
        size = graph_size(live, int(step.positions.max()) + 1)
        if self._memory is not cache.latents:
            self._forget()
            self._memory = cache.latents
        if self.part.spec.fp8 is not None:
            self.part.spec.fp8.cache.refresh()  # graphs read these copies without asking for them
        rows = np.zeros((2, size[0]), np.int64)
        rows[0, :live], rows[1, :live] = step.tokens[:, 0], step.positions
        given = torch.from_numpy(rows)
        if size not in self._given:
            self._given[size] = given.to(cache.latents.device)
            return self._run(cache, size)[:live]
        self._given[size].copy_(given)
        recorded = self._recorded.get(size) or self._record(cache, size)
        for each in recorded.steps:
            each.run()
        return recorded.logits[:live]

    def _forget(self) -> None:
        """Drop all graphs; those that read or write them must have ended."""
        self._given.clear()
        if self._recorded:
            self._recorded.clear()
            self._recorder.free()
            self._pool = self._recorder.pool()

    def _record(self, cache: Cache, size: Size) -> _Recorded:
        steps, logits = self._recorder.record(lambda: self._run(cache, size), self._pool)
        self._recorded[size] = _Recorded(steps, logits)
        return self._recorded[size]

    def _run(self, cache: Cache, size: Size) -> Tensor:
        return self.part.logits(self.part(None, self._feed(size), cache))

    def _feed(self, size: Size) -> Feed:
        tokens, positions = self._given[size]
        return grid_feed(tokens.view(-1, 1), positions.view(-1, 1), size[1], self.part.spec)


def graph_size(slots: int, positions: int) -> Size:
    """That of the graph for so many."""
    return power_of_two(slots, SLOTS), power_of_two(positions, POSITIONS)


def power_of_two(number: int, least: int) -> int:
    """The smallest that is no less than either."""
    return max(least, 1 << (number - 1).bit_length())


def make_replay(parts: Mapping[int, CachedStage]) -> Replay | None:
    """None where a step cannot be a graph. All experts must be on this rank, and MTP must not speculate."""
    part = next(iter(parts.values()))
    spec = part.spec
    if torch.device(spec.device).type != "cuda" or spec.dtype != torch.bfloat16 or not part.whole:
        return None
    if reads_counts(torch.device(spec.device), training=False) if spec.fp8 is None else spec.fp8.engine.reads_counts:
        return None
    return Replay(part, CudaRecorder(torch.device(spec.device), LiveSteps()))
