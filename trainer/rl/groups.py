"""A group: the answers to one question, and their advantages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dryvine.trainer.rl.choices import Baseline
from dryvine.trainer.rl.grader import GradedAnswer
from dryvine.trainer.rl.losses import advantages
from dryvine.trainer.rl.rows import Sample
from dryvine.trainer.rl.tasks.question import Question


@dataclass(frozen=True)
class Group:
    """`number`: which question of the run they answer."""

    number: int
    question: Question
    answers: Sequence[GradedAnswer]

    @property
    def teaches(self) -> bool:
        """Whether its scored answers differ in reward: if not, all advantages are 0."""
        return len({answer.reward for answer in self.answers if answer.reward is not None}) > 1


def group_advantages(
    groups: Sequence[Group], baseline: Baseline, penalties: Sequence[Sequence[float]]
) -> list[list[float]]:
    """The advantage of every answer, from rewards less penalties; 0 for an answer that could not be scored."""
    width = max(len(group.answers) for group in groups)
    rewards = torch.full((len(groups), width), math.nan, dtype=torch.float64)
    for row, group, minus in zip(rewards, groups, penalties, strict=True):
        for column, (answer, penalty) in enumerate(zip(group.answers, minus, strict=True)):
            if answer.reward is not None:
                row[column] = answer.reward - penalty
    found = advantages(rewards, baseline).tolist()
    return [row[: len(group.answers)] for row, group in zip(found, groups, strict=True)]


def scores_by_verifier(groups: Sequence[Group]) -> dict[str, list[float | None]]:
    """By the name of each verifier, its scores of the answers that it was asked about."""
    found: dict[str, list[float | None]] = {}
    for group in groups:
        for answer in group.answers:
            for name, verdict in answer.verdicts.items():
                found.setdefault(name, []).append(verdict.score)
    return found


def sample_of(answer: GradedAnswer) -> Sample:
    """The part of an answer that an update uses."""
    completion = answer.completion
    return Sample(completion.request.prompt, completion.tokens, completion.logprobs, completion.routes)
