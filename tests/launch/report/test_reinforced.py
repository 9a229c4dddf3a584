"""The report and the watch of a run that learns from rewards."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from dryvine.launch.report.page import report_page
from dryvine.launch.report.runs import RunFolder
from dryvine.launch.report.watch import watch
from dryvine.trainer.config import Config, ConfigError, dump
from dryvine.trainer.run_rows import Figures

Folder = Callable[[str], Path]


def row(step: int) -> Figures:
    return {
        "step": step, "reward": 0.1 * step, "correct": 0.05 * step, "score.countdown": 0.05 * step, "score.format": 0.9,
        "length": 20.0, "longest": 30, "entropy": 1.5, "mismatch_k3": 1e-7, "mismatch_logprob": 1e-4,
        "zero_variance": 0.25, "clip_fraction": 0.0, "unscored": 0.125, "grad_norm": 1.0, "tokens_per_second": 900.0,
        "seconds_sample": 1.0, "seconds_score": 0.5, "seconds_learn": 1.5,
    }  # fmt: skip


def held_out(step: int, share: float) -> Figures:
    named = {f"eval_{name}": share for name in ("pass_1", "pass_k", "greedy")}
    bands = {f"{name}_{end}": value for name in named for end, value in (("low", share - 0.1), ("high", share + 0.1))}
    return {"step": step, **named, **bands}


@pytest.fixture
def make(tiny: Callable[..., Config], tmp_path: Path) -> Folder:
    def folder(name: str) -> Path:
        chat = 'rl.chat.tokenizer="tokenizer.json"'
        config = tiny(f"run.name={name}", chat, 'data.mask="document"', "model.balance_alpha=0.0")
        path = tmp_path / name
        path.mkdir()
        (path / "config.toml").write_text(dump(config))
        rows = [held_out(0, 0.2), *(row(step) for step in (1, 2, 3)), row(4) | held_out(4, 0.5)]
        lines = {
            "metrics.jsonl": rows,
            "starts.jsonl": [{"after_step": 0, "at": "2026-11-26T01:00:00+00:00"}],
            "alarms.jsonl": [{"step": step, "alarm": f"entropy: 9.{step} nats"} for step in (2, 3)],
            "samples.jsonl": [
                {
                    "step": step,
                    "question": "7 5 9 26",
                    "answer": f"<think>of {step}</think>\nline" + "x" * 2000,
                    "reward": None if step == 1 else 1.0,
                    "advantage": 0.5,
                    "verdicts": {"countdown": [None if step == 1 else 1.0, "26, wanted 26"], "format": [1.0, ""]},
                }
                for step in range(1, 9)
            ],
        }
        for file, objects in lines.items():
            (path / file).write_text("".join(json.dumps(one) + "\n" for one in objects))
        return path

    return folder


def test_a_report_shows_what_matters_of_rewards(make: Folder) -> None:
    text = report_page([RunFolder.open(make("one"))])
    for title in ("Reward", "Held-out questions", "Length of answers", "Entropy", "Sampler and trainer", "Shares"):
        assert f"<h2>{title}</h2>" in text
    assert "Loss" not in text, "that is of other runs"
    assert "20.0% to 50.0%</b><span>held-out pass@1, now 40% to 60%" in text
    assert "clipped tokens" not in text, "it was 0 throughout"
    assert ">countdown<" in text
    assert "update 1: reward none, advantage 0.50; countdown unscored (26, wanted 26), format 1" in text
    assert "&lt;think&gt;of 8&lt;/think&gt;\nline" in text
    assert "of 2&lt;" not in text, "samples are of the first rollout and of the newest"
    assert "more characters" in text
    assert "<td>2</td><td>3</td><td>2</td><td class=text>entropy: 9.3 nats</td>" in text, "once, with how often it rang"


def test_runs_of_one_kind_are_compared(make: Folder, tiny: Callable[..., Config], tmp_path: Path) -> None:
    one, two = RunFolder.open(make("one")), RunFolder.open(make("two"))
    text = report_page([one, two])
    assert "one: pass@1" in text
    assert "two: pass@1" in text
    assert "Answers to read: two" in text
    trained = RunFolder(tmp_path, "trained", tiny(), one.rows)
    with pytest.raises(ConfigError, match="compare runs of one kind"):
        report_page([one, trained])


def test_a_watch_knows_rewards(make: Folder) -> None:
    out = StringIO()
    watch(make("one"), Console(file=out, width=100), 1.0, once=True)
    said = out.getvalue()
    assert "step 4 of 6, 0:00:06 to go" in said
    assert "zero_variance" in said
    assert "50.0%" in said
