"""A task that a tiny model learns in seconds, and a grader without processes: for tests of reinforcement learning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dryvine.comm.mesh import Mesh
from dryvine.trainer.config import Config
from dryvine.trainer.generate.requests import Completion, Request
from dryvine.trainer.generate.sampler import Sampler
from dryvine.trainer.rig import mesh_of
from dryvine.trainer.rl.grader import GradedAnswer
from dryvine.trainer.rl.groups import Group
from dryvine.trainer.rl.learner import Learner
from dryvine.trainer.rl.loop import reinforce
from dryvine.trainer.rl.questions import open_task
from dryvine.trainer.rl.rollout_worker import RolloutWorker
from dryvine.trainer.rl.tasks.countdown_demos import tokenizer
from dryvine.trainer.rl.tasks.question import Question, user
from dryvine.trainer.rl.verifiers.length import soft_overlong
from dryvine.trainer.rl.verifiers.names import VERIFIERS
from dryvine.trainer.rl.verifiers.verdict import Verdict
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.sources import open_sources
from tests.support.rig import rig_of

Tiny = Callable[..., Config]


class DigitGrader:
    """In a grader's place: the share of an answer that is digits, without processes."""

    def __init__(self, rl: Any, chat: Any, mesh: Mesh, names: Any) -> None:
        self.rl, self.chat = rl, chat

    def __enter__(self) -> DigitGrader:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def over(self, mesh: Mesh) -> DigitGrader:
        return self

    def begin(self) -> DigitGrading:
        return DigitGrading(self)

    def rewarded(self, completion: Completion) -> GradedAnswer:
        text = self.chat.text(completion.tokens.tolist())
        score = sum(c in "0123456789" for c in text) / 4
        reward = score + (
            soft_overlong(len(completion.tokens), self.rl.max_tokens, self.rl.overlong_buffer)
            if self.rl.overlong == "penalty"
            else 0.0
        )
        return GradedAnswer(completion, text, {"digits": Verdict(score)}, reward, score == 1)


class DigitGrading:
    def __init__(self, grader: DigitGrader) -> None:
        self._grader, self._answers = grader, list[GradedAnswer]()

    def add(self, question: Question, completion: Completion) -> None:
        self._answers.append(self._grader.rewarded(completion))

    def graded(self) -> list[GradedAnswer]:
        return self._answers


@pytest.fixture
def digit_run(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """`digit_run("run.steps=20", ...)`: a config whose answers are graded by their share of digits. The right answer to
    every question is 5, and a small shift of the first token's probabilities already raises the reward."""
    monkeypatch.setattr("dryvine.trainer.rl.loop.Grader", DigitGrader)
    monkeypatch.setitem(VERIFIERS, "digits", "none")
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    lines = "".join(json.dumps({"prompt": f"{n}+{5 - n}", "answer": 5}) + "\n" for n in range(5))
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(lines)
    rl = (
        f'rl.chat.tokenizer="{tmp_path}/tokenizer.json"', 'data.mask="document"', "model.balance_alpha=0.0",
        f'rl.task={{name="jsonl", train="{tmp_path}/train.jsonl", validation="{tmp_path}/validation.jsonl", '
        'verifiers={digits=1.0}}', "rl.questions=4", "rl.samples=4", "rl.max_tokens=4", "rl.eval_problems=2",
        "rl.eval_samples=2", "run.steps=4", "run.eval_every=4", "run.checkpoint_every=2", "model.layers=2",
        "optim.lr=1e-2", "rl.loss.kl=0.01",
    )  # fmt: skip
    return lambda *overrides: tiny(*rl, *overrides)


def go(config: Config) -> bool:
    plan = make_plan(config)
    return reinforce(plan, mesh_of(plan, torch.device("cpu")), open_sources(config))


def learner_of(config: Config) -> Learner:
    rig = rig_of(config)
    task = open_task(config)
    grader = DigitGrader(task.rl, task.chat, rig.mesh, ())
    return Learner(rig, RolloutWorker(task, Sampler.of_rig(rig), grader, rig.optimizer.zero.settle))  # type: ignore[arg-type]


def quiet(*_: int) -> None:
    return None


def graded(correct: list[bool]) -> Group:
    completion = Completion(Request((1,), 1), torch.ones(1), torch.zeros(1), torch.zeros(1), "stop")
    answers = [GradedAnswer(completion, "", {"v": Verdict(float(c))}, float(c), c) for c in correct]
    return Group(0, Question(user("x"), {}, {"v": 1.0}), answers)
