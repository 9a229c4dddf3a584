"""One rollout and its updates: refills, overlong answers, minibatches, and the choices of the loss."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dryvine.trainer.config import Config, ConfigError
from dryvine.trainer.rl.grader import Grader
from dryvine.trainer.rl.groups import Group
from dryvine.trainer.rl.questions import check_verifiers, open_task
from dryvine.trainer.rl.tasks.question import Question, user
from dryvine.trainer.rl.verifiers.names import STOPS
from dryvine.trainer.rl.verifiers.verdict import Verdict
from tests.support.digits import graded, learner_of, quiet

Tiny = Callable[..., Config]


def test_dynamic_sampling_fills_up_with_other_questions_and_has_an_end(digit_run: Tiny) -> None:
    learner = learner_of(digit_run("rl.dynamic=true", "rl.refills=2"))
    asked: list[list[int]] = []
    answers = learner.worker.answers

    def some(numbers: Any, ask: Any, on_answer: Any) -> list[Group]:
        """Every other question has answers of one reward."""
        asked.append(list(numbers))
        groups = answers(numbers, ask, on_answer)
        flat = [replace(a, reward=0.5) for a in groups[0].answers]
        mixed = [replace(a, reward=float(i)) for i, a in enumerate(groups[0].answers)]
        return [replace(g, answers=mixed if g.number % 2 else flat) for g in groups]

    learner.worker.answers = some  # type: ignore[method-assign]
    outcome = learner.rollout(0, quiet)
    assert asked == [[0, 1, 2, 3], [4, 5], [6]]
    assert [group.number for group in outcome.answers.groups] == [1, 3, 5]
    assert (outcome.answers.left_out, outcome.answers.refills, int(learner.asked)) == (4, 2, 7)


def test_a_verifier_ends_an_answer(digit_run: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its module says so, by the text and the question's record; what it ended is no answer that was cut."""
    seen: list[tuple[str, Any]] = []

    def ended(answer: str, problem: Any) -> bool:
        seen.append((answer, problem["answer"]))
        return len(seen) % 2 == 0

    monkeypatch.setitem(STOPS, "digits", "of_a_user")
    monkeypatch.setitem(sys.modules, "of_a_user", SimpleNamespace(ended=ended))  # type: ignore[arg-type]
    groups = learner_of(digit_run("rl.questions=1", "rl.samples=2", "rl.max_tokens=8")).worker.rollout(0, quiet).groups
    answers = groups[0].answers
    assert {answer.completion.reason for answer in answers} == {"callback"}
    assert not any(answer.overlong for answer in answers)
    assert {problem for _, problem in seen} == {5}
    assert {answer.text for answer in answers} <= {text for text, _ in seen}


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (None, "broken_stop raises ModuleNotFoundError: No module named 'broken_stop'"),
        ("raise SystemExit(7)", "broken_stop raises SystemExit: 7"),
        ("", r"broken_stop has no function ended\(answer, problem\)"),
        ("ended = 3", r"broken_stop has no function ended\(answer, problem\)"),
    ],
)
def test_a_stop_that_does_not_load_is_refused_before_a_run(
    digit_run: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | None, why: str
) -> None:
    if source is not None:
        (tmp_path / "broken_stop.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_stop", raising=False)
    monkeypatch.setitem(STOPS, "digits", "broken_stop")
    with pytest.raises(ConfigError, match=f"verifier digits: {why}"):
        check_verifiers(open_task(digit_run()))


@pytest.mark.parametrize(("overlong", "learnt"), [("keep", 16), ("mask", 0)])
def test_answers_that_ran_out_of_tokens(digit_run: Tiny, overlong: str, learnt: int) -> None:
    learner = learner_of(digit_run(f'rl.overlong="{overlong}"', "rl.max_tokens=1"))
    groups = learner.worker.rollout(0, quiet).groups
    cut = sum(answer.overlong for group in groups for answer in group.answers)
    assert cut >= 14
    lessons, _ = learner._lessons(groups)
    assert len(lessons) == learnt + (16 - cut if not learnt else 0)


def test_minibatches_have_every_answer_once_an_epoch(digit_run: Tiny) -> None:
    learner = learner_of(digit_run("rl.minibatches=3", "rl.epochs=2", "rl.questions=1"))
    lessons = list(range(11))
    parts = list(learner._minibatches(lessons, 5))  # type: ignore[arg-type]
    assert [len(part) for part in parts] == [4, 4, 3] * 2
    for epoch in (parts[:3], parts[3:]):
        assert sorted(n for part in epoch for n in part) == lessons  # type: ignore[type-var]
    assert parts[:3] != parts[3:]
    assert parts == list(learner._minibatches(lessons, 5))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "choices",
    [
        ('rl.replay="trainer"', 'rl.old="trainer"', 'rl.loss.correction="truncate"'),
        ('rl.replay="off"', "rl.minibatches=2", "rl.epochs=2"),
        ('rl.loss.kl_place="reward"', 'rl.loss.kl_estimator="k1"', 'rl.overlong="penalty"', "rl.overlong_buffer=2"),
        ('rl.preset="gspo"', "rl.minibatches=2"),
        ('rl.preset="dapo"', "rl.minibatches=2", "rl.overlong_buffer=2"),
    ],
)
def test_choices_of_the_loop_make_finite_updates(digit_run: Tiny, choices: tuple[str, ...]) -> None:
    outcome = learner_of(digit_run(*choices)).rollout(0, quiet)
    assert outcome.updates
    assert all(one.finite and one.norm > 0 for one in outcome.updates)
    assert outcome.updates[0].largest_apart < 1e-4


@pytest.mark.parametrize("kl", ["0.0", "0.1"])
def test_answers_that_no_verifier_scored_teach_nothing(digit_run: Tiny, kl: str) -> None:
    learner = learner_of(digit_run(f"rl.loss.kl={kl}", 'rl.old="trainer"'))
    before = [p.master.clone() for p in learner.rig.optimizer.pieces]
    rewarded = learner.worker.grader.rewarded
    learner.worker.grader.rewarded = lambda *answer: replace(rewarded(*answer), reward=None)  # type: ignore[method-assign]
    assert learner.rollout(0, quiet).updates == []
    assert all(torch.equal(p.master, old) for p, old in zip(learner.rig.optimizer.pieces, before, strict=True))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_a_divergence_in_the_reward_is_the_estimate_that_was_asked_for(digit_run: Tiny, estimator: str) -> None:
    choices = ('rl.loss.kl_place="reward"', f'rl.loss.kl_estimator="{estimator}"', "rl.loss.kl=0.5", "optim.lr=0.1")
    learner = learner_of(digit_run(*choices, "rl.loss.baseline=group_mean"))
    learner.rollout(0, quiet)  # so that the reference is another policy
    (group, *_) = groups = learner.worker.rollout(4, quiet).groups
    lessons, values = learner._lessons(groups)
    apart = [lesson.sampled - lesson.reference for lesson in lessons[: len(group.answers)]]  # type: ignore[operator]
    sums = {
        "k1": [float(x.sum()) for x in apart],
        "k2": [float((x**2 / 2).sum()) for x in apart],
        "k3": [float((torch.exp(-x) - 1 + x).sum()) for x in apart],
    }[estimator]
    assert max(map(abs, sums)) > 1e-3
    rewards = [(a.reward or 0.0) - 0.5 * total for a, total in zip(group.answers, sums, strict=True)]
    expected = [reward - sum(rewards) / len(rewards) for reward in rewards]
    assert values[0] == pytest.approx(expected, abs=1e-5)


def test_requests_that_failed_are_left_out_of_every_pass(digit_run: Tiny) -> None:
    """One that was refused has neither tokens nor the routes of its prompt; the others learn as if it were not there,
    except that their group is smaller."""
    choices = ('rl.old="trainer"', "rl.loss.kl=0.05", 'rl.loss.kl_place="reward"')
    learner = learner_of(digit_run(*choices))
    (first, *groups) = learner.worker.rollout(0, quiet).groups
    one, second, *others = first.answers
    nothing = replace(
        second.completion, tokens=torch.empty(0, dtype=torch.int64), logprobs=torch.empty(0),
        routes=second.completion.routes[:, :0], reason="failed",
    )  # fmt: skip
    found = [
        learner._lessons([replace(first, answers=[one, replace(second, reward=None, completion=c), *others]), *groups])
        for c in (nothing, second.completion)
    ]
    (lessons, values), (expected, same) = found
    assert values == same
    assert values[0][1] == 0
    assert len(lessons) == len(expected) == 15
    for lesson, other in zip(lessons, expected, strict=True):
        assert torch.equal(lesson.old, other.old)  # type: ignore[arg-type]
        assert torch.equal(lesson.reference, other.reference)  # type: ignore[arg-type]


def test_verdicts_are_shared_by_rank_0() -> None:
    """Other ranks start no processes, and have the same rewards."""
    question = Question(user("x"), {}, {"integer": 1.0})
    verdicts = [{"integer": Verdict(None, "killed")}, {"integer": Verdict(1.0)}]
    mesh = SimpleNamespace(rank=1, gather=lambda own, what: [verdicts, own])
    chat = SimpleNamespace(text=lambda tokens: "5")
    grader = Grader(SimpleNamespace(overlong="keep"), chat, mesh, ["integer"])  # type: ignore[arg-type]
    completion = graded([True]).answers[0].completion
    grading = grader.begin()
    for _ in range(2):
        grading.add(question, completion)
    found = grading.graded()
    assert [(one.reward, one.correct) for one in found] == [(None, False), (1.0, True)]
