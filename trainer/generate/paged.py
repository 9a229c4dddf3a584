"""Experts that are read from the file when a gate chooses them, so that a model may be larger than memory.

An MoE model multiplies a few of its experts per token, and they are most of its weights. A fixed number of buffers
holds the experts used last; the least recently used one is evicted. Files are read rather than mapped: then exactly the
buffers are resident, and a file that is truncated meanwhile raises an error instead of a SIGBUS.

A thread reads ahead: the next expert of a layer while one multiplies, and, as a layer ends, those that the next layer's
gate would choose for the same rows; the residual stream makes that choice likely.

Legend: N tokens, H hidden, F width of an expert, K choices.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dryvine.trainer.generate.experts import within
from dryvine.trainer.generate.layers import ToExperts
from dryvine.trainer.generate.open import WeightSource
from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.names import Mapped, places
from dryvine.trainer.hand_off.slices import Slice
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.gate import Gate, choose_experts
from dryvine.trainer.model.shape import Shape
from dryvine.trainer.model.swiglu import swiglu_forward
from dryvine.trainer.tensors.int8 import Matrix, empty_matrix

Key = tuple[str, int]  # layer, expert
LEAST = 2  # buffers: one multiplies while the other is read
AHEAD = 4  # most experts that are read ahead at a time


class Page(NamedTuple):
    """One buffer: gate_up [2F, H], down [H, F], in the dtype to multiply in, or in 8 bits."""

    gate_up: Matrix
    down: Matrix

    @staticmethod
    def empty(shape: Shape, dtype: torch.dtype) -> Page:
        size = (2 * shape.expert_ffn, shape.hidden), (shape.hidden, shape.expert_ffn)
        return Page(*(empty_matrix(*part, dtype) for part in size))


@dataclass
class PageFigures:
    """Counts since the start. `late`: hits whose read was still in progress."""

    hits: int = 0
    late: int = 0
    misses: int = 0
    bytes_read: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)


class ExpertPages:
    """The experts of all layers in at most `memory` bytes. Not thread-safe; a returned expert may be used until the
    next call. Raises HandOffError if `memory` is too small."""

    def __init__(self, source: WeightSource, dtype: torch.dtype, memory: int) -> None:
        self._source, self._dtype, self.figures = source, dtype, PageFigures()
        s = source.shape
        size = sum(part.nbytes for part in Page.empty(s, dtype))
        self._most = min(memory // size, s.routed * (s.layers - s.first_dense + s.mtp_depth))
        if self._most < LEAST:
            raise HandOffError(
                f"--expert-memory {memory:,} bytes: an expert has {size:,}, and {LEAST} must fit: give {LEAST * size:,}"
            )
        self._where = _places_by_expert(s)
        self._pages: OrderedDict[Key, Future[Page]] = OrderedDict()
        self._reader = ThreadPoolExecutor(1, "experts")

    @property
    def experts(self) -> int:
        """The experts of each layer."""
        return self._source.shape.routed

    def get(self, key: Key) -> Page:
        """An expert's weights, from a buffer or from the file."""
        if key in self._pages:
            self.figures.hits += 1
            self.figures.late += not self._pages[key].done()
        else:
            self.figures.misses += 1
            self._begin(key)
        self._pages.move_to_end(key)
        return self._pages[key].result()

    def ahead(self, keys: Iterable[Key], most: int) -> None:
        """Start reading experts that are likely to be needed; at most `most` that are not in a buffer."""
        new = [key for key in keys if key not in self._pages][: min(most, self._most - 1)]
        for key in new:
            self._begin(key)

    def _begin(self, key: Key) -> None:
        page = self._room()
        self._pages[key] = self._reader.submit(self._read, key, page)

    def _room(self) -> Page:
        """A free buffer, a new one, or that of the least recently used expert."""
        if len(self._pages) == self._most:
            return self._pages.popitem(last=False)[1].result()
        return Page.empty(self._source.shape, self._dtype)

    def _read(self, key: Key, page: Page) -> Page:
        """Fill a page. Runs in the reader's thread."""
        with torch.no_grad():
            for place in self._where[key]:
                is_down, s = place.ours.endswith("down"), self._source.shape
                rows = s.hidden if is_down else 2 * s.expert_ffn  # of an expert
                matrix = page.down if is_down else page.gate_up
                matrix.write(place.first // place.shape[1] % rows, self._source.read(Slice(place, 0, place.shape[0])))
                self.figures.bytes_read += place.elements * self._dtype.itemsize
        return page


def _places_by_expert(shape: Shape) -> dict[Key, list[Mapped]]:
    found: dict[Key, list[Mapped]] = {}
    for place in places(shape):
        if ".experts." in place.ours:
            layer = place.ours.split(".experts.")[0].removesuffix(".layer")  # MTP's gates go by their block's name
            size = (1 if place.ours.endswith("down") else 2) * place.elements
            found.setdefault((layer, place.first // size), []).append(place)
    return found


def paged(pages: ExpertPages, layer: str, after: tuple[str, Gate] | None) -> ToExperts:
    """The experts of a layer; `after`: the next MoE layer and its gate, for reading ahead."""

    def ffn(expert: int, rows_RH: Tensor, weights_R: Tensor) -> Tensor:
        page = pages.get((layer, expert))
        return page.down.product(swiglu_forward(page.gate_up.product(rows_RH), weights_R))

    one_by_one = within(ffn, pages.experts)

    def run(rows_NH: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> Tensor:
        pages.ahead(((layer, expert) for expert in experts_NK.unique().tolist()), AHEAD)
        out_NH = one_by_one(rows_NH, weights_NK, experts_NK)
        if after is not None and len(rows_NH):
            name, gate = after
            pages.ahead(((name, expert) for expert in _likely(gate, rows_NH)), AHEAD)
        return out_NH

    return run


def _likely(gate: Gate, rows_NH: Tensor) -> list[int]:
    """The experts that a gate chooses for the rows of the layer before, those of most tokens first."""
    chosen = choose_experts(gate(rows_NH).sigmoid(), gate.bias, gate.shape).flatten()
    counts = torch.bincount(chosen, minlength=gate.shape.routed)
    order: list[int] = counts.argsort(descending=True).tolist()
    return order[: int((counts > 0).sum())]


def paged_experts(model: Model, pages: ExpertPages) -> dict[str, ToExperts]:
    """The experts of every MoE layer of a model, by layer."""
    gates = list(model.gates.items())
    following = [*gates[1:], None]
    return {name: paged(pages, name, after) for (name, _), after in zip(gates, following, strict=True)}
