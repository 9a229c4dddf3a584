"""Rewards: rank 0 scores answers with verifiers in processes of their own, and broadcasts the rewards.

If every rank scored by itself, a deadline missed on one rank only would give it another reward, and the ranks would
silently update to different weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field
from types import TracebackType
from typing import cast

from dryvine.comm.mesh import Mesh
from dryvine.trainer.generate.requests import Completion
from dryvine.trainer.rl.chat import Chat
from dryvine.trainer.rl.config import RLConfig
from dryvine.trainer.rl.tasks.question import Question
from dryvine.trainer.rl.verifiers.length import soft_overlong
from dryvine.trainer.rl.verifiers.pool import Marking, Pool
from dryvine.trainer.rl.verifiers.verdict import Job, Verdict, weighted


@dataclass(frozen=True)
class GradedAnswer:
    """An answer, its text, and its verdicts; `reward` is None if one of the verifiers could not score it."""

    completion: Completion
    text: str
    verdicts: dict[str, Verdict]
    reward: float | None
    correct: bool

    @property
    def overlong(self) -> bool:
        """Whether it ran out of tokens."""
        return self.completion.reason == "length"


@dataclass
class Grader:
    """Scores answers. Raises VerifierError on rank 0 if a verifier cannot be loaded. Use it as a context manager."""

    rl: RLConfig
    chat: Chat
    mesh: Mesh
    names: Iterable[str]  # of verifiers
    _pool: Pool | None = field(init=False)

    def __post_init__(self) -> None:
        self._pool = Pool(self.names) if self.mesh.rank == 0 else None

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._pool:
            self._pool.close()

    def over(self, mesh: Mesh) -> Grader:
        """The same verifiers, whose verdicts are told through the groups of another mesh; close this one only. Rank 0
        asks the two of them in turn."""
        other = copy(self)
        other.mesh = mesh
        return other

    def begin(self) -> Grading:
        """Grade answers that are still to come. One at a time."""
        return Grading(self, Marking(self._pool) if self._pool else None)

    def jobs(self, question: Question, completion: Completion, text: str) -> list[Job]:
        """One for each of the question's verifiers."""
        bounds = {"max_tokens": self.rl.max_tokens, "overlong_buffer": self.rl.overlong_buffer}
        problem = {**bounds, **question.record, "completion_tokens": len(completion.tokens)}
        return [Job(name, text, problem) for name in question.weights]

    def rewarded(
        self, question: Question, completion: Completion, text: str, verdicts: dict[str, Verdict]
    ) -> GradedAnswer:
        answered = completion.reason not in ("failed", "cancelled")
        reward = weighted(question.weights, verdicts) if answered else None
        if reward is not None and self.rl.overlong == "penalty":
            reward += soft_overlong(len(completion.tokens), self.rl.max_tokens, self.rl.overlong_buffer)
        return GradedAnswer(completion, text, verdicts, reward, verdicts[question.deciding].right)


class Grading:
    """Answers that verifiers score while others are still sampled. Verdicts depend on the answer alone, so when it came
    changes nothing."""

    def __init__(self, grader: Grader, marking: Marking | None) -> None:
        self._grader, self._marking = grader, marking
        self._asked: list[tuple[Question, Completion, str]] = []

    def add(self, question: Question, completion: Completion) -> None:
        """The next answer: on all ranks the same."""
        text = self._grader.chat.text(completion.tokens.tolist())
        self._asked.append((question, completion, text))
        if self._marking:
            for job in self._grader.jobs(question, completion, text):
                self._marking.add(job)

    def graded(self) -> list[GradedAnswer]:
        """All of them, in the order in which they were added, on every rank. Collective."""
        own = self._verdicts(self._marking) if self._marking else None
        verdicts = cast(list[dict[str, Verdict]], self._grader.mesh.gather(own, "verdicts")[0])
        return [self._grader.rewarded(*asked, found) for asked, found in zip(self._asked, verdicts, strict=True)]

    def _verdicts(self, marking: Marking) -> list[dict[str, Verdict]]:
        scored = iter(marking.verdicts())
        return [{name: next(scored) for name in question.weights} for question, *_ in self._asked]
