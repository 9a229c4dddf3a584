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
from dryvine.trainer.hand_off.forward import ForwardResult
from dryvine.trainer.hand_off.readers import LENGTH, OpenedExport
from dryvine.trainer.hand_off.tokenizer_files import TokenizerFiles

PROMPTS = 50


@dataclass(frozen=True)
class ReaderComparison:
    """One reader against our forward, over all prompts. Held are the positions at which the reader's arithmetic cannot
    choose other experts, nor could before in the prompt, which attention brings along: all of them for FP32."""

    reader: str
    limit: float
    same_tokens: bool  # whether it tokenizes the text as we do
    positions: int
    held: int  # positions whose routing the reader's arithmetic cannot change
    largest: float  # |difference| of log-probabilities
    largest_held: float
    usual: float  # 95th percentile over positions of a position's largest
    same_best: int  # positions with the same most likely token
    other_best: int  # positions with another, though our two best are further apart than the limit
    other_best_held: int

    @property
    def fine(self) -> bool:
        """Whether the reader agrees. Every held position must. Of all positions, one of twenty may exceed the limit: a
        real mistake shows at most positions, and a model whose gates are nowhere sure must not pass unchecked."""
        within = self.held == 0 or self.largest_held <= self.limit  # False for NaN
        few = self.usual <= self.limit and self.other_best <= self.positions * 0.05
        return self.same_tokens and within and self.other_best_held == 0 and few


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
    name: str, reader: OpenedExport, ours: Callable[[list[int]], ForwardResult], some: list[tuple[str, list[int]]]
) -> ReaderComparison:
    same_tokens = True
    found: list[Tensor] = []
    for text, tokens in some:
        same_tokens &= reader.tokens(text)[: len(tokens)] == tokens
        found.append(_by_position(ours(tokens), reader.log_probs(tokens), reader))
    differences, held, same, other = torch.cat(found, 1).unbind()
    worst, usual = (float(differences.quantile(share)) for share in (1.0, 0.95))  # NaN if one is
    return ReaderComparison(
        reader=name,
        limit=reader.limit,
        same_tokens=same_tokens,
        positions=len(held),
        held=int(held.sum()),
        largest=worst,
        largest_held=float((differences * held).max()),
        usual=usual,
        same_best=int(same.sum()),
        other_best=int(other.sum()),
        other_best_held=int((other * held).sum()),
    )


def _by_position(ours: ForwardResult, theirs: Tensor, reader: OpenedExport) -> Tensor:
    """FP32 [4, T]: the largest difference; 1 where it is held; 1 where the best token is the same; 1 where it is
    another, by more than the limit."""
    best, other = ours.log_probs.argmax(-1, keepdim=True), theirs.argmax(-1, keepdim=True)
    gap = (ours.log_probs.gather(1, best) - ours.log_probs.gather(1, other)).flatten()
    differs = (best != other).flatten()
    return torch.stack(
        (
            (ours.log_probs - theirs).abs().amax(-1),
            (ours.margins.cummin(0).values >= reader.near).float(),
            (~differs).float(),
            (differs & (gap > reader.limit)).float(),
        )
    )


def table(comparisons: list[ReaderComparison], title: str) -> Table:
    made = Table("reader", title=title)
    heads = (
        "positions",
        "same tokens",
        "max |dlogp|",
        "95%",
        "held",
        "max held",
        "limit",
        "same best",
        "other best",
        "",
    )
    for column in heads:
        made.add_column(column, justify="right")
    for c in comparisons:
        usual = (f"{c.largest:.1e}", f"{c.usual:.1e}")
        held = (f"{c.held:,}", f"{c.largest_held:.1e}", f"{c.limit:g}")
        best = (f"{c.same_best / c.positions:.1%}", str(c.other_best))
        tokens, verdict = ("yes" if c.same_tokens else "NO"), ("fine" if c.fine else "DIFFERS")
        made.add_row(c.reader, f"{c.positions:,}", tokens, *usual, *held, *best, verdict)
    return made
