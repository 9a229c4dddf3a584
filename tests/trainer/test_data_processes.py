"""Builds over several processes: the same bytes, however many there are and however often they are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dryvine.trainer.data import encoded, encoding_process, stream, tokenizer
from dryvine.trainer.data.build import build
from dryvine.trainer.data.config import DataError
from dryvine.trainer.data.encoding import ItemText, TextPart
from dryvine.trainer.data.inputs import match_files
from dryvine.trainer.data.spec import BuildSpec
from dryvine.trainer.data.tokenizer import learn_tokenizer
from tests.support.built import contents, corpus

SPEC = {"vocab_size": 300, "shard_tokens": 2500, "validation_fraction": 0.3, "fim_rate": 0.3}


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_makes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setattr(stream, "BATCH_BYTES", 800)
    (tmp_path / "in").mkdir()
    inputs = match_files(corpus(tmp_path / "in"))
    build(inputs, BuildSpec(**SPEC), tmp_path / "one")
    places: list[int] = []
    build(inputs, BuildSpec(**SPEC), tmp_path / "many", lambda *said: places.append(said[1]), processes=processes)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert places == sorted(places[: len(places) // 2]) + places[len(places) // 2 :]


def test_a_process_that_is_killed_ends_the_build_with_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BATCH_BYTES", 800)
    (tmp_path / "in").mkdir()
    inputs, workers = match_files(corpus(tmp_path / "in")), list[encoded._Worker]()
    in_turn = encoded._in_turn
    monkeypatch.setattr(encoded, "_in_turn", lambda batches, found: workers.extend(found) or in_turn(batches, found))

    def kill(stage: str, done: int, total: int) -> None:
        if stage == "tokenizing" and workers[1].process.poll() is None:
            assert os.getpgid(workers[1].process.pid) != os.getpgid(0), "Ctrl-C is for the build alone"
            os.kill(workers[1].process.pid, signal.SIGKILL)

    with pytest.raises(DataError, match=r"exit code -9 .*fewer --processes"):
        build(inputs, BuildSpec(**SPEC), tmp_path / "out", kill, processes=2)
    assert all(worker.process.poll() is not None for worker in workers)
    build(inputs, BuildSpec(**SPEC), tmp_path / "out", processes=2)
    build(inputs, BuildSpec(**SPEC), tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_error_in_a_process_is_raised_in_the_build_and_its_end_is_told(tmp_path: Path) -> None:
    """Of a tokenizing process: whether it fails at a text, answers afterwards, or ends with nothing left to read."""
    save = tmp_path / "tokenizer.json"
    learn_tokenizer(["some words"], 300).save(str(save))
    plan = encoded._Plan(BuildSpec(tokenizer=save), tokenizer.load(save))
    whole = ItemText((TextPart(None, "some"),), 0)
    with encoded._worker(plan) as worker:
        worker.send([ItemText((TextPart(None, None),), 0)])  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            worker.receive()
        worker.send([whole])
        (found,) = worker.receive()
        assert found[-1] == 0
        worker.process.kill()
        with pytest.raises(DataError, match=r"ended with exit code -9"):
            worker.receive()


def test_modules_in_the_users_folder_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m` would look for modules in the folder that a user happens to be in."""
    (tmp_path / "a.txt").write_text("some words\n" * 50)
    (tmp_path / "queue.py").write_text("raise SystemExit('a module of the user')")
    monkeypatch.chdir(tmp_path)
    spec = BuildSpec(vocab_size=300, validation_fraction=0)
    assert build(match_files(["a.txt"]), spec, Path("out"), processes=2).train.documents == 1


def test_a_call_gets_texts_until_they_are_long_enough() -> None:
    """Nothing else bounds what `tokenizers` keeps of a batch; an item without text is in a call, too."""
    texts = [
        ItemText((TextPart(None, "x" * size),) if size else (), None) for size in (60_000, 0, 80_000, 5, 200_000, 7)
    ]
    calls = [*encoding_process._calls(texts)]
    assert [len(call) for call in calls] == [3, 2, 1]
    assert [text for call in calls for text in call] == texts


BUILD = """
import sys
from pathlib import Path
from dryvine.trainer.data import stream
from dryvine.trainer.data.build import build
from dryvine.trainer.data.inputs import match_files
from dryvine.trainer.data.spec import BuildSpec
if __name__ == "__main__":
    stream.BATCH_BYTES = 2000
    build(match_files(sys.argv[2:]), BuildSpec(**%r), Path(sys.argv[1]), processes=2)
"""


@pytest.mark.long
def test_a_build_killed_at_random_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: Callable[[int, int], int]
) -> None:
    """SIGKILL after a random time; nothing that the build started outlives it."""
    (tmp_path / "in").mkdir()
    patterns = corpus(tmp_path / "in", texts=400)
    (tmp_path / "build.py").write_text(BUILD % SPEC)
    command = [sys.executable, str(tmp_path / "build.py"), str(tmp_path / "killed"), *patterns]
    draw, kills, longest = random.Random(0), 0, 2.0
    while kills < count(4, 30):
        process = subprocess.Popen(command, start_new_session=True)
        try:
            process.wait(draw.uniform(0.2, longest))
            assert process.returncode == 0
            longest *= 0.8  # it finished: kill earlier, and build anew
            subprocess.run(["rm", "-r", str(tmp_path / "killed")], check=True)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            longest *= 1.1
        _wait_until_gone(process.pid)
    assert subprocess.run(command, check=False).returncode == 0
    monkeypatch.setattr(stream, "BATCH_BYTES", 2000)
    build(match_files(patterns), BuildSpec(**SPEC), tmp_path / "whole")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def _wait_until_gone(session: int) -> None:
    """Raises AssertionError if processes of the session are left after 20 s."""
    for _ in range(200):
        found = subprocess.run(["ps", "-o", "pid=", "-s", str(session)], capture_output=True, text=True, check=False)
        if not found.stdout.strip():
            return
        time.sleep(0.1)
    raise AssertionError(f"left: {found.stdout}")
