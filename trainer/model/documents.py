"""Document boundaries of a microbatch, for attention within documents (`data.mask = "document"`).

Packed sequences hold parts of several documents. Pre-training may let attention cross boundaries (DeepSeek-V3, section
4.1); fine-tuning and RL may not. With a `Documents`, every document is computed as if it were alone: positions restart,
attention stays inside, and a target in the next document is not trained on. Everything is computed on the host once
for a microbatch: the kernel needs the longest document's length as a number, and reading it from the device would block
the host in every layer. A CUDA graph contains that number and all lengths, so its documents are filled up to more and
longer ones (`Documents.filled`, for `parallel.stage.Carried`): with empty documents, which the kernel skips.

Documents may share their beginning, as answers to one question do: its tokens are there once, so all products of the
model compute them once, and only the attention core gets them with every document (`Cells`).

Legend: S sequences, T positions, N = S * T tokens, D documents (a part of one counts as one), P places of the core.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dryvine.comm.integers import power_of_two, round_up
from dryvine.trainer.model.lesson import Lesson

ALONE = -1  # of a document that shares no beginning
_STEP = 16  # documents whose lengths round up to the same multiple are one call of the core on a CPU
_FEWEST, _SHORTEST = 16, 128  # documents, and tokens of the longest, that a graph has room for at least
_PARTS = 8  # of N: in such steps a graph's places grow
_PIECE = 16  # places that are no token's are summed in pieces of so many


@dataclass(frozen=True, eq=False)
class Cells:
    """Which token is in each place of the attention core. All int64."""

    tokens: Tensor  # [P]; a place that only fills up repeats a token of its document
    place: Tensor  # [N], the place whose output is a token's
    copies: Tensor  # the places of tokens, not those that fill up, in the order of the tokens
    first: Tensor  # [N + 1 or more], where the places of each token begin in `copies`; then where those of none do

    @staticmethod
    def of(tokens_P: NDArray[np.int64], fills_P: NDArray[np.bool_], device: torch.device) -> Cells:
        """`fills_P`: which places only fill up."""
        places = np.flatnonzero(~fills_P)
        copies = places[np.argsort(tokens_P[places], kind="stable")]
        first = np.append(0, np.cumsum(np.bincount(tokens_P[places])))
        return Cells(*(torch.from_numpy(part).to(device) for part in (tokens_P, copies[first[:-1]], copies, first)))

    def filled(self, places: int) -> Cells:
        """With more places, behind all documents, which are no token's: in short pieces, since a GPU adds up each piece
        one by one."""
        tokens, copies = (functional.pad(t, (0, places - len(t))) for t in (self.tokens, self.copies))
        pieces = torch.arange(_PIECE, places + _PIECE, _PIECE, device=self.first.device)
        first = torch.cat((self.first, (self.first[-1:] + pieces).clamp(max=places)))
        return Cells(tokens, self.place, copies, first)

    def tensors(self) -> list[Tensor]:
        return [self.tokens, self.place, self.copies, self.first]


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a microbatch. `weights[k]` are the loss weights of the targets k + 1 tokens ahead, in a mean
    over N tokens; 0 for a target in another document."""

    positions: Tensor  # int64 [N], of each token in its document
    bounds: Tensor  # int32 [D + 1]: where each document begins among the tokens of all, and their number
    lengths: tuple[int, ...]  # of each document; unknown, and empty, in a graph
    weights: tuple[Tensor, ...]  # FP32 [N] each
    longest: int  # length, or more
    row: int  # T, which no document is longer than
    lesson: Lesson | None = None  # an objective that replaces next-token prediction
    order: NDArray[np.int64] | None = None  # the tokens of all documents, end to end; None: 0 to N - 1
    cells: Cells | None = None  # a graph's `packed`

    @cached_property
    def packed(self) -> Cells | None:
        """Documents end to end; None if tokens are already."""
        if self.order is None:
            return self.cells
        return Cells.of(self.order, np.zeros(len(self.order), bool), self.positions.device)

    @cached_property
    def in_grids(self) -> tuple[Cells, list[tuple[int, int]]]:
        """Documents of about the same length as the rows of a grid, filled up to the longest; and the grids' sizes."""
        lengths = np.array(self.lengths)
        starts = np.cumsum(lengths) - lengths
        classes = np.array([round_up(length, _STEP) for length in self.lengths])
        tokens, fills, sizes = list[NDArray[np.int64]](), list[NDArray[np.bool_]](), list[tuple[int, int]]()
        for size in np.unique(classes):
            own = np.flatnonzero(classes == size)
            at, own_lengths = np.arange(lengths[own].max()), lengths[own, None]
            tokens.append((starts[own, None] + np.minimum(at, own_lengths - 1)).ravel())
            fills.append((at >= own_lengths).ravel())
            sizes.append((len(own), len(at)))
        numbers = np.concatenate(tokens)
        order = numbers if self.order is None else self.order[numbers]
        return Cells.of(order, np.concatenate(fills), self.positions.device), sizes

    # -- for graphs

    @property
    def kind(self) -> Hashable:
        return len(self.weights), self.packed is None, self.lesson and self.lesson.kind

    def sizes(self) -> tuple[int, int, int]:
        """Documents, places of the core, and the longest document."""
        tokens = len(self.positions)
        places = round_up(sum(self.lengths), max(1, tokens // _PARTS)) if self.packed else tokens
        return max(_FEWEST, power_of_two(len(self.lengths))), places, max(_SHORTEST, power_of_two(self.longest))

    def filled(self, sizes: tuple[int, ...]) -> Documents:
        documents, places, longest = sizes
        bounds = functional.pad(self.bounds, (0, documents - len(self.lengths)), value=sum(self.lengths))
        cells = self.packed and self.packed.filled(places)
        return replace(self, bounds=bounds, lengths=(), longest=longest, order=None, cells=cells)

    def copied(self) -> Documents:
        cells = self.cells and Cells(*(t.clone() for t in self.cells.tensors()))
        weights = tuple(each.clone() for each in self.weights)
        lesson = self.lesson and self.lesson.copied()
        same = self.positions.clone(), self.bounds.clone()
        return replace(self, positions=same[0], bounds=same[1], weights=weights, lesson=lesson, cells=cells)

    def tensors(self) -> list[Tensor]:
        cells = self.packed.tensors() if self.packed else []
        lesson = self.lesson.tensors() if self.lesson else []
        return [self.positions, self.bounds, *self.weights, *cells, *lesson]


def same_document(numbers_ST: NDArray[np.int64], ahead: int, depths: int) -> NDArray[np.bool_]:
    """Whether each token's target `ahead` tokens ahead is in its document: bool [S, T]. `numbers_ST` are the document
    numbers of T + `depths` tokens, ascending along each sequence."""
    length = numbers_ST.shape[1] - depths
    same: NDArray[np.bool_] = numbers_ST[:, :length] == numbers_ST[:, ahead : ahead + length]
    return same


def documents_of(
    numbers_ST: NDArray[np.int64],
    weights: Sequence[NDArray[np.float32]],
    device: torch.device | str,
    shared_ST: NDArray[np.int64] | None = None,
) -> Documents:
    """Make the `Documents` of a microbatch. `weights`, [S, T] each, are for the next token and every depth of MTP;
    `numbers_ST`, the tokens' document numbers, has as many additional columns as there are weights. `shared_ST`, of the
    same shape: where in its row the document begins that a token's document goes on from, or ALONE."""
    numbers = numbers_ST[:, : numbers_ST.shape[1] - len(weights)]
    begins = np.ones(numbers.shape, bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=numbers.size)
    positions = np.arange(numbers.size) - np.repeat(starts, lengths)
    order = None
    if shared_ST is not None:
        before = _before(starts, shared_ST[:, : numbers.shape[1]])
        shared = np.where(before == ALONE, 0, lengths[before])
        positions += np.repeat(shared, lengths)
        order = _order(starts, lengths, before)
        lengths = lengths + shared
    return Documents(
        torch.from_numpy(positions).to(device),
        torch.from_numpy(np.append(0, np.cumsum(lengths)).astype(np.int32)).to(device),
        tuple(lengths.tolist()),
        tuple(torch.from_numpy(each.astype(np.float32).ravel()).to(device) for each in weights),
        int(lengths.max()),
        numbers.shape[1],
        order=order,
    )


def _before(starts: NDArray[np.int64], shared_ST: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each document, which one it goes on from, or ALONE."""
    at = shared_ST.ravel()[starts]
    places = starts // shared_ST.shape[1] * shared_ST.shape[1] + at
    return np.where(at == ALONE, ALONE, np.searchsorted(starts, places))


def _order(starts: NDArray[np.int64], lengths: NDArray[np.int64], before: NDArray[np.int64]) -> NDArray[np.int64]:
    """The tokens of documents behind their shared beginnings, end to end."""
    own = [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    whole = [(own[i], part) if i != ALONE else (part,) for i, part in zip(before, own, strict=True)]
    return np.concatenate([part for parts in whole for part in parts])
