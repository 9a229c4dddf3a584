"""Evaluations of a policy, by itself too, and answers harvested for fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dryvine.trainer.config import Config
from dryvine.trainer.generate.requests import Completion
from dryvine.trainer.rl.chat import Chat
from dryvine.trainer.rl.conversations import read as read_conversations
from dryvine.trainer.rl.evaluate import evaluation
from dryvine.trainer.rl.grader import GradedAnswer
from dryvine.trainer.rl.tasks.question import Question, user
from dryvine.trainer.rl.verifiers.verdict import Verdict
from dryvine.trainer.run_rows import read
from tests.support.digits import DigitGrader, go, graded

Tiny = Callable[..., Config]


def test_an_evaluation_by_itself_says_what_the_run_would(digit_run: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    config = digit_run("run.steps=1", "rl.eval_samples=4")
    go(config)
    row = read(config.run.folder)[-1]
    go(digit_run("run.steps=1", "rl.eval_samples=4", "rl.evaluate_only=true"))
    said = capsys.readouterr().out
    for name in ("eval_pass_1", "eval_greedy", "eval_pass_k_high", "eval_score.digits"):
        assert f"{name} {row[name]:.4f}" in said


def test_right_answers_are_harvested_as_conversations_that_fine_tuning_reads(digit_run: Tiny, tmp_path: Path) -> None:
    """From the weights of another run; one of a kind, the shortest first."""
    go(digit_run("run.steps=2"))
    out = tmp_path / "right" / "answers.jsonl"
    init = f'run.init_from="{tmp_path}/tiny"'
    config = digit_run(
        'run.name="rejection"', init, f'rl.harvest="{out}"', "rl.harvest_per_question=2", "rl.max_tokens=12"
    )
    assert config.rl is not None
    rewarded = DigitGrader.rewarded

    def easy(self: Any, completion: Completion) -> GradedAnswer:
        """Whatever has a digit is right, and ended by itself."""
        one = rewarded(self, completion)
        return replace(one, correct=one.reward > 0, completion=replace(completion, reason="stop"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DigitGrader, "rewarded", easy)
        assert go(config)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert records
    texts = [record["messages"][-1]["content"] for record in records]
    assert all(any(character.isdigit() for character in text) for text in texts)
    assert len(read_conversations(out, Chat(config.rl.chat), 32)) == len(records)
    assert not (tmp_path / "rejection").exists()


def test_questions_have_verifiers_of_their_own_and_what_could_not_be_scored_is_in_no_mean() -> None:
    one, other = graded([True, False]), graded([True, True])
    answers = [replace(a, verdicts={"w": v}) for a, v in zip(other.answers, (Verdict(None), Verdict(0.5)), strict=True)]
    other = replace(other, question=Question(user("y"), {}, {"w": 1.0}), answers=answers)
    unknown = replace(other, answers=[replace(a, verdicts={"u": Verdict(None)}) for a in answers])
    found = evaluation([graded([True])] * 3, [one, other, unknown])
    assert found.scores == {"v": 0.5, "w": 0.5}


def test_an_evaluation_has_shares_and_intervals() -> None:
    groups = [
        graded([True, False, False, False]),
        graded([False] * 4),
        graded([True] * 4),
        graded([True, True, False, False]),
    ]
    found = evaluation([graded([c]) for c in (True, False, True, True)], groups)
    assert (found.greedy, found.pass_1, found.pass_k) == (0.75, 7 / 16, 0.75)
    assert found.scores == {"v": 7 / 16}
    assert found.greedy_low < 0.75 < found.greedy_high <= 1
    assert found.pass_1_low == pytest.approx(7 / 16 - 1.96 * torch.tensor([0.25, 0, 1, 0.5]).std().item() / 2)
