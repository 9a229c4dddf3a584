"""Whether an answer is `<think>...</think><answer>...</answer>` with each tag exactly once and both parts not empty.

R1's format reward. A regular expression with `.*?`, as is usual, also accepts nested and repeated tags, and a policy
finds that out.
"""

from __future__ import annotations

from collections.abc import Mapping

from dryvine.trainer.rl.verifiers.tags import TAGS, parts
from dryvine.trainer.rl.verifiers.verdict import Verdict


def verify(answer: str, problem: Mapping[str, object]) -> Verdict:
    """1 or 0. Reads nothing of the problem."""
    found = parts(answer)
    if found is None:
        counts = ", ".join(f"{answer.count(tag)} x {tag}" for tag in TAGS)
        return Verdict(0.0, f"not <think>...</think><answer>...</answer> and nothing else: {counts}")
    return Verdict(1.0) if all(part.strip() for part in found) else Verdict(0.0, "a part is empty")
