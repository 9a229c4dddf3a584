"""One rollout, from questions to updates.

Sampling, scoring and learning take turns on the same ranks with the same weights, so no weights are copied between an
inference engine and a trainer, and the probabilities of an answer are those of the weights that the first update starts
from. A separate engine would sample beside the updates, and would need weights sent, converted and checked after each
of them. With `rl.ahead` the next rollout is sampled meanwhile, with the weights from before (`ahead.py`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dryvine.trainer.checkpoint.state import COUNTS, RunState
from dryvine.trainer.rig import Rig
from dryvine.trainer.rl.ahead import FIELD as AHEAD
from dryvine.trainer.rl.ahead import Ahead
from dryvine.trainer.rl.alarms import AlarmMemory
from dryvine.trainer.rl.grader import GradedAnswer
from dryvine.trainer.rl.groups import Group, group_advantages, sample_of
from dryvine.trainer.rl.losses import divergence
from dryvine.trainer.rl.passes import PassOptions, UpdateResult, learn, score
from dryvine.trainer.rl.questions import RLTask
from dryvine.trainer.rl.reference import FIELD as REFERENCE
from dryvine.trainer.rl.reference import Reference
from dryvine.trainer.rl.rollout_worker import Answers, OnAnswer, RolloutWorker
from dryvine.trainer.rl.rows import Sample
from dryvine.trainer.saves import crosses


@dataclass(frozen=True)
class RolloutOutcome:
    answers: Answers
    updates: Sequence[UpdateResult]
    advantages: Sequence[Sequence[float]]  # by group and answer
    parts: dict[str, float]  # seconds of sampling, scoring, learning
    seconds: float  # of all; less than their sum where they overlap
    has_reference: bool


@dataclass
class Learner:
    """One rank's part of a run. All methods are collective."""

    rig: Rig
    worker: RolloutWorker
    ahead: Ahead | None = None  # None: sampling and learning take turns
    asked: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))  # questions, in the whole run
    reference: Reference | None = field(init=False)
    alarms: AlarmMemory = field(init=False)

    def __post_init__(self) -> None:
        self.reference = Reference(self.rig) if self.task.rl.loss.kl else None
        self.alarms = AlarmMemory(self.task.rl.alarms)

    @property
    def task(self) -> RLTask:
        return self.worker.task

    def state(self) -> RunState:
        """The tensors that a checkpoint stores, live; the rest of the state follows from them and from the config."""
        state = self.rig.state()
        pieces = state.pieces
        for name, weights in self._other_weights().items():
            held = weights.pieces()
            pieces = {place: {**fields, name: held[place]} for place, fields in pieces.items()}
        counts = {f"{COUNTS}asked": self.asked, f"{COUNTS}alarms": self.alarms.state}
        return replace(state, pieces=pieces, buffers={**state.buffers, **counts})

    def begin(self) -> None:
        """Of a new run, whose first weights are now known: they are those of before as well."""
        for weights in self._other_weights().values():
            weights.refresh()

    def _other_weights(self) -> dict[str, Reference]:
        """By the field of a checkpoint."""
        reference = {REFERENCE: self.reference} if self.reference else {}
        return {**reference, **({AHEAD: self.ahead.behind} if self.ahead else {})}

    # -- learning

    def rollout(self, step: int, on_answer: OnAnswer) -> RolloutOutcome:
        """Sample answers with the current weights, then make all updates from them; the first is update `step`.
        Collective."""
        rl, started = self.task.rl, time.perf_counter()
        answers = self._answers(step, on_answer)
        sampled = time.perf_counter()
        lessons, values = self._lessons(answers.groups)
        scored = time.perf_counter()
        updates = [
            learn(self.rig, part, rl.loss, self._plan, step + number)
            for number, part in enumerate(self._minibatches(lessons, step))
            if part  # nothing could be scored
        ]
        if self.reference and rl.reference_every and crosses(step, step + rl.updates, rl.reference_every):
            self.reference.refresh()
        learnt = time.perf_counter()
        if self.ahead:
            self.ahead.wait()
        named = {"sample": answers.seconds, "score": scored - sampled, "learn": learnt - scored}
        return RolloutOutcome(
            answers, updates, values, named, time.perf_counter() - started, self.reference is not None
        )

    def _answers(self, step: int, on_answer: OnAnswer) -> Answers:
        """To the next questions. If they are made ahead, those of the next rollout are begun."""
        if self.ahead is None:
            answers = self.worker.rollout(int(self.asked), on_answer)
        else:
            answers = self.ahead.take(int(self.asked), on_answer)
        self.asked += answers.asked
        if self.ahead:
            self.ahead.behind.refresh()
            if step + self.task.rl.updates < self.rig.config.run.steps:
                self.ahead.begin(int(self.asked), on_answer)
        return answers

    @property
    def _plan(self) -> PassOptions:
        return PassOptions(self.task.rl.temperature, replay=self.task.rl.replay != "off")

    def _lessons(self, groups: Sequence[Group]) -> tuple[list[Sample], list[list[float]]]:
        """The answers that the updates use, with everything the loss needs, and the advantages of all answers."""
        rewarded = [answer for group in groups for answer in group.answers if answer.reward is not None]
        known = iter(self._with_logprobs([sample_of(answer) for answer in rewarded]))
        samples = [[None if answer.reward is None else next(known) for answer in group.answers] for group in groups]
        penalties = [[self._penalty(sample) if sample else 0.0 for sample in row] for row in samples]
        values = group_advantages(groups, self.task.rl.loss.baseline, penalties)
        lessons = [
            replace(sample, advantage=value)
            for group, row, worth in zip(groups, samples, values, strict=True)
            for answer, sample, value in zip(group.answers, row, worth, strict=True)
            if sample and not self._masked(answer)
        ]
        return lessons, values

    def _masked(self, answer: GradedAnswer) -> bool:
        return answer.overlong and self.task.rl.overlong == "mask"

    def _with_logprobs(self, samples: list[Sample]) -> list[Sample]:
        """The samples with the log-probabilities that the loss needs, and with the trainer's own expert choices if
        those are replayed."""
        rl, own = self.task.rl, samples
        if not samples:
            return []
        if rl.old == "trainer" or rl.replay == "trainer":
            plan = PassOptions(rl.temperature, replay=rl.replay == "rollout", record=rl.replay == "trainer")
            own = score(self.rig, samples, plan)
            if rl.old == "rollout":
                own = [replace(sample, old=None) for sample in own]
        if self.reference:
            with self.reference.in_place():
                # The reference routes by its own gates: the policy's routes would make it another network.
                graded = score(self.rig, samples, PassOptions(rl.temperature, replay=False))
            own = [replace(sample, reference=other.old) for sample, other in zip(own, graded, strict=True)]
        return own

    def _penalty(self, sample: Sample) -> float:
        """The divergence from the reference that is subtracted from the reward, if `kl_place` is "reward"."""
        loss = self.task.rl.loss
        if sample.reference is None or loss.kl_place == "loss":
            return 0.0
        apart = divergence(loss.kl_estimator, sample.sampled, sample.reference, torch.ones_like(sample.sampled))
        return loss.kl * float(apart.sum())

    def _minibatches(self, lessons: list[Sample], step: int) -> Iterator[list[Sample]]:
        """Answers in random order, in `rl.minibatches` equal parts; shuffled anew in every epoch."""
        rl = self.task.rl
        for epoch in range(rl.epochs):
            order = list(range(len(lessons)))
            random.Random(f"{self.task.seed} {step} {epoch}").shuffle(order)
            for number in range(rl.minibatches):
                yield [lessons[i] for i in order[number :: rl.minibatches]]
