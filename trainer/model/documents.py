"""Document boundaries of a microbatch, for attention within documents (`data.mask = "document"`).

Packed sequences hold parts of several documents. Pre-training may let attention cross boundaries (DeepSeek-V3, section
4.1); fine-tuning and RL may not. With a `Documents`, every document is computed as if it were alone: positions restart,
attention stays inside, and a target in the next document is not trained on. Everything is computed on the host once
for a microbatch: the kernel needs the longest document's length as a number, and reading it from the device would block
the host in every layer.

Legend: S sequences, T positions, N = S * T tokens, D documents (a part of one counts as one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dryvine.trainer.model.lesson import Lesson


@dataclass(frozen=True, eq=False)
class Documents:
    """The documents of a microbatch. `weights[k]` are the loss weights of the targets k + 1 tokens ahead, in a mean
    over N tokens; 0 for a target in another document."""

    positions: Tensor  # int64 [N], of each token in its document
    bounds: Tensor  # int32 [D + 1]: where each document begins among the N tokens, and N
    lengths: tuple[int, ...]  # of each document
    weights: tuple[Tensor, ...]  # FP32 [N] each
    lesson: Lesson | None = None  # an objective that replaces next-token prediction

    @property
    def longest(self) -> int:
        return max(self.lengths)


def same_document(numbers_ST: NDArray[np.int64], ahead: int, depths: int) -> NDArray[np.bool_]:
    """Whether each token's target `ahead` tokens ahead is in its document: bool [S, T]. `numbers_ST` are the document
    numbers of T + `depths` tokens, ascending along each sequence."""
    length = numbers_ST.shape[1] - depths
    same: NDArray[np.bool_] = numbers_ST[:, :length] == numbers_ST[:, ahead : ahead + length]
    return same


def documents_of(
    numbers_ST: NDArray[np.int64], weights: Sequence[NDArray[np.float32]], device: torch.device | str
) -> Documents:
    """Make the `Documents` of a microbatch. `weights`, [S, T] each, are for the next token and every depth of MTP;
    `numbers_ST`, the tokens' document numbers, has as many additional columns as there are weights."""
    numbers = numbers_ST[:, : numbers_ST.shape[1] - len(weights)]
    begins = np.ones(numbers.shape, bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=numbers.size)
    positions = np.arange(numbers.size) - np.repeat(starts, lengths)
    return Documents(
        torch.from_numpy(positions).to(device),
        torch.from_numpy(np.append(starts, numbers.size).astype(np.int32)).to(device),
        tuple(lengths.tolist()),
        tuple(torch.from_numpy(each.astype(np.float32).ravel()).to(device) for each in weights),
    )
