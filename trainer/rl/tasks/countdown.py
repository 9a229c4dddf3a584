"""Countdown-3: three numbers from 1 on, a target of 0 to 99, + - * / with exact division, each number used once.

Small enough that a model of a million parameters learns it on a CPU, and with a property that makes it an experiment:
a verifier knows right from wrong where an imitator does not. Operations bind alike, left to right, so an answer needs
no brackets. Every solvable pair of numbers and target is a question; a tenth of them, by a hash that knows nothing of
seeds, is held out, whatever the order that the numbers are shown in.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from functools import cache

from pydantic import BaseModel, Field

from dryvine.trainer.rl.tasks.question import Question, SplitOfTask, user

LARGEST_NUMBER, LARGEST_TARGET = 15, 99
OPERATIONS = "+-*/"
Numbers = tuple[int, int, int]  # ascending
Solutions = dict[int, list[str]]  # by target: expressions, evaluated left to right


class CountdownOptions(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """The keys of `[rl.task]` beside `name`."""

    largest: int = Field(default=LARGEST_NUMBER, ge=3, le=99, description="number of a puzzle")
    format_weight: float = Field(default=0.0, ge=0, description="of the format's score in the reward; 0: only measured")


OPTIONS = CountdownOptions


def questions(options: CountdownOptions, split: SplitOfTask) -> Sequence[Question]:
    """All questions of a split, shuffled. Every order of the numbers is a question: "7 5 9 26", the target last."""
    weights = {"countdown": 1.0, "format": options.format_weight}
    found = [
        Question(user(shown(order, target)), {"numbers": list(order), "target": target, "left_to_right": True}, weights)
        for numbers, target in puzzles(split, options.largest)
        for order in sorted(set(itertools.permutations(numbers)))
    ]
    return sorted(found, key=lambda question: _digest(question.messages[0]["content"]))


def shown(numbers: Sequence[int], target: int) -> str:
    """A puzzle as the model reads it."""
    return " ".join(map(str, (*numbers, target)))


def puzzles(split: SplitOfTask, largest: int = LARGEST_NUMBER) -> Iterator[tuple[Numbers, int]]:
    """Numbers and target of every solvable puzzle of a split."""
    for numbers, solutions in every_solution(largest).items():
        yield from ((numbers, target) for target in sorted(solutions) if _split(numbers, target) == split)


@cache
def every_solution(largest: int = LARGEST_NUMBER) -> dict[Numbers, Solutions]:
    """For every three numbers, the reachable targets and the expressions that reach them."""
    triples = itertools.combinations_with_replacement(range(1, largest + 1), 3)
    return {numbers: _solutions(numbers) for numbers in triples}


def _solutions(numbers: Numbers) -> Solutions:
    found: Solutions = {}
    for first, second, third in sorted(set(itertools.permutations(numbers))):
        for sign, next_sign in itertools.product(OPERATIONS, repeat=2):
            half = applied(first, sign, second)
            value = None if half is None else applied(half, next_sign, third)
            if value is not None and 0 <= value <= LARGEST_TARGET:
                found.setdefault(value, []).append(f"{first}{sign}{second}{next_sign}{third}")
    return found


def applied(left: int, sign: str, right: int) -> int | None:
    """`left sign right`; None if that is not an integer."""
    match sign:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
    return None if left % right else left // right


def _split(numbers: Numbers, target: int) -> SplitOfTask:
    return "validation" if int.from_bytes(_digest(shown(numbers, target))[:8], "big") % 10 == 0 else "train"


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
