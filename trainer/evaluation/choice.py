"""Multiple choice: which of several texts the model finds most likely after a prompt.

A line: {"prompt": "The sky is", "choices": [" blue", " green"], "answer": 0}, or with the right choice itself as
`answer`. `accuracy` compares sums of log-probabilities; `accuracy_per_byte` divides them by the choice's bytes, since
otherwise short choices win. Spaces count where they are written: usually at the beginning of a choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import NamedTuple

from dryvine.trainer.data.spec import OnProgress
from dryvine.trainer.evaluation.record import EvalError, Prompt, TaskLine
from dryvine.trainer.evaluation.subject import Findings, Subject
from dryvine.trainer.evaluation.task import Task
from dryvine.trainer.generate.score import Passage
from dryvine.trainer.intervals import share


class Choice(NamedTuple):
    where: str
    prompt: Prompt
    choices: tuple[str, ...]
    answer: int  # of equal texts the first


def task(records: Sequence[TaskLine]) -> Task:
    """The task of these lines. Raises EvalError."""
    return partial(_findings, [_parsed(record) for record in records])


def _parsed(record: TaskLine) -> Choice:
    choices, answer = record.texts("choices"), record.fields.get("answer")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise EvalError(f"{record.where}: answer is {answer!r}: the number of a choice from 0, or its text, is needed")
    return Choice(record.where, record.prompt(), choices, choices.index(choices[answer]))


def _findings(questions: Sequence[Choice], subject: Subject, on_progress: OnProgress) -> Findings:
    passages = [[_passage(question, text, subject) for text in question.choices] for question in questions]
    scores = subject.score([one for some in passages for one in some], on_progress)
    right, right_per_byte = list[bool](), list[bool]()
    answers: list[dict[str, object]] = []
    for question in questions:
        sums = [float(score.logprobs.sum()) for score in islice(scores, len(question.choices))]
        per_byte = [one / len(text.encode()) for one, text in zip(sums, question.choices, strict=True)]
        chosen = _best(question, sums)
        right.append(chosen == question.answer)
        right_per_byte.append(_best(question, per_byte) == question.answer)
        answers.append({"chosen": chosen, "answer": question.answer, "logprobs": sums, "right": right[-1]})
    return Findings({"accuracy": share(right), "accuracy_per_byte": share(right_per_byte)}, answers)


def _best(question: Choice, values: Sequence[float]) -> int:
    """The choice with the largest value. Of equal texts, whose values can differ in rounding, the first."""
    return question.choices.index(question.choices[values.index(max(values))])


def _passage(question: Choice, text: str, subject: Subject) -> Passage:
    passage = subject.choice(question.prompt, text)
    if len(passage.tokens) - 1 > subject.context:
        raise EvalError(
            f"{question.where}: {len(passage.tokens)} tokens, and {subject.context} are read at once: shorten the "
            "prompt, or raise --context if the model has more positions"
        )
    return passage
