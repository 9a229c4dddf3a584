"""The soft penalty for overlong answers of DAPO (arXiv 2503.14476, equation 13): 0, or down to -1.

Record: `completion_tokens`, put there by the trainer; `max_tokens` and `overlong_buffer`, both in tokens. Give it a
weight in the reward; the loop's own `rl.overlong = "penalty"` is the same for all tasks.
"""

from __future__ import annotations

from collections.abc import Mapping

from dryvine.trainer.rl.verifiers.verdict import Verdict, number


def verify(answer: str, problem: Mapping[str, object]) -> Verdict:
    """Reads nothing of the answer but its length in the record."""
    length, most = number(problem, "completion_tokens"), number(problem, "max_tokens")
    buffer = number(problem, "overlong_buffer")
    if not 0 < buffer <= most:
        raise ValueError(f"the problem's 'overlong_buffer' is {buffer}: from 1 to max_tokens = {most}")
    return Verdict(soft_overlong(length, most, buffer), f"{length} tokens of {most}")


def soft_overlong(length: int, most: int, buffer: int) -> float:
    """0 up to most - buffer tokens, from there linearly to -1 at `most`, and -1 beyond."""
    return -min(1.0, max(0.0, (length - (most - buffer)) / buffer))
