"""Whole runs: learning, sampling ahead, the reference, a resume to the bit, and tasks that are refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from dryvine.launch.report.page import report_page
from dryvine.launch.report.runs import RunFolder
from dryvine.trainer.config import Config, ConfigError
from dryvine.trainer.data.identity import UNKNOWN
from dryvine.trainer.data.tokenizer import learn_tokenizer
from dryvine.trainer.generate.requests import Completion
from dryvine.trainer.hand_off.names import biases
from dryvine.trainer.hand_off.run_files import open_run
from dryvine.trainer.journal import Journal, same_run
from dryvine.trainer.rl.chat import Chat
from dryvine.trainer.rl.grader import GradedAnswer
from dryvine.trainer.rl.questions import open_task
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.run_rows import read
from tests.support.digits import DigitGrader, go

Tiny = Callable[..., Config]


def test_a_run_earns_more_and_writes_what_it_did(digit_run: Tiny) -> None:
    config = digit_run("run.steps=20", "rl.loss.kl=0.0", "run.eval_every=10", "optim.lr=2e-2")
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
def test_a_stopped_run_goes_on_to_the_same_bits(digit_run: Tiny, ahead: str) -> None:
    """Through a checkpoint: weights, moments, a reference that the weights have left, alarms, how many questions were
    asked, and with `rl.ahead` the weights that the answers under way were made by."""
    more = (
        "rl.reference_every=6", "rl.minibatches=2", "run.steps=8", "rl.questions=2", "rl.samples=2",
        f"rl.ahead={ahead}",
    )  # fmt: skip
    whole, halves = digit_run(*more, 'run.name="whole"'), digit_run(*more, 'run.name="halves"')
    go(whole)
    first = halves.model_copy(update={"run": halves.run.model_copy(update={"steps": 4})})
    go(first)
    go(halves)
    kept = ("step", "reward", "loss", "grad_norm", "reference_k3", "entropy", "mismatch_logprob")
    rows = [[{k: row.get(k) for k in kept} for row in read(c.run.folder)] for c in (whole, halves)]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == [0, 2, 4, 6, 8]
    assert rows[0][-1]["reference_k3"] > 0


@pytest.mark.parametrize(("more", "what"), [("rl.loss.kl=0.01", "rl.loss.kl"), ("rl.ahead=true", "rl.ahead")])
def test_a_run_cannot_take_up_what_its_checkpoints_lack(digit_run: Tiny, more: str, what: str) -> None:
    """Refused before any GPU is held; leaving it off, and an evaluation, are no such thing."""
    go(digit_run("run.steps=1", "rl.loss.kl=0.0"))
    with pytest.raises(ConfigError, match=f"holds a run without {what}, .*run.init_from = "):
        same_run(digit_run("rl.loss.kl=0.0", more), UNKNOWN)
    same_run(digit_run("rl.loss.kl=0.0"), UNKNOWN)
    same_run(digit_run("rl.loss.kl=0.0", more, "rl.evaluate_only=true"), UNKNOWN)


@pytest.mark.parametrize("more", ["rl.loss.kl=0.01", "rl.ahead=true"])
def test_a_run_killed_before_it_saved_may_take_up_anything(digit_run: Tiny, more: str) -> None:
    before = digit_run("rl.loss.kl=0.0")
    Journal(before, make_plan(before).schedule, 0).close()
    same_run(digit_run("rl.loss.kl=0.0", more), UNKNOWN)


def test_a_question_that_the_chat_cannot_encode_is_refused_wherever_it_is(digit_run: Tiny, tmp_path: Path) -> None:
    """However short it is."""
    for bad, said in (
        ('[{"role": "tool", "content": "1"}]', "question 1 of the train split: the role 'tool' has no template"),
        ('"\\ud800"', "question 1 of the train split: .*half a surrogate pair"),
    ):
        lines = [f'{{"prompt": {bad}, "answer": 5}}', *['{"prompt": "10+20+30", "answer": 5}'] * 1000]
        (tmp_path / "train.jsonl").write_text("\n".join(lines))
        with pytest.raises(ConfigError, match=said):
            open_task(digit_run())


def test_a_prompt_of_few_characters_and_many_tokens_is_seen(digit_run: Tiny, tmp_path: Path) -> None:
    """Beside a thousand of more characters and fewer tokens."""
    made = learn_tokenizer(["ab" * 1000] * 9, 270)
    made.add_special_tokens([AddedToken(name, special=True) for name in ("<|User|>", "<|Assistant|>")])
    made.save(str(tmp_path / "merged.json"))
    chat = f'rl.chat.tokenizer="{tmp_path}/merged.json"'
    plenty = ['{"prompt": "' + "ab" * 32 + '", "answer": 5}'] * 1000
    assert len(Chat(digit_run(chat).rl.chat).prompt([{"role": "user", "content": "ab" * 32}])) < 12  # type: ignore[union-attr]
    (tmp_path / "train.jsonl").write_text("\n".join([*plenty, '{"prompt": "' + "z" * 28 + '", "answer": 5}']))
    with pytest.raises(ConfigError, match="behind a prompt of 30 tokens"):
        open_task(digit_run(chat))
    (tmp_path / "train.jsonl").write_text("\n".join([*plenty, '{"prompt": "' + "z" * 27 + '", "answer": 5}']))
    assert len(open_task(digit_run(chat)).train) == 1001


def test_answers_ahead_are_those_of_the_weights_before_the_last_rollout(digit_run: Tiny) -> None:
    """The first rollout and the second are the same policy's; and sampling in turn is as it was."""
    ahead, turns = digit_run('run.name="ahead"', "rl.ahead=true"), digit_run('run.name="turns"')
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


def test_what_fails_while_sampling_ahead_fails_the_run(digit_run: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    rewarded, counts = DigitGrader.rewarded, count()

    def broken(self: Any, completion: Completion) -> GradedAnswer:
        if threading.current_thread() is not threading.main_thread() and next(counts) > 8:
            raise OSError("no more processes")
        return rewarded(self, completion)

    monkeypatch.setattr(DigitGrader, "rewarded", broken)
    with pytest.raises(OSError, match="no more processes"):
        go(digit_run("rl.ahead=true"))


def test_the_reference_is_the_policy_of_before_and_is_refreshed(digit_run: Tiny) -> None:
    still, fresh = (
        digit_run('run.name="still"', "run.steps=6"),
        digit_run('run.name="fresh"', "run.steps=6", "rl.reference_every=1"),
    )
    for config in (still, fresh):
        go(config)
    apart = [[row["reference_k3"] for row in read(c.run.folder)[1:]] for c in (still, fresh)]
    assert apart[0][0] < 1e-9 < 1e-5 < apart[0][-1]
    assert max(apart[1]) < 1e-9


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rl.max_tokens=60", "rl.max_tokens = 60, behind a prompt of 5 tokens, is more than data.seq_len"),
        ("model.vocab=320", None),
        ('rl.task={name="chess"}', "rl.task.name = 'chess': there are"),
        ('rl.task={name="jsonl"}', "rl.task.train"),
    ],
)
def test_a_task_that_cannot_be_run_is_refused(digit_run: Tiny, override: str, said: str | None) -> None:
    if said is None:
        assert open_task(digit_run(override)).train
        return
    with pytest.raises(ConfigError, match=said):
        open_task(digit_run(override))
