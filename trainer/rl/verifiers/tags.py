"""The parts of an answer: `<think>...</think><answer>...</answer>`, and fenced blocks of code."""

from __future__ import annotations

import re

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_SHAPE = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)


def parts(answer: str) -> tuple[str, str] | None:
    """Thoughts and answer, if each tag occurs exactly once, in this order, with nothing else around. A pattern alone
    would accept tags inside tags."""
    if any(answer.count(tag) != 1 for tag in TAGS):
        return None
    found = _SHAPE.fullmatch(answer)
    return (found[1], found[2]) if found else None


def final(answer: str) -> str | None:
    """What stands between <answer> and </answer>, stripped, if both occur exactly once. Several would let a policy
    list guesses."""
    before, opened, rest = answer.partition("<answer>")
    inner, closed, after = rest.partition("</answer>")
    if not opened or not closed or "<answer>" in rest or "</answer>" in before + after:
        return None
    return inner.strip()
