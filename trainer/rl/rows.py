"""Answers packed into rows of tokens, each answer with its prompt a document of its own.

Every rank packs the same answers in the same way and takes the microbatches that are its own, as pretraining takes
sequences. So no row is sent between ranks, and the layout decides only who computes what.

Legend: R rows, T positions, N = S * T tokens of a microbatch of S rows, K choices of experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dryvine.trainer.rl.fitting import Fitted, fit

NOWHERE = -1  # the expert number of tokens without a recorded route


@dataclass(frozen=True, eq=False)
class Sample:
    """A sampled answer and what an update needs of it. Tensors are on the CPU."""

    prompt: tuple[int, ...]
    tokens: Tensor  # int64 [n]
    sampled: Tensor  # FP32 [n], log-probabilities that it was drawn with
    routes: Tensor | None = None  # int16 [MoE layers, len(prompt) + n - 1, K]
    advantage: float = 0.0
    old: Tensor | None = None  # FP32 [n]; None: as sampled
    reference: Tensor | None = None  # FP32 [n]; None: there is no reference

    @property
    def size(self) -> int:
        """Tokens, with the prompt."""
        return len(self.prompt) + len(self.tokens)


@dataclass(frozen=True)
class Packing:
    """`places[i]` is the place of answer i in `rows` rows of `length` input tokens; one more token is only
    predicted."""

    places: Sequence[Fitted]
    rows: int
    length: int
    answers: Sequence[Sample] = field(repr=False)

    def in_rows(self, first: int, count: int) -> list[int]:
        """The numbers of the answers in these rows."""
        return [i for i, place in enumerate(self.places) if first <= place.row < first + count]

    def targets(self, number: int) -> slice:
        """The positions of the row that predict the tokens of an answer."""
        answer, place = self.answers[number], self.places[number]
        start = place.start + len(answer.prompt) - 1
        return slice(start, start + len(answer.tokens))


def pack(answers: Sequence[Sample], length: int) -> Packing:
    """Raises ValueError for an answer that fits in no row."""
    sizes = [answer.size for answer in answers]
    if max(sizes) > length + 1:
        raise ValueError(
            f"an answer and its prompt have {max(sizes)} tokens, and a row {length} + 1: raise data.seq_len"
        )
    places = fit(sizes, length + 1)
    return Packing(places, 1 + max(place.row for place in places), length, answers)


def token_rows(packing: Packing, first: int, count: int, extra: int) -> tuple[Tensor, NDArray[np.int64]]:
    """`count` rows from row `first` on: tokens, and the number of each token's document, both int64 [count, T + extra].
    Padding, and rows past the last, is a document of zeros."""
    tokens = torch.zeros(count, packing.length + extra, dtype=torch.int64)
    documents = np.zeros((count, packing.length + extra), np.int64)
    for number in packing.in_rows(first, count):
        answer, place = packing.answers[number], packing.places[number]
        line = torch.cat((torch.tensor(answer.prompt, dtype=torch.int64), answer.tokens))
        row = place.row - first
        tokens[row, place.start : place.start + len(line)] = line
        # The number rises by one at each document's first token, and after its last.
        documents[row, place.start :] += 1
        documents[row, place.start + len(line) :] += 1
    return tokens, documents


def fill_targets(packing: Packing, first: int, count: int, value: Callable[[int], Tensor | float]) -> Tensor:
    """FP32 [N] of these rows: `value(i)`, [n] or one number, where answer i is predicted, and 0 elsewhere."""
    out = torch.zeros(count, packing.length)
    for number in packing.in_rows(first, count):
        out[packing.places[number].row - first, packing.targets(number)] = value(number)
    return out.flatten()


def answer_numbers(packing: Packing, first: int, count: int) -> Tensor:
    """int64 [N]: for each target position, the index of its answer among those of these rows; 0 elsewhere."""
    out = torch.zeros(count, packing.length, dtype=torch.int64)
    for place, number in enumerate(packing.in_rows(first, count)):
        out[packing.places[number].row - first, packing.targets(number)] = place
    return out.flatten()


def route_rows(packing: Packing, first: int, count: int, layer: int, top_k: int) -> Tensor:
    """int64 [N, K]: the experts of every token in MoE layer number `layer`."""
    out = torch.full((count, packing.length, top_k), NOWHERE, dtype=torch.int64)
    for number in packing.in_rows(first, count):
        routes, place = packing.answers[number].routes, packing.places[number]
        if routes is not None:
            out[place.row - first, place.start : place.start + routes.shape[1]] = routes[layer].long()
    return out.flatten(0, 1)
