"""Answers packed into rows of tokens, each answer behind its prompt as if it were alone.

Answers to one question begin with the same prompt, which is in a row once: a quarter of the tokens of 16 short answers,
and most of them where prompts are long. The last token of a prompt is with every answer, since it predicts the first
token of each.

Every rank packs the same answers in the same way and takes the microbatches that are its own, as pretraining takes
sequences. So no row is sent between ranks, and the layout decides only who computes what.

Legend: R rows, T positions, N = S * T tokens of a microbatch of S rows, K choices of experts per token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dryvine.trainer.model.documents import ALONE
from dryvine.trainer.rl.config import CORE_TOKENS
from dryvine.trainer.rl.fitting import OpenRows

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


class AnswerPlace(NamedTuple):
    """Where an answer is: its row, and the positions there of the prompt's last token, which the answer's own tokens
    follow, and of the prompt's first, whose others but the last are shared."""

    row: int
    start: int
    prompt: int


@dataclass(frozen=True)
class Packing:
    """`places[i]` is the place of answer i in `rows` rows of `length` input tokens; one more token is only
    predicted."""

    places: Sequence[AnswerPlace]
    rows: int
    length: int
    answers: Sequence[Sample] = field(repr=False)

    @cached_property
    def by_row(self) -> list[list[int]]:
        """The numbers of the answers in each row."""
        found: list[list[int]] = [[] for _ in range(self.rows)]
        for number, place in enumerate(self.places):
            found[place.row].append(number)
        return found

    def targets(self, number: int) -> slice:
        """The positions of the row that predict the tokens of an answer."""
        start = self.places[number].start
        return slice(start, start + len(self.answers[number].tokens))


def pack(answers: Sequence[Sample], length: int) -> Packing:
    """Answers to one prompt share its tokens but the last in every row that has some of them. No row has more for
    attention than CORE_TOKENS allows. Raises ValueError for an answer that fits in no row."""
    largest = max(answer.size for answer in answers)
    if largest > length + 1:
        raise ValueError(f"an answer and its prompt have {largest} tokens, and a row {length} + 1: raise data.seq_len")
    rows, places = OpenRows(length + 1), dict[int, AnswerPlace]()
    core: defaultdict[int, int] = defaultdict(int)  # tokens that attention gets, by row, without padding
    most = CORE_TOKENS * length
    for prompt, numbers in _by_prompt(answers).items():
        shared, starts = len(prompt) - 1, dict[int, int]()  # of this prompt, by row
        for number in numbers:
            own = 1 + len(answers[number].tokens)
            beside = [r for r in starts if rows.room[r] >= own and core[r] + shared + rows.room[r] <= most]
            if beside:
                row = min(beside, key=rows.room.__getitem__)
            else:
                row = rows.tightest(shared + own)
                if core[row] + shared + rows.room[row] > most:
                    row = rows.new()
                starts[row] = rows.take(row, shared).start
                core[row] += shared
            places[number] = AnswerPlace(row, rows.take(row, own).start, starts[row])
            core[row] += shared + own
    return Packing([places[number] for number in range(len(answers))], len(rows.room), length, answers)


def _by_prompt(answers: Sequence[Sample]) -> dict[tuple[int, ...], list[int]]:
    """The numbers of the answers to each prompt, the longest first."""
    found: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for number in sorted(range(len(answers)), key=lambda i: -answers[i].size):
        found[answers[number].prompt].append(number)
    return found


class Lines:
    """`count` rows of a packing from row `first` on. Rows past the last are empty."""

    def __init__(self, packing: Packing, first: int, count: int) -> None:
        self._packing, self._first, self._count = packing, first, count
        rows = range(first, min(first + count, packing.rows))
        self.numbers = [number for row in rows for number in packing.by_row[row]]
        self._targets = _spans([(self._at(i), len(packing.answers[i].tokens)) for i in self.numbers])

    def tokens(self, extra: int) -> tuple[Tensor, NDArray[np.int64], NDArray[np.int64]]:
        """Tokens, the number of each token's document, and where in its row the shared prompt of its document begins or
        ALONE: int64 [count, T + extra] each. A prompt without its last token is a document, and so is padding, which is
        zeros."""
        shape = self._count, self._packing.length + extra
        tokens, documents = torch.zeros(shape, dtype=torch.int64), np.zeros(shape, np.int64)
        shared = np.full(shape, ALONE)
        for number in self.numbers:
            answer, place = self._packing.answers[number], self._packing.places[number]
            row, before = place.row - self._first, len(answer.prompt) - 1
            own = slice(place.start, place.start + 1 + len(answer.tokens))
            tokens[row, own] = torch.cat((torch.tensor(answer.prompt[-1:]), answer.tokens))
            spans = [(own.start, own.stop)]
            if before:
                shared[row, own] = place.prompt
                tokens[row, place.prompt : place.prompt + before] = torch.tensor(answer.prompt[:-1])
                spans.append((place.prompt, place.prompt + before))
            for start, stop in spans:
                documents[row, start:stop] = 1 + start  # a number that no other has
        return tokens, documents, shared

    def column(self, value: Callable[[int], Tensor | float]) -> Tensor:
        """FP32 [N]: `value(i)`, [n] or one number, where answer i is predicted, and 0 elsewhere."""
        answers = self._packing.answers
        parts = [torch.as_tensor(value(i), dtype=torch.float32).expand(len(answers[i].tokens)) for i in self.numbers]
        return self._put(torch.zeros(self._count * self._packing.length), parts)

    def answer_numbers(self) -> Tensor:
        """int64 [N]: for each target position, the index of its answer among those of these rows; 0 elsewhere."""
        sizes = torch.tensor([len(self._packing.answers[i].tokens) for i in self.numbers], dtype=torch.int64)
        numbers = torch.arange(len(sizes)).repeat_interleave(sizes)
        return self._put(torch.zeros(self._count * self._packing.length, dtype=torch.int64), [numbers])

    def routes(self, layers: int, top_k: int) -> Tensor:
        """int16 [layers, N, K]: the experts of every token, NOWHERE for those without a recorded route."""
        out = torch.full((layers, self._count * self._packing.length, top_k), NOWHERE, dtype=torch.int16)
        spans, parts = list[tuple[int, int]](), list[Tensor]()
        for number in self.numbers:
            answer, place = self._packing.answers[number], self._packing.places[number]
            if answer.routes is not None:
                before = len(answer.prompt) - 1
                spans += [
                    (self._at(number) - place.start + place.prompt, before),
                    (self._at(number), len(answer.tokens)),
                ]
                parts += [answer.routes[:, :before], answer.routes[:, before:]]
        if parts:
            out[:, _spans(spans)] = torch.cat(parts, 1)
        return out

    def _at(self, number: int) -> int:
        """The position of an answer among the input tokens of all rows."""
        place = self._packing.places[number]
        return (place.row - self._first) * self._packing.length + place.start

    def _put(self, out: Tensor, parts: Sequence[Tensor]) -> Tensor:
        if parts:
            out[self._targets] = torch.cat(list(parts))
        return out


def _spans(spans: Sequence[tuple[int, int]]) -> Tensor:
    """int64: the numbers of all spans (start, length), end to end."""
    starts, lengths = torch.tensor(spans, dtype=torch.int64).view(-1, 2).unbind(1)
    begins = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (starts - begins).repeat_interleave(lengths)
