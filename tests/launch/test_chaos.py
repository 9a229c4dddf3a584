"""Ranks are killed at random times, one or all, during starts, steps and saves, and a node's memory is lost with its
ranks; the run must end bitwise equal to one without faults."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from dryvine.launch import spawn as module
from dryvine.launch.spawn import Launch, spawn
from dryvine.trainer import journal
from dryvine.trainer.checkpoint.inspect import compare
from dryvine.trainer.checkpoint.reader import open_checkpoint
from tests.support.quick_ranks import Attempts, QuickRank, kill

TINY = str(Path(__file__).parents[1] / "tiny.toml")
WORLD = 4
LAYOUT = ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe", "model.layers=3", "batch.sequences=8")
PATIENCE = 60.0  # time limit for the condition of the next kill, in seconds


class Chaos(threading.Thread):
    """Kills ranks of a run `kills` times, and counts the kills by kind."""

    def __init__(self, attempts: Attempts, folder: Path, memory: Path, kills: int) -> None:
        """`memory` is the folder that stands for the memory of all nodes."""
        super().__init__(daemon=True)
        self.attempts, self.folder, self.memory, self.kills = attempts, folder, memory, kills
        self.random = random.Random(kills)
        self.moments: Counter[str] = Counter()
        self.reached: dict[int, int] = {}  # the last step of each start that was killed, counted from 1

    def run(self) -> None:
        before: list[QuickRank] = []
        while sum(self.moments.values()) < self.kills:
            ranks = self.attempts.wait_for(WORLD, before, PATIENCE)
            if not ranks:
                return
            before = [*before, *ranks]
            moment = self.random.choice(("start", "step", "save"))
            self._wait_for(moment, ranks)
            how = self.random.choice(("one", "all", "node"))
            if kill({"one": [self.random.choice(ranks)], "all": ranks, "node": ranks[2:]}[how]):
                self.moments[f"{how} in a {moment}"] += 1
                self.reached[len(self._starts())] = self._steps()
            if how == "node":
                for lost in self.memory.glob("*/node-1"):
                    shutil.rmtree(lost, ignore_errors=True)  # the other node's ranks may still be writing there

    def _wait_for(self, moment: str, ranks: list[QuickRank]) -> None:
        until, first = time.monotonic() + PATIENCE, self._steps()
        ahead = self.random.randint(1, 3)
        while time.monotonic() < until and all(rank.poll() is None for rank in ranks):
            if moment == "start" or (moment == "step" and self._steps() >= first + ahead):
                time.sleep(self.random.uniform(0.0, 2.0 if moment == "start" else 0.3))
                return
            if moment == "save" and self._writing():
                time.sleep(self.random.uniform(0.0, 0.02))
                return
            time.sleep(0.001)

    def _writing(self) -> bool:
        return any(self.folder.glob("checkpoints/*.part")) or any(self.memory.glob("*/*/*/checkpoints/*.part"))

    @property
    def replayed(self) -> int:
        """The number of steps that were lost and repeated."""
        return sum(self.reached.get(n, start) - start for n, start in enumerate(self._starts()))

    def _starts(self) -> list[int]:
        """The step after which each attempt began."""
        file = self.folder / "starts.jsonl"
        return [json.loads(line)["after_step"] for line in file.read_text().splitlines()] if file.exists() else []

    def _steps(self) -> int:
        rows = journal.read(self.folder)
        return int(rows[-1]["step"]) if rows else 0


def words(corpus: Path, out: Path, name: str, steps: int, more: tuple[str, ...]) -> tuple[str, ...]:
    settings = (f"run.steps={steps}", f"run.name={name}", "run.checkpoint_every=2", "run.eval_every=1000")
    return (TINY, f'data.source="{corpus}"', f'run.out="{out}"', *settings, *LAYOUT, *more)


def train(monkeypatch: pytest.MonkeyPatch, attempts: Attempts, given: tuple[str, ...], restarts: int = 0) -> int:
    monkeypatch.setattr(module, "_start", attempts.start)
    return spawn(Launch(WORLD, given, deadline=100.0), restarts)


BUDDIES = ("optim.offload=cpu", "run.buddy_every=1", "run.checkpoint_every=7", "comm.topology.nodes=[2,2]")


@pytest.mark.long
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("more", [(), BUDDIES], ids=["storage", "offload and buddies"])
def test_a_run_with_many_kills_equals_an_undisturbed_run(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: Callable[[int, int], int],
    more: tuple[str, ...],
) -> None:
    kills = count(5, 40)
    steps = 2 * kills + 6
    log, memory = str(tmp_path / "log.txt"), tmp_path / "memory"
    memory.mkdir()
    more = (*more, f'run.buddy_folder="{memory}"')
    calm = train(monkeypatch, Attempts(log), words(corpus, tmp_path, "calm", steps, more))
    assert calm == 0, Path(log).read_text()
    attempts = Attempts(log)
    chaos = Chaos(attempts, tmp_path / "chaos", memory, kills)
    chaos.start()
    code = train(monkeypatch, attempts, words(corpus, tmp_path, "chaos", steps, more), restarts=10 * kills)
    chaos.join(2 * PATIENCE)
    said = Path(log).read_text()
    starts = {"starts": len(chaos._starts()), "from memory": said.count("was in memory"), "steps": steps}
    print(json.dumps({"kills": chaos.moments, **starts, "steps played again": chaos.replayed}))
    assert code == 0, said[-4000:]
    assert sum(chaos.moments.values()) == kills
    rows = [journal.read(tmp_path / name) for name in ("calm", "chaos")]
    assert [row["step"] for row in rows[1]] == list(range(1, steps + 1))
    for figure in ("loss", "grad_norm", "mtp_loss", "balance_loss"):
        assert [row[figure] for row in rows[0]] == [row[figure] for row in rows[1]], figure
    found = compare(open_checkpoint(tmp_path / "calm"), open_checkpoint(tmp_path / "chaos"), lambda read: None)
    assert found.alike
    # Each kill loses at most the steps since the last complete save, of which one may be in progress.
    assert chaos.replayed <= kills * 4
    if "run.buddy_every=1" in more:
        assert starts["from memory"] > kills // 2
    assert not list(memory.iterdir()), "what has ended keeps no memory"
