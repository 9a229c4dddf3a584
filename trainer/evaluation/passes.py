"""Whether one of k sampled answers is right, by a verifier of `dryvine rl`. A line:
{"prompt": "...", "verifier": "math", "answer": "4"}: the whole object is the problem that the verifier reads.

pass@k for k = 1, 4, 16 ... and the number of samples, without bias; beside them `greedy`, the share of best answers
that are right, and `unscored`, of sampled answers that the verifier could not judge (they count as wrong).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

from dryvine.trainer.data.spec import OnProgress
from dryvine.trainer.evaluation.record import EvalError, TaskLine
from dryvine.trainer.evaluation.subject import EvalQuestion, Findings, Subject, failures
from dryvine.trainer.evaluation.task import Task
from dryvine.trainer.generate.requests import Completion
from dryvine.trainer.intervals import pass_at_k, share
from dryvine.trainer.rl.verifiers.names import VERIFIERS
from dryvine.trainer.rl.verifiers.pool import Pool, VerifierError
from dryvine.trainer.rl.verifiers.verdict import Job, Verdict


class Judgeable(NamedTuple):
    question: EvalQuestion
    verifier: str
    record: Mapping[str, object]


def task(records: Sequence[TaskLine]) -> Task:
    """The task of these lines. Raises EvalError."""
    problems = [_parsed(record) for record in records]
    _check_verifiers(problems)
    return partial(_findings, problems)


def _parsed(record: TaskLine) -> Judgeable:
    verifier = record.text("verifier")
    if verifier not in VERIFIERS:
        raise EvalError(f"{record.where}: no verifier {verifier!r}; there are {', '.join(sorted(VERIFIERS))}")
    until = record.texts("until") if "until" in record.fields else ()
    return Judgeable(EvalQuestion(record.prompt(), until, record.count("max_tokens")), verifier, record.fields)


def _check_verifiers(problems: Sequence[Judgeable]) -> None:
    try:
        Pool({problem.verifier for problem in problems}, workers=1).close()
    except VerifierError as error:
        raise EvalError(str(error)) from None


def _findings(problems: Sequence[Judgeable], subject: Subject, on_progress: OnProgress) -> Findings:
    questions, samples = [problem.question for problem in problems], subject.asking.samples
    greedy = subject.answers(questions, 1, 0.0, on_progress)
    sampled = subject.answers(questions, samples, subject.asking.temperature, on_progress)
    answers = [[*one, *some] for one, some in zip(greedy, sampled, strict=True)]
    verdicts = _verdicts(problems, answers, subject)
    counts = [sum(verdict.right for verdict in some[1:]) for some in verdicts]
    figures = {"greedy": share([some[0].right for some in verdicts])}
    figures |= {f"pass@{k}": pass_at_k(counts, samples, k) for k in _ks(samples)}
    unscored = [verdict.score is None for some in verdicts for verdict in some[1:]]
    rows = [_row(p, some, said, subject) for p, some, said in zip(problems, answers, verdicts, strict=True)]
    return Findings(figures | {"unscored": share(unscored)}, rows, _note(verdicts))


def _note(verdicts: Sequence[Sequence[Verdict]]) -> str:
    """Unscored answers count as wrong: a field that a problem lacks must not look like a model that solves nothing."""
    every = [verdict for some in verdicts for verdict in some]
    why = [verdict.why for verdict in every if verdict.score is None]
    return f"{len(why)} of {len(every)} answers could not be scored, the first: {why[0]}" if why else ""


def _verdicts(
    problems: Sequence[Judgeable], answers: Sequence[Sequence[Completion]], subject: Subject
) -> list[list[Verdict]]:
    jobs = [
        Job(
            problem.verifier,
            subject.answer_text(problem.question, one),
            {**problem.record, "completion_tokens": len(one.tokens)},
        )
        for problem, some in zip(problems, answers, strict=True)
        for one in some
    ]
    with Pool({problem.verifier for problem in problems}) as pool:
        found = iter(pool.score(jobs))
    return [[next(found) for _ in some] for some in answers]


def _row(
    problem: Judgeable, answers: Sequence[Completion], verdicts: Sequence[Verdict], subject: Subject
) -> dict[str, object]:
    """The row of a problem: its greedy answer first, then the sampled ones."""
    return {
        "texts": [subject.answer_text(problem.question, one) for one in answers],
        "scores": [verdict.score for verdict in verdicts],
        "why": [verdict.why for verdict in verdicts],
        "right": statistics.fmean(verdict.right for verdict in verdicts[1:]),
        "failed": failures(answers),
    }


def _ks(samples: int) -> list[int]:
    return sorted({samples, *(4**i for i in range(samples.bit_length()) if 4**i <= samples)})
