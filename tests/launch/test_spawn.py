"""What the launcher makes of the ends of its ranks: exit codes, signals, restarts. Ranks are scripts of a line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dryvine.launch import spawn as module
from dryvine.launch.spawn import Launch, spawn

HANG = "import time; time.sleep(60)"
SAVES = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *a: (time.sleep(0.5), sys.exit(75)));"
    "print('ready', flush=True); time.sleep(60)"
)
DEAF = "import signal, time; signal.signal(signal.SIGTERM, lambda *a: None); time.sleep(60)"
KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
Run = Callable[..., int]


def exits(code: int) -> str:
    return f"import sys; sys.exit({code})"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(scripts, restarts)`: the exit code of ranks that run those scripts."""
    for name, seconds in {"FAILED": 0.5, "REFUSED": 0.2, "UNHURRIED": 1.0, "POLL": 0.02}.items():
        monkeypatch.setattr(module, name, seconds)

    def launch(scripts: Sequence[str], restarts: int = 0) -> int:
        def start(rank: int, launch: Launch, port: int) -> subprocess.Popen[bytes]:
            return subprocess.Popen((sys.executable, "-S", "-c", scripts[rank]), process_group=0)

        monkeypatch.setattr(module, "_start", start)
        return spawn(Launch(len(scripts), (), deadline=2.0), restarts)

    return launch


@pytest.mark.parametrize(
    ("scripts", "code", "said"),
    [
        ((exits(0), exits(0)), 0, ""),
        ((exits(75), exits(75)), 75, ""),
        ((exits(0), exits(75)), 75, ""),
        ((exits(2), HANG), 2, ""),
        ((exits(3), exits(3)), 3, ""),
        ((HANG, exits(1)), 1, "rank 1 failed first, with exit code 1"),
        ((HANG, exits(86)), 1, "rank 1 failed first, with exit code 86"),
        ((KILLED, HANG), 1, "rank 0 was killed by SIGKILL"),
        ((exits(75), HANG), 1, "rank 1 did not end with the others, and was killed"),
    ],
)
def test_the_code_is_what_the_ranks_say(
    run: Run, capfd: pytest.CaptureFixture[str], scripts: tuple[str, ...], code: int, said: str
) -> None:
    assert run(scripts) == code
    assert said in capfd.readouterr().err


def after(seconds: float, *numbers: int) -> None:
    """Send this process signals, one after the other."""

    def send() -> None:
        for number in numbers:
            time.sleep(seconds)
            os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_every_signal_to_stop_waits_for_the_save(run: Run, number: int) -> None:
    after(1.0, number)
    assert run((SAVES, SAVES)) == 75


def test_signals_while_ranks_save_do_not_end_them(run: Run) -> None:
    after(1.0, signal.SIGTERM)
    after(1.2, signal.SIGHUP)
    assert run((SAVES, SAVES)) == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_ranks_can_save_ends_at_once_and_not_with_0(
    run: Run, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    after(0.5, number)
    assert run((HANG, HANG)) == 128 + number
    assert time.monotonic() - started < 3
    assert f"stopped by {signal.Signals(number).name} before all ranks had saved" in capfd.readouterr().err


def test_one_rank_that_saved_is_not_a_run_that_saved(run: Run) -> None:
    after(1.0, signal.SIGTERM)
    assert run((SAVES, HANG)) == 128 + signal.SIGTERM


def test_a_rank_gets_the_deadline_to_save_and_no_more(run: Run) -> None:
    started = time.monotonic()
    after(0.5, signal.SIGTERM)
    assert run((DEAF, DEAF)) == 128 + signal.SIGTERM
    assert 3.4 < time.monotonic() - started < 10


def test_a_second_ctrl_c_does_not_wait(run: Run) -> None:
    started = time.monotonic()
    after(0.5, signal.SIGINT, signal.SIGINT)
    assert run((DEAF, DEAF)) == 128 + signal.SIGINT
    assert time.monotonic() - started < 3


def counting(path: Path, codes: Sequence[int]) -> str:
    """A script that ends with the next of `codes` each time it runs."""
    return (
        f"import sys; f = open({str(path)!r}, 'a+'); f.seek(0); n = len(f.read()); f.write('x');"
        f"f.close(); sys.exit({list(codes)!r}[n])"
    )


@pytest.mark.parametrize(
    ("codes", "restarts", "code", "attempts"),
    [
        ((1, 86, 0), 5, 0, 3),  # a fault is started again, a finished run is not
        ((1, 1, 1, 0), 2, 1, 3),
        ((1, 0), 0, 1, 1),
        ((2, 0), 5, 2, 1),
        ((3, 0), 5, 3, 1),
        ((75, 0), 5, 75, 1),
    ],
)
def test_only_faults_are_started_again(
    run: Run, tmp_path: Path, codes: tuple[int, ...], restarts: int, code: int, attempts: int
) -> None:
    assert run((counting(tmp_path / "attempts", codes),), restarts) == code
    assert len((tmp_path / "attempts").read_text()) == attempts


def test_a_signal_ends_a_run_that_restarts(run: Run) -> None:
    after(1.0, signal.SIGTERM)
    assert run((SAVES,), restarts=9) == 75
