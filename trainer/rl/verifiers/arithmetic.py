"""Integer arithmetic from text, by recursive descent, with every size bounded. Never eval.

A policy is an adversary: `eval`, or a parser of a language (sympy's is eval too), turns an answer into a program; a
regular expression that lets digits and operators through still lets `9**9**9**9` through, which no machine finishes.
Here the grammar has four operations, exact division only, and no number above LARGEST:

    sum = product (("+" | "-") product)*      product = factor (("*" | "/") factor)*
    factor = "-" factor | "(" sum ")" | digits
"""

from __future__ import annotations

from dataclasses import dataclass, field

LONGEST = 1000  # characters of an expression
DEEPEST = 50  # brackets and signs inside one another
LARGEST = 10**18  # of any number on the way
DIGITS = "0123456789"  # str.isdigit also knows superscripts and other scripts


class NotArithmetic(ValueError):
    """Where the text stops being an expression of the grammar, or which bound it breaks."""


@dataclass
class _Reader:
    text: str
    left_to_right: bool
    at: int = 0
    numbers: list[int] = field(default_factory=list)


def evaluate(text: str, left_to_right: bool = False) -> tuple[int, list[int]]:
    """The value of an expression, and the numbers written in it in order. `left_to_right`: all four operations bind
    alike, as on a pocket calculator, so that 7+5*9 is 108. Raises NotArithmetic."""
    if len(text) > LONGEST:
        raise NotArithmetic(f"longer than {LONGEST} characters")
    reader = _Reader("".join(text.split()), left_to_right)
    value = _sum(reader, 0)
    if reader.at < len(reader.text):
        raise NotArithmetic(f"{reader.text[reader.at :][:20]!r} cannot follow {reader.text[: reader.at][-20:]!r}")
    return value, reader.numbers


def _sum(reader: _Reader, depth: int) -> int:
    read, signs = (_factor, "+-*/") if reader.left_to_right else (_product, "+-")
    value = read(reader, depth)
    while sign := _take(reader, signs):
        value = _apply(value, sign, read(reader, depth))
    return value


def _product(reader: _Reader, depth: int) -> int:
    value = _factor(reader, depth)
    while sign := _take(reader, "*/"):
        value = _apply(value, sign, _factor(reader, depth))
    return value


def _factor(reader: _Reader, depth: int) -> int:
    if depth > DEEPEST:
        raise NotArithmetic(f"nested deeper than {DEEPEST}")
    if _take(reader, "-"):
        return -_factor(reader, depth + 1)
    if not _take(reader, "("):
        return _digits(reader)
    value = _sum(reader, depth + 1)
    if not _take(reader, ")"):
        raise NotArithmetic("a bracket is not closed")
    return value


def _digits(reader: _Reader) -> int:
    start = reader.at
    while _take(reader, DIGITS):
        pass
    if start == reader.at:
        raise NotArithmetic(f"a number is missing before {reader.text[start:][:20]!r}")
    if reader.at - start > len(str(LARGEST)):
        raise NotArithmetic(f"a number of {reader.at - start} digits")
    reader.numbers.append(_bounded(int(reader.text[start : reader.at])))
    return reader.numbers[-1]


def _take(reader: _Reader, which: str) -> str:
    """Consume the next character if it is one of `which`, and return it."""
    found = reader.text[reader.at : reader.at + 1]
    if not found or found not in which:
        return ""
    reader.at += 1
    return found


def _apply(left: int, sign: str, right: int) -> int:
    match sign:
        case "+":
            return _bounded(left + right)
        case "-":
            return _bounded(left - right)
        case "*":
            return _bounded(left * right)
    if right == 0 or left % right:
        raise NotArithmetic(f"{left} / {right} is no integer")
    return left // right


def _bounded(value: int) -> int:
    if abs(value) > LARGEST:
        raise NotArithmetic(f"a number above {LARGEST:.0e}")
    return value
