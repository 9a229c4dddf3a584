"""The kinds of tasks, told apart by a field of their lines. One of your own is a file with `task(records)` and a line
here, before the kinds whose fields its lines also have."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dryvine.trainer.evaluation import choice, match, passes, perplexity
from dryvine.trainer.evaluation.record import EvalError, TaskLine
from dryvine.trainer.evaluation.task import Task

KINDS: dict[str, Callable[[Sequence[TaskLine]], Task]] = {
    "text": perplexity.task,
    "choices": choice.task,
    "verifier": passes.task,
    "answer": match.task,
}


def task_of(records: Sequence[TaskLine]) -> Task:
    """The task of a file, whose lines must all be of one kind. Raises EvalError."""
    mark = _mark(records[0])
    for record in records:
        if (other := _mark(record)) != mark:
            raise EvalError(f"{record.where}: has {other!r}, and the lines before have {mark!r}: one kind in a file")
    return KINDS[mark](records)


def _mark(record: TaskLine) -> str:
    for mark in KINDS:
        if mark in record.fields:
            return mark
    raise EvalError(f"{record.where}: none of the fields {', '.join(KINDS)}, which tell what is to be measured")
