"""Whether the answer is the problem's integer: `<answer>12*(3+4)</answer>` for 84. Record: `answer`, an integer."""

from __future__ import annotations

from collections.abc import Mapping

from dryvine.trainer.rl.verifiers.arithmetic import NotArithmetic, evaluate
from dryvine.trainer.rl.verifiers.tags import final
from dryvine.trainer.rl.verifiers.verdict import Verdict, number


def verify(answer: str, problem: Mapping[str, object]) -> Verdict:
    """1 or 0. An expression counts as its value."""
    gold, inner = number(problem, "answer"), final(answer)
    if inner is None:
        return Verdict(0.0, "not exactly one <answer>...</answer>")
    try:
        value, _ = evaluate(inner)
    except NotArithmetic as error:
        return Verdict(0.0, str(error))
    return Verdict(float(value == gold), f"{value}, wanted {gold}")
