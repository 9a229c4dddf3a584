"""Compares log-probabilities of the same text between the program that will serve an export and our own forward.

A wrong name, shape or gating key mostly loads without an error and only makes text worse. So every position and every
token of the vocabulary is compared, not sampled text.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.readers import FP32, LENGTH, OpenedExport
from dryvine.trainer.hand_off.tokenizer_files import TokenizerFiles

PROMPTS = 50


@dataclass(frozen=True)
class ReaderComparison:
    """One reader against our forward, over all prompts."""

    reader: str
    limit: float
    positions: int
    same_tokens: bool  # whether it tokenizes the text as we do
    largest: float  # |difference| of log-probabilities
    usual: float  # 95th percentile over positions of a position's largest
    same_best: int  # positions with the same most likely token
    excused: int  # positions with another, where our two best are closer than the limit

    @property
    def fine(self) -> bool:
        """Whether the reader agrees. In FP32 every position must. With fewer bits a token is sometimes routed to
        another expert of nearly equal score, and what follows differs by more than rounding, so there one position
        of twenty may exceed the limit; a real mistake shows at most positions."""
        exact = self.limit <= FP32
        agreed = self.same_best + self.excused
        within = (self.largest if exact else self.usual) <= self.limit  # False for NaN
        return self.same_tokens and within and agreed >= self.positions * (1 if exact else 0.95)


def prompts(tokenizer: TokenizerFiles, text: Path | None, max_position: int) -> list[tuple[str, list[int]]]:
    """Pieces of the text, tokenized. Raises HandOffError if the text is too short."""
    whole = (text or Path(textwrap.__file__)).read_text()
    size = max(1, len(whole) // PROMPTS)
    parts = (whole[i * size : (i + 1) * size] for i in range(PROMPTS))
    found = []
    for part in parts:
        ids = tokenizer.vocabulary.tokenizer.encode(part, add_special_tokens=False).ids
        if ids:
            found.append((part, ids[: min(LENGTH, max_position)]))
    if len(found) < PROMPTS:
        raise HandOffError(f"{text}: too little text for {PROMPTS} prompts")
    return found


def compare(
    name: str, reader: OpenedExport, ours: Callable[[list[int]], Tensor], some: list[tuple[str, list[int]]]
) -> ReaderComparison:
    positions = same = excused = 0
    largest: list[Tensor] = []
    same_tokens = True
    for text, tokens in some:
        a, b = ours(tokens), reader.log_probs(tokens)
        same_tokens &= reader.tokens(text)[: len(tokens)] == tokens
        largest.append((a - b).abs().amax(-1))
        best, theirs = a.argmax(-1, keepdim=True), b.argmax(-1, keepdim=True)
        gap = (a.gather(1, best) - a.gather(1, theirs)).flatten()
        positions += len(tokens)
        same += int((best == theirs).sum())
        excused += int(((best != theirs).flatten() & (gap <= reader.limit)).sum())
    every = torch.cat(largest)
    worst, usual = (float(every.quantile(share)) for share in (1.0, 0.95))  # NaN if one is
    return ReaderComparison(name, reader.limit, positions, same_tokens, worst, usual, same, excused)


def table(comparisons: list[ReaderComparison], title: str) -> Table:
    made = Table("reader", title=title)
    for column in ("positions", "same tokens", "max |dlogp|", "95%", "limit", "same best", "ties", ""):
        made.add_column(column, justify="right")
    for c in comparisons:
        numbers = (f"{c.largest:.1e}", f"{c.usual:.1e}", f"{c.limit:g}", f"{c.same_best / c.positions:.1%}")
        tokens, verdict = ("yes" if c.same_tokens else "NO"), ("fine" if c.fine else "DIFFERS")
        row = (c.reader, f"{c.positions:,}", tokens, *numbers, str(c.excused), verdict)
        made.add_row(*row)
    return made
