"""One rollout, from questions to updates.

Sampling, scoring and learning take turns on the same ranks with the same weights, so no weights are copied between an
inference engine and a trainer, and the probabilities of an answer are those of the weights that the first update starts
from. A separate engine would sample beside the updates, and would need weights sent, converted and checked after each
of them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dryvine.trainer.checkpoint.state import COUNTS, RunState
from dryvine.trainer.generate.requests import Completion
from dryvine.trainer.generate.sampler import Sampler
from dryvine.trainer.rig import Rig
from dryvine.trainer.rl.alarms import AlarmMemory
from dryvine.trainer.rl.evaluate import Evaluation, evaluation
from dryvine.trainer.rl.groups import Group, sample_of, valued
from dryvine.trainer.rl.judge import Judge, Judged
from dryvine.trainer.rl.passes import Learnt, LessonPlan, learn, score
from dryvine.trainer.rl.questions import Ask, Curriculum
from dryvine.trainer.rl.reference import FIELD, Reference
from dryvine.trainer.rl.rows import Sample
from dryvine.trainer.rl.tasks.question import Question

OnAnswer = Callable[[int, int], None]  # answers that have ended, answers in all


@dataclass(frozen=True)
class RolloutOutcome:
    groups: Sequence[Group]  # that updates were made from
    left_out: int  # groups that taught nothing
    refills: int
    updates: Sequence[Learnt]
    advantages: Sequence[Sequence[float]]
    seconds: dict[str, float]  # of sampling, scoring, learning
    has_reference: bool


@dataclass
class Learner:
    """One rank's part of a run. All methods are collective."""

    rig: Rig
    task: Curriculum
    sampler: Sampler
    judge: Judge
    asked: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))  # questions, in the whole run
    reference: Reference | None = field(init=False)
    alarms: AlarmMemory = field(init=False)

    def __post_init__(self) -> None:
        self.reference = Reference(self.rig) if self.task.rl.loss.kl else None
        self.alarms = AlarmMemory(self.task.rl.alarms)

    def state(self) -> RunState:
        """The tensors that a checkpoint stores, live; the rest of the state follows from them and from the config."""
        state = self.rig.state()
        pieces = state.pieces
        if self.reference:
            held = self.reference.pieces()
            pieces = {place: {**fields, FIELD: held[place]} for place, fields in pieces.items()}
        counts = {f"{COUNTS}asked": self.asked, f"{COUNTS}alarms": self.alarms.state}
        return replace(state, pieces=pieces, buffers={**state.buffers, **counts})

    # -- sampling

    def answers(self, numbers: Sequence[int], ask: Ask, on_answer: OnAnswer) -> list[Group]:
        """Sample and score a group for each of these question numbers of the run."""
        return self._groups([(n, self.task.question(n)) for n in numbers], ask, "train", on_answer)

    def evaluate(self, on_answer: OnAnswer) -> Evaluation:
        """Evaluate the held-out questions."""
        rl, held_out = self.task.rl, list(enumerate(self.task.held_out))
        greedy = self._groups(held_out, Ask(1, 0.0), "greedy", on_answer)
        sampled = self._groups(held_out, Ask(rl.eval_samples, rl.temperature), "eval", on_answer)
        return evaluation(greedy, sampled)

    def _groups(
        self, asked: Sequence[tuple[int, Question]], ask: Ask, purpose: str, on_answer: OnAnswer
    ) -> list[Group]:
        requests = [[*self.task.requests(question, n, ask, purpose)] for n, question in asked]
        every = [request for group in requests for request in group]
        self.rig.optimizer.zero.settle()  # a sampler reads weights without the hooks that wait for new ones
        found: dict[tuple[int | None, int], Completion] = {}
        for completion in self.sampler.generate(every):
            found[completion.request.group, completion.request.seed] = completion
            on_answer(len(found), len(every))
        pairs = [
            (question, found[request.group, request.seed])
            for (_, question), group in zip(asked, requests, strict=True)
            for request in group
        ]
        judged = self.judge.judge(pairs)
        size = ask.samples
        return [Group(n, question, judged[i * size : (i + 1) * size]) for i, (n, question) in enumerate(asked)]

    # -- learning

    def rollout(self, step: int, on_answer: OnAnswer) -> RolloutOutcome:
        """Sample answers with the current weights, then make all updates from them; the first is update `step`.
        Collective."""
        rl, started = self.task.rl, time.perf_counter()
        groups, left_out, refills = self._ask(on_answer)
        sampled = time.perf_counter()
        lessons, values = self._lessons(groups)
        scored = time.perf_counter()
        updates = [
            learn(self.rig, part, rl.loss, self._plan, step + number)
            for number, part in enumerate(self._minibatches(lessons, step))
            if part  # nothing could be scored
        ]
        if self.reference and rl.reference_every and _crosses(step, rl.updates, rl.reference_every):
            self.reference.refresh()
        seconds = (sampled - started, scored - sampled, time.perf_counter() - scored)
        named = dict(zip(("sample", "score", "learn"), seconds, strict=True))
        return RolloutOutcome(groups, left_out, refills, updates, values, named, self.reference is not None)

    @property
    def _plan(self) -> LessonPlan:
        return LessonPlan(self.task.rl.temperature, replay=self.task.rl.replay != "off")

    def _ask(self, on_answer: OnAnswer) -> tuple[list[Group], int, int]:
        """The groups of a rollout, how many groups were dropped, and how often others were sampled in their place."""
        rl = self.task.rl
        wanted, ask = rl.questions * rl.minibatches, Ask(rl.samples, rl.temperature)
        kept: list[Group] = []
        idle: list[Group] = []
        for rounds in range(1, 2 + (rl.refills if rl.dynamic else 0)):  # noqa: B007
            first = int(self.asked)
            groups = self.answers(range(first, first + wanted - len(kept)), ask, on_answer)
            self.asked += len(groups)
            kept += [group for group in groups if group.teaches or not rl.dynamic]
            idle += [group for group in groups if rl.dynamic and not group.teaches]
            if len(kept) == wanted:
                break
        # If every group was dropped, the update still has its KL term.
        return kept or idle, len(idle), rounds - 1

    def _lessons(self, groups: Sequence[Group]) -> tuple[list[Sample], list[list[float]]]:
        """The answers that the updates use, with everything the loss needs, and the advantages of all answers."""
        rl = self.task.rl
        samples = [[sample_of(answer) for answer in group.answers] for group in groups]
        flat = self._scored([sample for group in samples for sample in group])
        size = rl.samples
        samples = [flat[i * size : (i + 1) * size] for i in range(len(groups))]
        penalties = [[self._penalty(sample) for sample in group] for group in samples]
        values = valued(groups, rl.loss.baseline, penalties)
        lessons = [
            replace(sample, advantage=value)
            for group, row, worth in zip(groups, samples, values, strict=True)
            for answer, sample, value in zip(group.answers, row, worth, strict=True)
            if self._counts(answer)
        ]
        return lessons, values

    def _counts(self, answer: Judged) -> bool:
        left_out = answer.overlong and self.task.rl.overlong == "mask"
        return answer.reward is not None and len(answer.completion.tokens) > 0 and not left_out

    def _scored(self, samples: list[Sample]) -> list[Sample]:
        """The samples with the log-probabilities that the loss needs, and with the trainer's own expert choices if
        those are replayed."""
        rl, own = self.task.rl, samples
        if rl.old == "trainer" or rl.replay == "trainer":
            plan = LessonPlan(rl.temperature, replay=rl.replay == "rollout", record=rl.replay == "trainer")
            own = score(self.rig, samples, plan)
            if rl.old == "rollout":
                own = [replace(sample, old=None) for sample in own]
        if self.reference:
            with self.reference.in_place():
                # The reference routes by its own gates: the policy's routes would make it another network.
                judged = score(self.rig, samples, LessonPlan(rl.temperature, replay=False))
            own = [replace(sample, reference=other.old) for sample, other in zip(own, judged, strict=True)]
        return own

    def _penalty(self, sample: Sample) -> float:
        """The divergence from the reference that is subtracted from the reward, if `kl_place` is "reward"."""
        loss = self.task.rl.loss
        if sample.reference is None or loss.kl_place == "loss":
            return 0.0
        return loss.kl * float((sample.sampled - sample.reference).sum())

    def _minibatches(self, lessons: list[Sample], step: int) -> Iterator[list[Sample]]:
        """Answers in random order, in `rl.minibatches` equal parts; shuffled anew in every epoch."""
        rl = self.task.rl
        for epoch in range(rl.epochs):
            order = list(range(len(lessons)))
            random.Random(f"{self.task.seed} {step} {epoch}").shuffle(order)
            for number in range(rl.minibatches):
                yield [lessons[i] for i in order[number :: rl.minibatches]]


def _crosses(step: int, updates: int, every: int) -> bool:
    """Whether a multiple of `every` lies among the `updates` steps after `step`."""
    return (step + updates) // every > step // every
