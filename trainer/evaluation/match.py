"""Whether the best answer is the expected one. A line: {"prompt": "Q: 2 + 2?\\nA:", "answer": "4"}; `answer` may be a
list of texts that are all right, `until` (by default a new line for text, nothing for messages) ends an answer, and
`max_tokens` bounds it.

Compared without white space around them and with single spaces within.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from dryvine.trainer.data.spec import OnProgress
from dryvine.trainer.evaluation.record import TaskLine
from dryvine.trainer.evaluation.subject import EvalQuestion, Findings, Subject, failures
from dryvine.trainer.evaluation.task import Task
from dryvine.trainer.intervals import share


class Match(NamedTuple):
    question: EvalQuestion
    right: tuple[str, ...]


def task(records: Sequence[TaskLine]) -> Task:
    """The task of these lines. Raises EvalError."""
    return partial(_findings, [_parsed(record) for record in records])


def _parsed(record: TaskLine) -> Match:
    prompt = record.prompt()
    until = record.texts("until") if "until" in record.fields else ("\n",) if isinstance(prompt, str) else ()
    right = tuple(_plain(text) for text in record.texts("answer"))
    return Match(EvalQuestion(prompt, until, record.count("max_tokens")), right)


def _findings(matches: Sequence[Match], subject: Subject, on_progress: OnProgress) -> Findings:
    questions = [match.question for match in matches]
    answers: list[dict[str, object]] = []
    right = []
    for match, completions in zip(matches, subject.answers(questions, 1, 0.0, on_progress), strict=True):
        text = subject.answer_text(match.question, completions[0])
        right.append(_plain(text) in match.right)
        answers.append({"text": text, "right": right[-1], "failed": failures(completions)})
    return Findings({"exact_match": share(right)}, answers)


def _plain(text: str) -> str:
    return " ".join(text.split())
