"""The tokens of one step on their way through a rank's layers: which they are, where they are cached, and what they may
attend to. Computed once for all layers.

A decoding step feeds one token, or one and its drafts, to each slot in use; a prefill feeds many to some of them.
Linears see the tokens end to end; only attention pads them to sequences of equal length, so that padding costs nothing
elsewhere.

Legend: N tokens, S sequences, T most tokens of one, P cached positions, R rope dimension, A heads, D depths of MTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dryvine.trainer.generate.sampling import Ways
from dryvine.trainer.model.rope import Rope
from dryvine.trainer.model.spec import Spec


class Stretch(NamedTuple):
    """Neighbouring tokens of one sequence, the first at position `start`."""

    slot: int
    start: int
    tokens: Sequence[int]
    after: tuple[int, ...] = ()  # what follows them, for MTP: one token for each depth


class LaneStep(NamedTuple):
    """What a lane feeds in a step: of each slot in use the newest token and drafts of those after it, the position of
    the former, and how to sample."""

    tokens: NDArray[np.int64]  # [S, T]
    positions: NDArray[np.int64]  # [S]
    ways: Ways

    def places(self) -> NDArray[np.uint64]:
        """Where the token after each of them stands in its sequence: [S x T]."""
        return (self.positions.reshape(-1, 1) + np.arange(1, 1 + self.tokens.shape[1])).astype(np.uint64).reshape(-1)


class Feed(NamedTuple):
    tokens: Tensor  # int64 [N]
    slots: Tensor  # int64 [N], of each token
    positions: Tensor  # int64 [N]
    cos: Tensor  # FP32 [N, R]: what the members of a pair are multiplied by at the token's position
    sin: Tensor  # FP32 [N, R]: and the other member of the pair, with its sign
    length: int  # P: cached positions that are looked at
    mask: Tensor  # FP32 [S, T, P], of steps with drafts [S, T x A, P]: 0 for what a token may see, else -inf
    sequences: Tensor | None  # int64 [S]: their slots; None: T tokens of each of the first S slots
    place: Tensor | None  # int64 [N]: of each token among S x T; None with `sequences`
    following: Tensor  # int64 [D, N]: the token 1, 2 ... places on; D is 0 except for prompts that MTP reads
    drafts: int  # T - 1 in a step: tokens of each slot that are guesses


def step_feed(step: LaneStep, spec: Spec, device: torch.device) -> Feed:
    """The tokens of each of the first slots."""
    grid = step.positions.reshape(-1, 1) + np.arange(step.tokens.shape[1])
    ids_ST, at_ST = (torch.from_numpy(part).to(device) for part in (step.tokens, grid))
    return grid_feed(ids_ST, at_ST, int(grid.max(initial=-1)) + 1, spec)


def grid_feed(ids_ST: Tensor, at_ST: Tensor, length: int, spec: Spec) -> Feed:
    """Tokens of each of the first slots and their positions, below `length`; by operators on their device alone."""
    many, mask, at = ids_ST.shape[1], _mask(at_ST, length), at_ST.flatten()
    slots = torch.arange(len(ids_ST), device=at.device)
    if many > 1:
        mask, slots = mask.repeat_interleave(spec.shape.heads, 1), slots.repeat_interleave(many)
    ids, (cos, sin) = ids_ST.flatten(), rotations(spec.rope, at, length)
    return Feed(ids, slots, at, cos, sin, length, mask, None, None, ids.new_empty(0), many - 1)


def prefill_feed(pieces: Sequence[Stretch], depths: int, rope: Rope, device: torch.device) -> Feed:
    """Tokens of several sequences at once; MTP of so many depths reads them too."""
    sizes = [len(piece.tokens) for piece in pieces]
    most = max(sizes, default=0)
    at = np.zeros((len(pieces), most), np.int64)
    for row, piece in zip(at, pieces, strict=True):
        row[: len(piece.tokens)] = np.arange(piece.start, piece.start + len(piece.tokens))
    inside = np.arange(most) < np.array(sizes, np.int64).reshape(-1, 1)
    own = np.array([piece.slot for piece in pieces], np.int64)
    tokens = np.array([_ahead(pieces, depth) for depth in range(1 + depths)], np.int64)
    packed = (tokens, np.repeat(own, sizes), at[inside], own, np.flatnonzero(inside), at)
    ids, slots, positions, sequences, place, grid = (torch.from_numpy(part).to(device) for part in packed)
    length = int(at.max(initial=-1)) + 1
    mask, (cos, sin) = _mask(grid, length), rotations(rope, positions, length)
    return Feed(ids[0], slots, positions, cos, sin, length, mask, sequences, place, ids[1:], 0)


def _ahead(pieces: Sequence[Stretch], depth: int) -> list[int]:
    """The token `depth` places on from each, end to end."""
    whole = ((*piece.tokens, *piece.after[:depth]) for piece in pieces)
    return [token for tokens in whole for token in tokens[depth:]]


def rotations(rope: Rope, positions_N: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """`cos` and `sin` of a feed; positions are below `length`."""
    table_T2R = rope.by_member(1 << max(0, length - 1).bit_length(), positions_N.device)
    cos_NR, sin_NR = functional.embedding(positions_N, table_T2R.flatten(1)).chunk(2, 1)
    return cos_NR, sin_NR


def _mask(positions_ST: Tensor, length: int) -> Tensor:
    hidden_STP = torch.arange(length, device=positions_ST.device) > positions_ST.unsqueeze(-1)
    return torch.zeros(hidden_STP.shape, device=hidden_STP.device).masked_fill_(hidden_STP, float("-inf"))
