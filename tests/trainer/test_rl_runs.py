"""Whole runs of reinforcement learning: in layouts, and killed at random moments."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dryvine.comm import local
from dryvine.trainer.checkpoint.manifest import read_manifest
from dryvine.trainer.config import Config
from dryvine.trainer.rig import mesh_of
from dryvine.trainer.rl.loop import reinforce
from dryvine.trainer.rl.tasks.countdown_demos import tokenizer
from dryvine.trainer.rl.verifiers.names import VERIFIERS
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.run_rows import Figures, read
from dryvine.trainer.sources import open_sources

Tiny = Callable[..., Config]
TESTS = Path(__file__).resolve().parents[1]
# What does not depend on the clock.
COMPARED = ("step", "reward", "length", "loss", "grad_norm", "entropy", "reference_k3", "mismatch_k3", "eval_pass_1")


@pytest.fixture
def words(tmp_path: Path, corpus: Path) -> list[str]:
    """Overrides of the tiny config: answers are worth their digits."""
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    lines = "".join(json.dumps({"prompt": f"{n}+{7 - n}"}) + "\n" for n in range(7))
    (tmp_path / "questions.jsonl").write_text(lines)
    questions = f"{tmp_path}/questions.jsonl"
    return [
        f'data.source="{corpus}"', f'run.out="{tmp_path}"', f'rl.chat.tokenizer="{tmp_path}/tokenizer.json"',
        f'rl.task={{name="jsonl", train="{questions}", validation="{questions}", verifiers={{digits=1.0}}}}',
        'data.mask="document"', "model.balance_alpha=0.0", "rl.questions=4", "rl.samples=4", "rl.max_tokens=4",
        "rl.eval_problems=2", "rl.eval_samples=2", "run.steps=3", "run.eval_every=2", "optim.lr=1e-2",
        "rl.loss.kl=0.01", "rl.reference_every=4", "run.checkpoint_every=2",
    ]  # fmt: skip


def rank(_: int, config: Config) -> list[Figures]:
    """For `local.run`."""
    VERIFIERS["digits"] = "digits"
    os.environ["PYTHONPATH"] = str(TESTS / "spawned")
    plan = make_plan(config)
    assert reinforce(plan, mesh_of(plan, torch.device("cpu")), open_sources(config))
    return read(config.run.folder)


@pytest.mark.parametrize("ahead", [pytest.param("false", marks=pytest.mark.long), "true"])
def test_a_layout_samples_scores_and_learns_like_one_process(
    tiny: Tiny, words: list[str], monkeypatch: pytest.MonkeyPatch, ahead: str
) -> None:
    words = [*words, f"rl.ahead={ahead}"]
    monkeypatch.setitem(VERIFIERS, "digits", "digits")
    monkeypatch.setenv("PYTHONPATH", str(TESTS / "spawned"))
    alone = rank(0, tiny(*words, 'run.name="alone"'))
    layout = ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe", 'run.name="dualpipe"')
    rows = local.run(rank, 4, tiny(*words, *layout), deadline=200)[0]
    assert len(rows) == len(alone) == 4
    for one, other in zip(alone, rows, strict=True):
        assert other["step"] == one["step"]
        assert other.keys() == one.keys()
        for name in COMPARED[1:6] if one["step"] else ():
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


def _rows(folder: Path) -> int:
    return len(read(folder)) if (folder / "metrics.jsonl").exists() else 0


def _last_seconds(folder: Path) -> float:
    """That the last rollout took."""
    row = read(folder)[-1]
    return sum(row.get(f"seconds_{part}") or 0.0 for part in ("sample", "score", "learn"))


@pytest.mark.long
@pytest.mark.parametrize("ahead", ["false", "true"])
def test_a_run_that_is_killed_at_random_moments_ends_in_the_same_bits(
    words: list[str], tmp_path: Path, count: Callable[[int, int], int], ahead: str
) -> None:
    """Each in the middle of another rollout; with `rl.ahead` the next one is under way in a thread."""
    kills = count(2, 10)
    steps = 2 * (kills + 2)
    more = [f"run.steps={steps}", "run.checkpoint_every=2", "run.eval_every=8", "rl.minibatches=2", f"rl.ahead={ahead}"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS / "spawned")}

    def start(name: str) -> subprocess.Popen[bytes]:
        script = [sys.executable, str(TESTS / "spawned" / "rl_run.py"), str(TESTS / "tiny.toml")]
        return subprocess.Popen(
            [*script, *words, *more, f'run.name="{name}"'], env=environment, stdout=subprocess.DEVNULL
        )

    assert start("whole").wait(300) == 0
    draw, row_seconds = random.Random(4), 0.0
    for kill in range(kills):
        process, deadline = start("killed"), time.monotonic() + 300
        # Its row is written; what follows is the next rollout, or the checkpoint of this one.
        while _rows(tmp_path / "killed") < kill + 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        row_seconds = max(row_seconds, _last_seconds(tmp_path / "killed"))
        time.sleep(draw.uniform(0, 0.9) * row_seconds)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start("killed").wait(300) == 0
    rows = [[{k: row.get(k) for k in COMPARED} for row in read(tmp_path / name)] for name in ("whole", "killed")]
    assert rows[0] == rows[1]
    paths = [tmp_path / name / "checkpoints" / f"step-{steps:08}" for name in ("whole", "killed")]
    sums = [{(t.name, t.first, t.field): t.checksum for t in read_manifest(path).tensors} for path in paths]
    assert sums[0] == sums[1]
    assert ("rl.asked", 0, "buffer") in sums[0]
