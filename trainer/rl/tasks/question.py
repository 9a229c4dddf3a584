"""A problem to sample answers for: the messages, the verifiers' record, and the weights of its reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

SplitOfTask = Literal["train", "validation"]


class TaskError(ValueError):
    """Options or files of a task that cannot be used: what, where, and the fix, in one line."""


@dataclass(frozen=True)
class Question:
    """`messages` as in chat files, ending before the answer. `record` goes to every verifier. `weights` says how much
    each verifier's score counts in the reward, 0 for those that are only measured; the first one decides whether an
    answer is right, for pass@k."""

    messages: tuple[Mapping[str, str], ...]
    record: Mapping[str, object]
    weights: Mapping[str, float]

    @property
    def deciding(self) -> str:
        """The verifier that decides whether an answer is right."""
        return next(iter(self.weights))


def user(text: str) -> tuple[Mapping[str, str], ...]:
    """Messages of one turn."""
    return ({"role": "user", "content": text},)
