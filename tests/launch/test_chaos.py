"""Ranks are killed at random moments, one or all, in starts, steps and saves; the run must end as if nobody had."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from dryvine.launch import spawn as module
from dryvine.launch.spawn import Launch, spawn
from dryvine.trainer import journal
from dryvine.trainer.checkpoint import run_folder
from dryvine.trainer.checkpoint.inspect import compare
from dryvine.trainer.checkpoint.reader import open_checkpoint
from tests.support.quick_ranks import Lives, QuickRank, kill

TINY = str(Path(__file__).parents[1] / "tiny.toml")
WORLD = 4
LAYOUT = ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe", "model.layers=3", "batch.sequences=8")
PATIENCE = 60.0  # seconds in which the moment for a kill must come


class Chaos(threading.Thread):
    """Kills the ranks of a run `kills` times and counts."""

    def __init__(self, lives: Lives, folder: Path, kills: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.lives, self.folder, self.kills = lives, folder, kills
        self.random = random.Random(seed)
        self.moments: Counter[str] = Counter()
        self.replayed = 0  # steps that were lost and are played again

    def run(self) -> None:
        before: list[QuickRank] = []
        while sum(self.moments.values()) < self.kills:
            ranks = self.lives.wait_for(WORLD, before, PATIENCE)
            if not ranks:
                return
            before = [*before, *ranks]
            moment = self.random.choice(("start", "step", "save"))
            self._wait_for(moment, ranks)
            how = self.random.choice(("one", "all"))
            if kill(ranks if how == "all" else [self.random.choice(ranks)]):
                self.moments[f"{how} in a {moment}"] += 1
                newest = run_folder.newest(self.folder)
                self.replayed += self._steps() - (run_folder.step_of(newest) if newest else 0)

    def _wait_for(self, moment: str, ranks: list[QuickRank]) -> None:
        until, first = time.monotonic() + PATIENCE, self._steps()
        ahead = self.random.randint(1, 3)
        while time.monotonic() < until and all(rank.poll() is None for rank in ranks):
            if moment == "start" or (moment == "step" and self._steps() >= first + ahead):
                time.sleep(self.random.uniform(0.0, 2.0 if moment == "start" else 0.3))
                return
            if moment == "save" and list((self.folder / "checkpoints").glob("*.part")):
                time.sleep(self.random.uniform(0.0, 0.02))
                return
            time.sleep(0.001)

    def _steps(self) -> int:
        rows = journal.read(self.folder)
        return int(rows[-1]["step"]) if rows else 0


def words(corpus: Path, out: Path, name: str, steps: int) -> tuple[str, ...]:
    settings = (f"run.steps={steps}", f"run.name={name}", "run.checkpoint_every=2", "run.eval_every=1000")
    return (TINY, f'data.source="{corpus}"', f'run.out="{out}"', *settings, *LAYOUT)


def train(monkeypatch: pytest.MonkeyPatch, lives: Lives, given: tuple[str, ...], restarts: int = 0) -> int:
    monkeypatch.setattr(module, "_start", lives.start)
    return spawn(Launch(WORLD, given, deadline=100.0), restarts)


@pytest.mark.long
@pytest.mark.timeout(5400)
def test_a_run_that_is_killed_again_and_again_is_the_run_that_was_not(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: Callable[[int, int], int]
) -> None:
    kills = count(5, 40)
    steps = 2 * kills + 6
    log = str(tmp_path / "log.txt")
    assert train(monkeypatch, Lives(log), words(corpus, tmp_path, "calm", steps)) == 0, Path(log).read_text()
    lives = Lives(log)
    chaos = Chaos(lives, tmp_path / "chaos", kills, seed=kills)
    chaos.start()
    code = train(monkeypatch, lives, words(corpus, tmp_path, "chaos", steps), restarts=10 * kills)
    chaos.join(2 * PATIENCE)
    print(json.dumps({"kills": chaos.moments, "steps": steps, "steps played again": chaos.replayed}))
    assert code == 0, Path(log).read_text()[-4000:]
    assert sum(chaos.moments.values()) == kills
    calm, disturbed = (journal.read(tmp_path / name) for name in ("calm", "chaos"))
    assert [row["step"] for row in disturbed] == list(range(1, steps + 1))
    for figure in ("loss", "grad_norm", "mtp_loss", "balance_loss"):
        assert [row[figure] for row in disturbed] == [row[figure] for row in calm], figure
    found = compare(open_checkpoint(tmp_path / "calm"), open_checkpoint(tmp_path / "chaos"), lambda read: None)
    assert found.alike
    # At most one interval is lost each time: the steps since the save before, and one that was not yet written.
    assert chaos.replayed <= kills * 4
