"""The tokens of one step on their way through a rank's layers: which they are, where they are cached, and what they may
attend to. Computed once for all layers.

A decoding step feeds one token to each slot in use; a prefill feeds many to some of them. Linears see the tokens end to
end; only attention pads them to sequences of equal length, so that padding costs nothing elsewhere.

Legend: N tokens, S sequences, T most tokens of one, P cached positions, R rope dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dryvine.trainer.model.rope import Rope


class Stretch(NamedTuple):
    """Neighbouring tokens of one sequence, the first at position `start`."""

    slot: int
    start: int
    tokens: Sequence[int]


class Feed(NamedTuple):
    tokens: Tensor  # int64 [N]
    slots: Tensor  # int64 [N], of each token
    positions: Tensor  # int64 [N]
    turn: Tensor  # complex [N, 1, R / 2]: what a pair at the token's position is multiplied by
    length: int  # P: cached positions that are looked at
    mask: Tensor  # FP32 [S, 1, T, P]: 0 for what a token may see, else -inf
    sequences: Tensor | None  # int64 [S]: their slots; None: a token of each of the first S slots
    place: Tensor | None  # int64 [N]: of each token among S x T; None with `sequences`


def step_feed(tokens: np.ndarray, positions: np.ndarray, rope: Rope, device: torch.device) -> Feed:
    """One token for each of the first slots; int64 [S] both."""
    at = torch.from_numpy(positions).to(device)
    slots = torch.arange(len(tokens), device=device)
    length = int(positions.max(initial=-1)) + 1
    mask = _mask(at.view(-1, 1), length)
    return Feed(torch.from_numpy(tokens).to(device), slots, at, rotations(rope, at), length, mask, None, None)


def prefill_feed(pieces: Sequence[Stretch], rope: Rope, device: torch.device) -> Feed:
    """Tokens of several sequences at once."""
    sizes = [len(piece.tokens) for piece in pieces]
    most = max(sizes, default=0)
    at = np.zeros((len(pieces), most), np.int64)
    for row, piece in zip(at, pieces, strict=True):
        row[: len(piece.tokens)] = np.arange(piece.start, piece.start + len(piece.tokens))
    inside = np.arange(most) < np.array(sizes, np.int64).reshape(-1, 1)
    own = np.array([piece.slot for piece in pieces], np.int64)
    tokens = np.array([token for piece in pieces for token in piece.tokens], np.int64)
    packed = (tokens, np.repeat(own, sizes), at[inside], own, np.flatnonzero(inside), at)
    ids, slots, positions, sequences, place, grid = (torch.from_numpy(part).to(device) for part in packed)
    length = int(at.max(initial=-1)) + 1
    return Feed(ids, slots, positions, rotations(rope, positions), length, _mask(grid, length), sequences, place)


def rotations(rope: Rope, positions_N: Tensor) -> Tensor:
    """Complex [N, 1, R / 2]."""
    longest = 1 << int(positions_N.max() if len(positions_N) else 0).bit_length()
    cos, sin = rope.table(longest, positions_N.device)
    return torch.complex(cos[positions_N], sin[positions_N])


def _mask(positions_ST: Tensor, length: int) -> Tensor:
    seen_STP = torch.arange(length, device=positions_ST.device) <= positions_ST.unsqueeze(-1)
    return torch.zeros(seen_STP.shape, device=seen_STP.device).masked_fill_(~seen_STP, float("-inf")).unsqueeze(1)
