"""The answers to one question, and what they teach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dryvine.trainer.rl.choices import Baseline
from dryvine.trainer.rl.judge import Judged
from dryvine.trainer.rl.losses import advantages
from dryvine.trainer.rl.rows import Sample
from dryvine.trainer.rl.tasks.question import Question


@dataclass(frozen=True)
class Group:
    """`number`: of its question in the run."""

    number: int
    question: Question
    answers: Sequence[Judged]

    @property
    def teaches(self) -> bool:
        """Whether its scored answers differ in reward."""
        return len({answer.reward for answer in self.answers if answer.reward is not None}) > 1


def valued(groups: Sequence[Group], baseline: Baseline, penalties: Sequence[Sequence[float]]) -> list[list[float]]:
    """The advantage of every answer, of rewards less penalties; 0 for one that could not be scored."""
    width = max(len(group.answers) for group in groups)
    rewards = torch.full((len(groups), width), math.nan, dtype=torch.float64)
    for row, group, minus in zip(rewards, groups, penalties, strict=True):
        for column, (answer, penalty) in enumerate(zip(group.answers, minus, strict=True)):
            if answer.reward is not None:
                row[column] = answer.reward - penalty
    found = advantages(rewards, baseline).tolist()
    return [row[: len(group.answers)] for row, group in zip(found, groups, strict=True)]


def sample_of(answer: Judged) -> Sample:
    """What an update reads of an answer."""
    completion = answer.completion
    return Sample(completion.request.prompt, completion.tokens, completion.logprobs, completion.routes)
