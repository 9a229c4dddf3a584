"""The loop: groups, minibatches, refills, overlong answers, the reference, alarms, and a resume to the bit."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dryvine.comm.mesh import Mesh
from dryvine.launch.report.page import report_page
from dryvine.launch.report.runs import RunFolder
from dryvine.trainer.config import Config, ConfigError
from dryvine.trainer.generate.requests import Completion, Request
from dryvine.trainer.generate.sampler import Sampler
from dryvine.trainer.hand_off.names import biases
from dryvine.trainer.hand_off.run_files import open_run
from dryvine.trainer.nonfinite import Diverged
from dryvine.trainer.rig import mesh_of
from dryvine.trainer.rl.alarms import WINDOW, AlarmMemory
from dryvine.trainer.rl.asker import Asker
from dryvine.trainer.rl.chat import Chat
from dryvine.trainer.rl.config import Alarms
from dryvine.trainer.rl.conversations import read as read_conversations
from dryvine.trainer.rl.evaluate import evaluation
from dryvine.trainer.rl.groups import Group
from dryvine.trainer.rl.judge import Judge, Judged
from dryvine.trainer.rl.learner import Learner
from dryvine.trainer.rl.loop import reinforce
from dryvine.trainer.rl.questions import open_task
from dryvine.trainer.rl.tasks.countdown_demos import tokenizer
from dryvine.trainer.rl.tasks.question import Question, user
from dryvine.trainer.rl.verifiers.length import soft_overlong
from dryvine.trainer.rl.verifiers.names import STOPS
from dryvine.trainer.rl.verifiers.verdict import Verdict
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.run_rows import read
from dryvine.trainer.sources import open_sources
from tests.support.rig import rig_of

Tiny = Callable[..., Config]


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path) -> Tiny:
    """Counting: the right answer to any question is 5, and a shift of the first token from chance is enough to be
    rewarded for."""
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


class DigitJudge:
    """In a judge's place: the share of an answer that is digits, without processes."""

    def __init__(self, rl: Any, chat: Any, mesh: Mesh, names: Any) -> None:
        self.rl, self.chat = rl, chat

    def __enter__(self) -> DigitJudge:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def over(self, mesh: Mesh) -> DigitJudge:
        return self

    def judge(self, asked: list[tuple[Question, Completion]]) -> list[Judged]:
        out = []
        for _, completion in asked:
            text = self.chat.text(completion.tokens.tolist())
            score = sum(c in "0123456789" for c in text) / 4
            reward = score + (
                soft_overlong(len(completion.tokens), self.rl.max_tokens, self.rl.overlong_buffer)
                if self.rl.overlong == "penalty"
                else 0.0
            )
            out.append(Judged(completion, text, {"digits": Verdict(score)}, reward, score == 1))
        return out


@pytest.fixture(autouse=True)
def _digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dryvine.trainer.rl.loop.Judge", DigitJudge)
    monkeypatch.setitem(__import__("dryvine.trainer.rl.verifiers.names", fromlist=["x"]).VERIFIERS, "digits", "none")


def go(config: Config) -> bool:
    plan = make_plan(config)
    return reinforce(plan, mesh_of(plan, torch.device("cpu")), open_sources(config))


def learner_of(config: Config) -> Learner:
    rig = rig_of(config)
    task = open_task(config)
    judge = DigitJudge(task.rl, task.chat, rig.mesh, ())
    return Learner(rig, Asker(task, Sampler.of_rig(rig), judge, rig.optimizer.zero.settle))  # type: ignore[arg-type]


def quiet(*_: int) -> None:
    return None


def test_a_run_earns_more_and_writes_what_it_did(run: Tiny) -> None:
    config = run("run.steps=20", "rl.loss.kl=0.0", "run.eval_every=10", "optim.lr=2e-2")
    assert go(config)
    rows = read(config.run.folder)
    assert [row["step"] for row in rows] == list(range(21))
    rewards = [row["reward"] for row in rows[1:]]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.15
    # The sampler's probabilities are the trainer's: nothing is stale in a run of one update a rollout.
    assert max(row["mismatch_k3"] for row in rows[1:]) < 1e-6
    assert max(row["route_mismatch"] for row in rows[1:]) < 0.01
    assert [row["step"] for row in rows if row.get("eval_pass_1") is not None] == [0, 10, 20]
    assert (config.run.folder / "rl.png").exists()
    page = report_page([RunFolder.open(config.run.folder)])
    assert "Held-out questions" in page
    assert open_run(str(config.run.folder)).stored.buffers.keys() == set(biases(config.model))
    samples = read(config.run.folder, "samples.jsonl")
    assert {"question", "answer", "reward", "advantage", "verdicts", "step"} == set(samples[0])


@pytest.mark.parametrize("ahead", [pytest.param("false", marks=pytest.mark.long), "true"])
def test_a_stopped_run_goes_on_to_the_same_bits(run: Tiny, ahead: str) -> None:
    """Through a checkpoint: weights, moments, reference, alarms, how many questions were asked, and with `rl.ahead` the
    weights that the answers under way were made by."""
    more = (
        "rl.reference_every=2", "rl.minibatches=2", "run.steps=8", "rl.questions=2", "rl.samples=2",
        f"rl.ahead={ahead}",
    )  # fmt: skip
    whole, halves = run(*more, 'run.name="whole"'), run(*more, 'run.name="halves"')
    go(whole)
    first = halves.model_copy(update={"run": halves.run.model_copy(update={"steps": 4})})
    go(first)
    go(halves)
    kept = ("step", "reward", "loss", "grad_norm", "reference_k3", "entropy", "mismatch_logprob")
    rows = [[{k: row.get(k) for k in kept} for row in read(c.run.folder)] for c in (whole, halves)]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == [0, 2, 4, 6, 8]
    assert rows[0][-1]["reference_k3"] > 0


def test_answers_ahead_are_those_of_the_weights_before_the_last_rollout(run: Tiny) -> None:
    """The first rollout and the second are the same policy's; and sampling in turn is as it was."""
    ahead, turns = run('run.name="ahead"', "rl.ahead=true"), run('run.name="turns"')
    for config in (ahead, turns):
        go(config)
    one, other = ([row for row in read(c.run.folder) if row["step"]] for c in (ahead, turns))
    # By the same weights in the first, and in the second still by those, where the run in turn has new ones.
    assert {k: one[0][k] for k in ("reward", "loss", "grad_norm")} == {
        k: other[0][k] for k in ("reward", "loss", "grad_norm")
    }
    assert one[0]["mismatch_k3"] < 1e-9 < 1e-5 < min(row["mismatch_k3"] for row in one[1:])
    assert max(row["mismatch_k3"] for row in other) < 1e-9
    assert one[1]["grad_norm"] != other[1]["grad_norm"]


def test_what_fails_while_sampling_ahead_fails_the_run(run: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = DigitJudge.judge

    def broken(self: Any, asked: Any) -> list[Judged]:
        if threading.current_thread() is not threading.main_thread() and len(asked) > 8:
            raise OSError("no more processes")
        return judge(self, asked)

    monkeypatch.setattr(DigitJudge, "judge", broken)
    with pytest.raises(OSError, match="no more processes"):
        go(run("rl.ahead=true"))


def test_the_reference_is_the_policy_of_before_and_is_refreshed(run: Tiny) -> None:
    still, fresh = (
        run('run.name="still"', "run.steps=6"),
        run('run.name="fresh"', "run.steps=6", "rl.reference_every=1"),
    )
    for config in (still, fresh):
        go(config)
    apart = [[row["reference_k3"] for row in read(c.run.folder)[1:]] for c in (still, fresh)]
    assert apart[0][0] < 1e-9 < 1e-5 < apart[0][-1]
    assert max(apart[1]) < 1e-9


def test_dynamic_sampling_fills_up_with_other_questions_and_has_an_end(run: Tiny) -> None:
    learner = learner_of(run("rl.dynamic=true", "rl.refills=2"))
    asked: list[list[int]] = []
    answers = learner.asker.answers

    def some(numbers: Any, ask: Any, on_answer: Any) -> list[Group]:
        """Every other question has answers of one reward."""
        asked.append(list(numbers))
        groups = answers(numbers, ask, on_answer)
        flat = [replace(a, reward=0.5) for a in groups[0].answers]
        mixed = [replace(a, reward=float(i)) for i, a in enumerate(groups[0].answers)]
        return [replace(g, answers=mixed if g.number % 2 else flat) for g in groups]

    learner.asker.answers = some  # type: ignore[method-assign]
    outcome = learner.rollout(0, quiet)
    assert asked == [[0, 1, 2, 3], [4, 5], [6]]
    assert [group.number for group in outcome.answers.groups] == [1, 3, 5]
    assert (outcome.answers.left_out, outcome.answers.refills, int(learner.asked)) == (4, 2, 7)


def test_a_verifier_ends_an_answer(run: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its module says so, by the text and the question's record; what it ended is no answer that was cut."""
    seen: list[tuple[str, Any]] = []

    def ended(answer: str, problem: Any) -> bool:
        seen.append((answer, problem["answer"]))
        return len(seen) % 2 == 0

    monkeypatch.setitem(STOPS, "digits", "of_a_user")
    monkeypatch.setitem(sys.modules, "of_a_user", SimpleNamespace(ended=ended))  # type: ignore[arg-type]
    groups = learner_of(run("rl.questions=1", "rl.samples=2", "rl.max_tokens=8")).asker.rollout(0, quiet).groups
    answers = groups[0].answers
    assert {answer.completion.reason for answer in answers} == {"callback"}
    assert not any(answer.overlong for answer in answers)
    assert {problem for _, problem in seen} == {5}
    assert {answer.text for answer in answers} <= {text for text, _ in seen}


@pytest.mark.parametrize(("overlong", "learnt"), [("keep", 16), ("mask", 0)])
def test_answers_that_ran_out_of_tokens(run: Tiny, overlong: str, learnt: int) -> None:
    learner = learner_of(run(f'rl.overlong="{overlong}"', "rl.max_tokens=1"))
    groups = learner.asker.rollout(0, quiet).groups
    cut = sum(answer.overlong for group in groups for answer in group.answers)
    assert cut >= 14
    lessons, _ = learner._lessons(groups)
    assert len(lessons) == learnt + (16 - cut if not learnt else 0)


def test_minibatches_have_every_answer_once_an_epoch(run: Tiny) -> None:
    learner = learner_of(run("rl.minibatches=3", "rl.epochs=2", "rl.questions=1"))
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
def test_choices_of_the_loop_make_finite_updates(run: Tiny, choices: tuple[str, ...]) -> None:
    outcome = learner_of(run(*choices)).rollout(0, quiet)
    assert outcome.updates
    assert all(one.finite and one.norm > 0 for one in outcome.updates)
    assert outcome.updates[0].largest_apart < 1e-4


def test_answers_that_no_verifier_scored_teach_nothing(run: Tiny) -> None:
    learner = learner_of(run("rl.loss.kl=0.0"))
    before = [p.master.clone() for p in learner.rig.optimizer.pieces]
    judge = learner.asker.judge.judge
    learner.asker.judge.judge = lambda asked: [replace(one, reward=None) for one in judge(asked)]  # type: ignore[method-assign]
    assert learner.rollout(0, quiet).updates == []
    assert all(torch.equal(p.master, old) for p, old in zip(learner.rig.optimizer.pieces, before, strict=True))


def test_an_evaluation_by_itself_says_what_the_run_would(run: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    config = run("run.steps=1", "rl.eval_samples=4")
    go(config)
    row = read(config.run.folder)[-1]
    go(run("run.steps=1", "rl.eval_samples=4", "rl.evaluate_only=true"))
    said = capsys.readouterr().out
    for name in ("eval_pass_1", "eval_greedy", "eval_pass_k_high", "eval_score.digits"):
        assert f"{name} {row[name]:.4f}" in said


def test_right_answers_are_harvested_as_conversations_that_fine_tuning_reads(run: Tiny, tmp_path: Path) -> None:
    """From the weights of another run; one of a kind, the shortest first."""
    go(run("run.steps=2"))
    out = tmp_path / "right" / "answers.jsonl"
    init = f'run.init_from="{tmp_path}/tiny"'
    config = run('run.name="rejection"', init, f'rl.harvest="{out}"', "rl.harvest_per_question=2", "rl.max_tokens=12")
    assert config.rl is not None
    judge = DigitJudge.judge

    def easy(self: Any, asked: Any) -> list[Judged]:
        """Whatever has a digit is right, and ended by itself."""
        found = judge(self, asked)
        return [
            replace(one, correct=one.reward > 0, completion=replace(one.completion, reason="stop")) for one in found
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DigitJudge, "judge", easy)
        assert go(config)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert records
    texts = [record["messages"][-1]["content"] for record in records]
    assert all(any(character.isdigit() for character in text) for text in texts)
    assert len(read_conversations(out, Chat(config.rl.chat), 32)) == len(records)
    assert not (tmp_path / "rejection").exists()


# -- alarms


def sound(**changes: float | None) -> dict[str, float | None]:
    return {
        "reward": 0.3, "mismatch_k3": 1e-7, "mismatch_logprob": 1e-4, "route_mismatch": 0.0, "clip_fraction": 0.01,
        "entropy": 0.8, "zero_variance": 0.3, "unscored": 0.0, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mismatch_k3": 0.1}, "mismatch_k3: 0.1 is over 0.01"),
        ({"mismatch_logprob": math.nan}, "mismatch_logprob: nan"),
        ({"route_mismatch": 0.5}, 'set rl.replay = "rollout"'),
        ({"clip_fraction": 0.9}, "clip_fraction"),
        ({"entropy": 0.001}, "one answer is left"),
        ({"entropy": 5.0}, "become noise"),
        ({"zero_variance": 1.0}, "too easy or too hard"),
        ({"unscored": 0.2}, "verifiers fail"),
        ({}, None),
        ({"mismatch_k3": None, "entropy": None}, None),
    ],
)
def test_an_alarm_for_every_way_to_go_wrong(change: dict[str, float | None], said: str | None) -> None:
    found = AlarmMemory(Alarms()).check(sound(**change))
    assert bool(found) == bool(said)
    assert said is None or said in found[0]


def test_a_reward_that_falls_is_an_alarm() -> None:
    memory = AlarmMemory(Alarms(action="stop", patience=2))
    for reward in [0.1, 0.2, 0.3] + [0.4] * WINDOW:
        assert not memory.check(sound(reward=reward))
    falling = [memory.check(sound(reward=0.0)) for _ in range(WINDOW)]
    assert not falling[0]
    assert "reward: its mean over 8 rollouts" in falling[-1][0]
    assert memory.stops


def test_alarms_end_a_run_after_a_checkpoint(run: Tiny) -> None:
    config = run("rl.alarms.action=stop", "rl.alarms.patience=2", "rl.alarms.entropy_above=1e-3", "run.steps=9")
    with pytest.raises(Diverged, match="alarms in 2 rollouts in a row"):
        go(config)
    assert [row["step"] for row in read(config.run.folder, "alarms.jsonl")] == [1, 2]
    assert (config.run.folder / "checkpoints" / "step-00000002").exists()


# -- evaluation


def judged(correct: list[bool]) -> Group:
    completion = Completion(Request((1,), 1), torch.ones(1), torch.zeros(1), torch.zeros(1), "stop")
    answers = [Judged(completion, "", {"v": Verdict(float(c))}, float(c), c) for c in correct]
    return Group(0, Question(user("x"), {}, {"v": 1.0}), answers)


def test_an_evaluation_has_shares_and_intervals() -> None:
    groups = [
        judged([True, False, False, False]),
        judged([False] * 4),
        judged([True] * 4),
        judged([True, True, False, False]),
    ]
    found = evaluation([judged([c]) for c in (True, False, True, True)], groups)
    assert (found.greedy, found.pass_1, found.pass_k) == (0.75, 7 / 16, 0.75)
    assert found.scores == {"v": 7 / 16}
    assert found.greedy_low < 0.75 < found.greedy_high <= 1
    assert found.pass_1_low == pytest.approx(7 / 16 - 1.96 * torch.tensor([0.25, 0, 1, 0.5]).std().item() / 2)


# -- refusals


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rl.max_tokens=60", "rl.max_tokens = 60, behind a prompt of 5 tokens, is more than data.seq_len"),
        ("model.vocab=320", None),
        ('rl.task={name="chess"}', "rl.task.name = 'chess': there are"),
        ('rl.task={name="jsonl"}', "rl.task.train"),
    ],
)
def test_a_task_that_cannot_be_run_is_refused(run: Tiny, override: str, said: str | None) -> None:
    if said is None:
        assert open_task(run(override)).train
        return
    with pytest.raises(ConfigError, match=said):
        open_task(run(override))


def test_verdicts_are_shared_by_rank_0() -> None:
    """Other ranks start no processes, and have the same rewards."""
    question = Question(user("x"), {}, {"integer": 1.0})
    verdicts = [{"integer": Verdict(None, "killed")}, {"integer": Verdict(1.0)}]
    mesh = SimpleNamespace(rank=1, gather=lambda own, what: [verdicts, own])
    chat = SimpleNamespace(text=lambda tokens: "5")
    judge = Judge(SimpleNamespace(overlong="keep"), chat, mesh, ["integer"])  # type: ignore[arg-type]
    completion = judged([True]).answers[0].completion
    found = judge.judge([(question, completion)] * 2)
    assert [(one.reward, one.correct) for one in found] == [(None, False), (1.0, True)]
