"""Countdown: reach a target with the given numbers, each used exactly once, and + - * /.

Record: `numbers`, a list of integers; `target`; `left_to_right` (default false): whether operations bind alike. Any
solution counts. The thoughts are not read.
"""

from __future__ import annotations

from collections.abc import Mapping

from dryvine.trainer.rl.verifiers.arithmetic import NotArithmetic, evaluate
from dryvine.trainer.rl.verifiers.tags import final
from dryvine.trainer.rl.verifiers.verdict import Verdict, number


def verify(answer: str, problem: Mapping[str, object]) -> Verdict:
    """1 or 0."""
    target, numbers, inner = number(problem, "target"), problem.get("numbers"), final(answer)
    if not isinstance(numbers, list) or not all(type(each) is int for each in numbers):
        raise ValueError(f"the problem's 'numbers' is {numbers!r}: a list of integers is needed")
    if inner is None:
        return Verdict(0.0, "not exactly one <answer>...</answer>")
    try:
        value, used = evaluate(inner, problem.get("left_to_right") is True)
    except NotArithmetic as error:
        return Verdict(0.0, str(error))
    if sorted(used) != sorted(numbers):
        return Verdict(0.0, f"used {used}, given {numbers}")
    return Verdict(float(value == target), f"{value}, wanted {target}")
