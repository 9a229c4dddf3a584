"""How well texts are predicted. A line: {"text": "..."}.

A text longer than the model's positions is read in windows that overlap by half, and every token is scored once, behind
half a window at least. Bits per byte compare models of different tokenizers; losses and perplexities do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice

from dryvine.trainer.data.spec import OnProgress
from dryvine.trainer.evaluation.record import TaskLine
from dryvine.trainer.evaluation.subject import Findings, Subject
from dryvine.trainer.evaluation.task import Task
from dryvine.trainer.generate.score import Passage
from dryvine.trainer.intervals import Figure, ratio


def task(records: Sequence[TaskLine]) -> Task:
    """The task of these lines. Raises EvalError."""
    return partial(_findings, [record.text("text") for record in records])


def _findings(texts: Sequence[str], subject: Subject, on_progress: OnProgress) -> Findings:
    passages = [list(windows(subject.document(text), subject.context)) for text in texts]
    scores = subject.score([one for some in passages for one in some], on_progress)
    losses, tokens, sizes = [], [], [len(text.encode()) for text in texts]
    for some in passages:
        logprobs = [score.logprobs for score in islice(scores, len(some))]
        losses.append(-sum(float(part.sum()) for part in logprobs))
        tokens.append(sum(len(part) for part in logprobs))
    loss, bits = ratio(losses, tokens), ratio([one / math.log(2) for one in losses], sizes)
    perplexity = Figure(*(math.exp(value) for value in loss))
    answers: list[dict[str, object]] = [
        {"loss": one / count, "tokens": count, "bytes": size}
        for one, count, size in zip(losses, tokens, sizes, strict=True)
    ]
    return Findings({"loss": loss, "perplexity": perplexity, "bits_per_byte": bits}, answers)


def windows(tokens: Sequence[int], context: int) -> Iterator[Passage]:
    """Passages in which every token but the first is scored once. `context`: the most tokens that are fed."""
    done = 1
    while done < len(tokens):
        end = min(len(tokens), context + 1 if done == 1 else done + context - context // 2)
        start = max(0, end - context - 1)
        yield Passage(tuple(tokens[start:end]), done - start)
        done = end
