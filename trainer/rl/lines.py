"""JSON Lines files that a person wrote or collected: conversations, questions.

A file is used as a whole or refused: training silently on part of a hand-made file would be worse than an error. Crawls
are read by `trainer/data/readers`, which leave bad lines out and list them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from dryvine.trainer.data.config import DataError

T = TypeVar("T")

_SHOWN = 5  # bad lines whose reason is in the message


class BadLine(ValueError):
    """A line that cannot be used; says why."""


def read_lines(path: Path, take: Callable[[object], T], what: str) -> list[T]:
    """The results of `take` on the JSON value of each line, in order; blank lines are ignored. `what` names the
    lines in messages, in the plural. Raises DataError with the numbers of all lines that are not JSON or for which
    `take` raised BadLine, and the first reasons; also for a file without lines."""
    found, bad = list[T](), list[tuple[int, str]]()
    for number, line in _numbered(path, what):
        try:
            found.append(take(_value(line)))
        except BadLine as error:
            bad.append((number, str(error)))
    if bad:
        raise DataError(_complaint(path, bad))
    if not found:
        raise DataError(f"{path}: has no {what}; write one on each line")
    return found


def _numbered(path: Path, what: str) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; name a .jsonl file of {what}") from None


def _value(line: bytes) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadLine(f"no JSON: {error}") from None


def _complaint(path: Path, bad: list[tuple[int, str]]) -> str:
    """All bad lines in one line of text."""
    reasons = "; ".join(f"line {number}: {why}" for number, why in bad[:_SHOWN])
    more = f"; and lines {', '.join(str(number) for number, _ in bad[_SHOWN:])}" if bad[_SHOWN:] else ""
    return f"{path}: {len(bad)} bad line{'s' * (len(bad) > 1)}, fix or drop them: {reasons}{more}"
