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
from typing import NamedTuple, cast

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

    @cached_property
    def lengths(self) -> Tensor:
        """int64 [A]: tokens of each answer."""
        return torch.tensor([len(answer.tokens) for answer in self.answers])

    @cached_property
    def before(self) -> Tensor:
        """int64 [A]: tokens of its prompt but the last."""
        return torch.tensor([len(answer.prompt) - 1 for answer in self.answers])

    @cached_property
    def at(self) -> Tensor:
        """int64 [A, 3]: the numbers of each `AnswerPlace`."""
        return torch.tensor(self.places)

    def end_to_end(self, parts: Callable[[Sample], Tensor], axis: int = 0) -> Tensor:
        """A part of each answer, one behind the other."""
        return torch.cat([parts(answer) for answer in self.answers], axis)

    @cached_property
    def tokens(self) -> Tensor:
        """int64: those of all answers, end to end."""
        return self.end_to_end(lambda answer: answer.tokens)

    @cached_property
    def routes(self) -> Tensor | None:
        """int16 [MoE layers, .., K]: of all answers end to end, each with its prompt; None if none has any, which is
        the same for all."""
        if self.answers[0].routes is None:
            return None
        return self.end_to_end(lambda answer: cast(Tensor, answer.routes), 1)


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


class PackedRows:
    """`count` rows of a packing from row `first` on. Rows past the last are empty.

    An update has thousands of answers, and Python for each of them took longer than a GPU takes to learn from all. So
    what fills rows are copies of whole columns: what is end to end in `Packing` goes where the rows have it.
    """

    def __init__(self, packing: Packing, first: int, count: int) -> None:
        self._packing, self._first, self._count = packing, first, count
        rows = range(first, min(first + count, packing.rows))
        self._numbers = torch.tensor([i for row in rows for i in packing.by_row[row]], dtype=torch.int64)
        self._lengths = packing.lengths[self._numbers]
        self._row, self._start, self._prompt = (packing.at[self._numbers] - torch.tensor([first, 0, 0])).unbind(1)

    def tokens(self, extra: int) -> tuple[Tensor, NDArray[np.int64], NDArray[np.int64]]:
        """Tokens, the number of each token's document, and where in its row the shared prompt of its document begins or
        ALONE: int64 [count, T + extra] each. A prompt without its last token is a document, and so is padding, which is
        zeros."""
        shape = self._count, self._packing.length + extra
        tokens, documents, shared = (torch.full(shape, fill) for fill in (0, 0, ALONE))
        at, answers = self._row * shape[1] + self._start, self._packing.answers
        own = _spans(at, self._lengths + 1)
        tokens.view(-1)[at] = torch.tensor([answers[i].prompt[-1] for i in self._numbers.tolist()], dtype=torch.int64)
        tokens.view(-1)[_spans(at + 1, self._lengths)] = self._packing.tokens[self._picked(self._packing.lengths)]
        # A document's number is one that no other of its row has.
        documents.view(-1)[own] = (1 + self._start).repeat_interleave(self._lengths + 1)
        begins = torch.where(self._packing.before[self._numbers] > 0, self._prompt, ALONE)
        shared.view(-1)[own] = begins.repeat_interleave(self._lengths + 1)
        for one in self._first_behind_each_prompt().tolist():
            row, start, prompt = (
                int(self._row[one]),
                int(self._prompt[one]),
                answers[int(self._numbers[one])].prompt[:-1],
            )
            tokens[row, start : start + len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
            documents[row, start : start + len(prompt)] = 1 + start
        return tokens, documents.numpy(), shared.numpy()

    def of_tokens(self, values: Tensor) -> Tensor:
        """[N] from a number for each token of all answers, end to end; 0 where none is predicted."""
        return self._put(values[self._picked(self._packing.lengths)])

    def of_answers(self, values: Tensor) -> Tensor:
        """[N] from a number for each answer, likewise."""
        return self._put(values[self._numbers].repeat_interleave(self._lengths))

    def answer_numbers(self) -> Tensor:
        """int64 [N]: for each target position, the index of its answer among those of these rows; 0 elsewhere."""
        return self._put(torch.arange(len(self._numbers)).repeat_interleave(self._lengths))

    def routes(self, layers: int, top_k: int) -> Tensor:
        """int16 [layers, N, K]: the experts of every token, NOWHERE for those without a recorded route."""
        out = torch.full((layers, self._count * self._packing.length, top_k), NOWHERE, dtype=torch.int16)
        if self._packing.routes is not None and len(self._numbers):
            # A prompt's are those of its first answer here.
            some, row = self._first_behind_each_prompt(), self._row * self._packing.length
            sizes = self._packing.lengths + self._packing.before
            begins, before = (sizes.cumsum(0) - sizes)[self._numbers], self._packing.before[self._numbers]
            into = (row + self._prompt)[some], row + self._start
            out_of = begins[some], begins + before
            lengths = before[some], self._lengths
            places, picked = (_spans(torch.cat(at), torch.cat(lengths)) for at in (into, out_of))
            out[:, places] = self._packing.routes[:, picked]
        return out

    def _first_behind_each_prompt(self) -> Tensor:
        """Of the answers that share a prompt here, the first: indices into `_numbers`."""
        keys = self._row * (self._packing.length + 1) + self._prompt
        shared = torch.nonzero(self._packing.before[self._numbers] > 0).squeeze(1)
        _, first = np.unique(keys[shared].numpy(), return_index=True)
        return shared[torch.from_numpy(first)]

    def _picked(self, lengths: Tensor) -> Tensor:
        """Where the tokens of these answers are among those of all, end to end."""
        return _spans((lengths.cumsum(0) - lengths)[self._numbers], self._lengths)

    def _put(self, values: Tensor) -> Tensor:
        out = torch.zeros(self._count * self._packing.length, dtype=values.dtype)
        out[_spans(self._row * self._packing.length + self._start, self._lengths)] = values
        return out


def _spans(starts: Tensor, lengths: Tensor) -> Tensor:
    """int64: the numbers of all spans, end to end."""
    ends = lengths.cumsum(0)
    return torch.arange(int(lengths.sum())) + (starts - ends + lengths).repeat_interleave(lengths)
