"""Questions to graded answers, for rollouts and evaluations.

It reads weights and changes none. So the same class serves the rank that trains, with its live weights, and the thread
that samples ahead of it, with a copy of them (`ahead.py`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dryvine.trainer.generate.lane import Until
from dryvine.trainer.generate.requests import Completion, Request
from dryvine.trainer.generate.sampler import Sampler
from dryvine.trainer.rl.evaluate import Evaluation, evaluation
from dryvine.trainer.rl.grader import Grader
from dryvine.trainer.rl.groups import Group
from dryvine.trainer.rl.questions import RLTask, SamplingOptions
from dryvine.trainer.rl.tasks.question import Question
from dryvine.trainer.rl.verifiers.stops import stops_of

OnAnswer = Callable[[int, int], None]  # answers that have ended, answers in all


@dataclass(frozen=True)
class Answers:
    """The answers of a rollout."""

    groups: Sequence[Group]  # that updates are made from
    left_out: int  # groups that teach nothing
    refills: int
    asked: int  # questions, those that were left out too
    seconds: float


@dataclass
class RolloutWorker:
    """Samples and grades. `settle` is called before weights are read. Methods are collective over the grader's mesh."""

    task: RLTask
    sampler: Sampler
    grader: Grader
    settle: Callable[[], None]

    def rollout(self, first: int, on_answer: OnAnswer) -> Answers:
        """The answers to questions from `first` on. With `rl.dynamic`, groups of equal rewards are dropped and
        others sampled in their place, up to `rl.refills` times."""
        rl, started = self.task.rl, time.perf_counter()
        wanted, ask, asked = rl.questions * rl.minibatches, SamplingOptions(rl.samples, rl.temperature), 0
        kept: list[Group] = []
        idle: list[Group] = []
        for rounds in range(1, 2 + (rl.refills if rl.dynamic else 0)):  # noqa: B007
            numbers = range(first + asked, first + asked + wanted - len(kept))
            groups = self.answers(numbers, ask, on_answer)
            asked += len(groups)
            kept += [group for group in groups if group.teaches or not rl.dynamic]
            idle += [group for group in groups if rl.dynamic and not group.teaches]
            if len(kept) == wanted:
                break
        # If every group was dropped, the update still has its KL term.
        return Answers(kept or idle, len(idle), rounds - 1, asked, time.perf_counter() - started)

    def answers(self, numbers: Sequence[int], ask: SamplingOptions, on_answer: OnAnswer) -> list[Group]:
        """Sample and grade a group for each of these question numbers of the run."""
        return self._groups([(n, self.task.question(n)) for n in numbers], ask, "train", on_answer)

    def evaluate(self, on_answer: OnAnswer) -> Evaluation:
        """Evaluate the held-out questions."""
        rl, held_out = self.task.rl, list(enumerate(self.task.held_out))
        greedy = self._groups(held_out, SamplingOptions(1, 0.0), "greedy", on_answer)
        sampled = self._groups(held_out, SamplingOptions(rl.eval_samples, rl.temperature), "eval", on_answer)
        return evaluation(greedy, sampled)

    def _groups(
        self, asked: Sequence[tuple[int, Question]], ask: SamplingOptions, purpose: str, on_answer: OnAnswer
    ) -> list[Group]:
        requests = [[*self.task.requests(question, n, ask, purpose)] for n, question in asked]
        every = [request for group in requests for request in group]
        self.settle()
        grading, questions, ended = self.grader.begin(), dict(asked), deque[Completion]()

        def grade() -> None:
            while ended:
                completion = ended.popleft()
                assert completion.request.group is not None
                grading.add(questions[completion.request.group], completion)

        for number, completion in enumerate(self.sampler.generate(every, self._until(questions), grade), 1):
            ended.append(completion)
            on_answer(number, len(every))
        grade()
        found = {_name(answer.completion.request): answer for answer in grading.graded()}
        return [
            Group(n, question, [found[_name(request)] for request in group])
            for (n, question), group in zip(asked, requests, strict=True)
        ]

    def _until(self, asked: Mapping[int, Question]) -> Until | None:
        """A callback that tells whether a verifier of the question considers an answer finished; questions are found
        by the group's number."""
        stops = stops_of(self.task.verifiers)
        if not stops:
            return None

        def until(request: Request, tokens: list[int]) -> bool:
            assert request.group is not None
            question, text = asked[request.group], self.task.chat.text(tokens)
            return any(stops[name](text, question.record) for name in question.weights if name in stops)

        return until


def _name(request: Request) -> tuple[int | None, int]:
    """Which answer of a rollout it asks for."""
    return request.group, request.seed
