"""The pool of verifier processes: order, deadlines, deaths, and None apart from 0."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dryvine.launch import spawn
from dryvine.launch.cli import app
from dryvine.launch.spawn import Launch, rank_environment
from dryvine.trainer.__main__ import main
from dryvine.trainer.config import Config, dump
from dryvine.trainer.exit_codes import ExitCode
from dryvine.trainer.rl.tasks.countdown_demos import tokenizer
from dryvine.trainer.rl.verifiers import names
from dryvine.trainer.rl.verifiers.pool import Marking, Pool, VerifierError
from dryvine.trainer.rl.verifiers.verdict import Job, Verdict, weighted
from dryvine.trainer.rl.verifiers.worker import WorkerLimits

SPAWNED = Path(__file__).parents[2] / "spawned"
ODD = """
import os, subprocess, time
from decimal import Decimal
from fractions import Fraction
from dryvine.trainer.rl.verifiers.verdict import Verdict
SECONDS = 1.0
def verify(answer, problem):
    print("noise on stdout")
    match answer:
        case "hang": time.sleep(600)
        case "spin":
            while True: pass
        case "die": os._exit(3)
        case "raise": raise ZeroDivisionError("odd")
        case "huge": return Verdict(1.0, "x" * 10**7)
        case "nan": return Verdict(float("nan"))
        case "word": return Verdict("1")
        case "bytes": return Verdict(b"1")
        case "memory": return Verdict(float(len(bytearray(2 << 30)) > 0))
        case "file":
            with open(problem["path"], "wb") as file: file.write(bytes(2 << 20))
        case "shout": os.write(problem["fd"], b"x" * (1 << 20))
        case "touch": open(problem["path"], "wb").close()
        case "pid": return Verdict(float(os.getpid()))
        case "input": return Verdict(float(input()))
        case "child reads": return Verdict(float(len(subprocess.run(["cat"], stdout=subprocess.PIPE).stdout)))
        case "fork": return Verdict(-1.0 if os.fork() == 0 else 7.0)
        case "leave": raise SystemExit
        case "tensor": return Verdict([1.0])
        case "fraction": return Verdict(Fraction(1, 2))
        case "decimal": return Verdict(Decimal("0.25"))
        case "endless": return Verdict(10**400)
        case "no verdict": return 1.0
        case "no reason": return Verdict(1.0, None)
        case "forge": os.write(problem["fd"], problem["text"].encode() + b"\\n")
    return Verdict(float(answer))
"""


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """A pool with a verifier that does what the answer says; also the test that one file and one line are enough."""
    (tmp_path / "odd.py").write_text(ODD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(names.VERIFIERS, "odd", "odd")
    with Pool(["odd", "format"], 2, WorkerLimits(memory_mb=1024, file_mb=1, answer_chars=1000)) as pool:
        yield pool


def jobs(*answers: str, **problem: object) -> list[Job]:
    return [Job("odd", answer, problem) for answer in answers]


def test_verdicts_are_in_the_order_of_jobs_and_of_both_verifiers(odd: Pool) -> None:
    mixed = [Job("format", "1", {}) if n % 3 == 0 else Job("odd", str(n), {}) for n in range(100)]
    assert [verdict.score for verdict in odd.score(mixed)] == [0.0 if n % 3 == 0 else float(n) for n in range(100)]
    assert odd.score([]) == []


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("hang", "ran past its deadline"),
        ("spin", "ran past its deadline"),
        ("die", "ended"),
        ("raise", "ZeroDivisionError: odd"),
        ("memory", "MemoryError"),
        ("nan", "score was nan"),
        ("word", "score was '1'"),
        ("input", "EOFError"),
        ("leave", "ended"),
        ("bytes", "score was b'1'"),
        ("tensor", "TypeError"),
        ("endless", "OverflowError"),
        ("no verdict", "AttributeError"),
        ("no number", "ValueError"),
    ],
)
def test_what_cannot_be_scored_is_none_and_the_jobs_beside_it_are_scored(odd: Pool, answer: str, why: str) -> None:
    began = time.monotonic()
    verdicts = odd.score(jobs("1", "2", answer, "3", "4"))
    assert [verdict.score for verdict in verdicts] == [1, 2, None, 3, 4]
    assert why in verdicts[2].why
    assert time.monotonic() - began < 60


def test_a_worker_writes_no_large_file_and_replies_no_large_reason(odd: Pool, tmp_path: Path) -> None:
    big = tmp_path / "big"
    verdict, huge = odd.score(jobs("file", "huge", path=str(big)))
    assert verdict.score is None
    assert big.stat().st_size == 1 << 20
    assert huge.score == 1.0
    assert len(huge.why) == 500


def test_what_is_no_verdict_in_the_reply_kills_the_worker(odd: Pool) -> None:
    """File descriptor 4 is the worker's reply: a verifier that finds it cannot send the trainer what it likes."""
    (verdict,) = odd.score(jobs("shout", fd=4))
    assert verdict == Verdict(None, "the verifier's process gave a reply that is no verdict")
    assert odd.score(jobs("1"))[0].score == 1


@pytest.mark.parametrize("text", ['{"score": 1' + "0" * 400 + ', "why": ""}', "[" * 50_000, "[]", '{"why": ""}'])
def test_no_reply_of_a_worker_ends_the_trainer(odd: Pool, text: str) -> None:
    (verdict,) = odd.score(jobs("forge", fd=4, text=text))
    assert verdict == Verdict(None, "the verifier's process gave a reply that is no verdict")
    assert odd.score(jobs("1"))[0].score == 1


def test_a_verifier_that_reads_or_forks_gets_no_job_of_another_answer(odd: Pool) -> None:
    """Jobs lie in the pipe from which a worker reads, and verdicts are told in their order."""
    answers = [str(n) for n in range(100)]
    scores = [float(n) for n in range(100)]
    odd_ones = {10: ("child reads", 0), 11: ("fork", 7), 60: ("fork", 7), 62: ("no reason", 1)}
    for number, (answer, score) in odd_ones.items():
        answers[number], scores[number] = answer, float(score)
    assert [verdict.score for verdict in odd.score(jobs(*answers))] == scores


def test_a_score_may_be_any_number(odd: Pool) -> None:
    assert [verdict.score for verdict in odd.score(jobs("fraction", "decimal"))] == [0.5, 0.25]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("def verify(", "verifier broken: broken raises SyntaxError: '(' was never closed (broken.py, line 1)"),
        ("1 / 0", "verifier broken: broken raises ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "verifier broken: broken raises SystemExit: 3"),
        ("import numqy", "verifier broken: No module named 'numqy'"),
        ("def verify(a, p): pass\ndef check(): raise RuntimeError('install it')", "verifier broken: install it"),
        ("def verfy(answer, problem): pass", "verifier broken: broken has no function verify(answer, problem)"),
        ("SECONDS = 'ten'\ndef verify(a, p): pass", "verifier broken: broken raises ValueError: could not convert"),
        ("SECONDS = 0\ndef verify(a, p): pass", "verifier broken: broken has SECONDS = 0; name a number above 0"),
        ("SECONDS = 1e999\ndef verify(a, p): pass", "verifier broken: broken has SECONDS = inf"),
    ],
)
def test_a_file_that_is_no_verifier_is_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, why: str
) -> None:
    (tmp_path / "broken.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(names.VERIFIERS, "broken", "broken")
    with pytest.raises(VerifierError) as refused:
        Pool(["broken"], 1)
    assert str(refused.value).startswith(why)


def test_workers_killed_from_outside_are_replaced(odd: Pool) -> None:
    for verdict in odd.score(jobs(*["pid"] * 50)):
        assert verdict.score is not None
        with suppress(ProcessLookupError):
            os.kill(int(verdict.score), signal.SIGKILL)
    time.sleep(0.2)
    assert [verdict.score for verdict in odd.score(jobs("1", "2", "3"))] == [1, 2, 3], "they were idle, so none is lost"


def test_jobs_that_share_a_worker_are_each_judged_alone(odd: Pool) -> None:
    """Idle workers get many at once; one that is lost costs its own job, and has its own deadline."""
    answers = [str(n) for n in range(200)]
    for number, bad in ((20, "die"), (60, "hang"), (61, "die"), (150, "raise")):
        answers[number] = bad
    expected = [None if not answer.isdigit() else float(answer) for answer in answers]
    assert [verdict.score for verdict in odd.score(jobs(*answers))] == expected


def test_jobs_are_scored_while_others_are_added(odd: Pool, tmp_path: Path) -> None:
    """Nobody waits for verdicts yet, and a worker has answered; the order stays that of adding."""
    marking, written = Marking(odd), tmp_path / "written"
    (first,) = jobs("touch", path=str(written))
    marking.add(first)
    until = time.monotonic() + 60
    while not written.exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert written.exists()
    for job in jobs(*map(str, range(50))):
        marking.add(job)
    assert [verdict.score for verdict in marking.verdicts()] == [None, *range(50)]


def test_what_is_given_up_is_nobodys_verdict(odd: Pool) -> None:
    """A marking that nobody ends, as of a rollout that fails: the next one has its own verdicts."""
    given_up = Marking(odd)
    for job in jobs(*["7"] * 100):
        given_up.add(job)
    assert [verdict.score for verdict in odd.score(jobs("1", "2", "3"))] == [1, 2, 3]


def test_a_long_answer_is_wrong_and_not_read(odd: Pool) -> None:
    assert odd.score(jobs("1" * 1001)) == [Verdict(0.0, "longer than 1000 characters")]


def test_no_process_is_left_when_the_pool_is_closed(odd: Pool) -> None:
    pids = {int(verdict.score or 0) for verdict in odd.score(jobs(*["pid"] * 20))}
    odd.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_verifier_that_does_not_exist_or_load_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VerifierError, match="no verifier 'maths': there are code"):
        Pool(["maths"])
    monkeypatch.setitem(names.VERIFIERS, "gone", "dryvine.trainer.rl.verifiers.gone")
    with pytest.raises(VerifierError, match="verifier gone: No module named"):
        Pool(["gone"])


def test_rewards_are_weighted_and_none_stays_none() -> None:
    one, half, none = Verdict(1.0), Verdict(0.5), Verdict(None)
    assert weighted({"a": 1.0, "b": 0.2}, {"a": one, "b": half}) == pytest.approx(1.1)
    assert weighted({"a": 1.0, "b": 0.2}, {"a": one, "b": none}) is None
    assert weighted({}, {}) == 0


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["countdown", "<answer>7*5-9</answer>", "--problem", '{"numbers": [7, 5, 9], "target": 26}'], 0, "1: 26,"),
        (["integer", "<answer>4</answer>", "--problem", '{"answer": 5}'], 0, "0: 4, wanted 5"),
        (["integer", "<answer>4</answer>"], 1, "not scored: ValueError: the problem's 'answer' is None"),
        (["integer", "4", "--problem", "[1]"], 2, "--problem '[1]': not an object; write a JSON object"),
        (["maths", "4"], 2, "no verifier 'maths': there are code"),
    ],
)
def test_the_command_shows_a_verdict(words: list[str], code: int, said: str) -> None:
    result = CliRunner().invoke(app, ["check-verifier", *words])
    assert result.exit_code == code
    assert said in result.output


@pytest.fixture
def run_of(tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Config]:
    """A config, written to run.toml, of a run with this verifier."""

    def make(name: str) -> Config:
        tokenizer().save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "questions.jsonl").write_text('{"prompt": "1+4", "answer": 5}\n')
        file = f'"{tmp_path}/questions.jsonl"'
        config = tiny(
            f'rl.chat.tokenizer="{tmp_path}/tokenizer.json"',
            f'rl.task={{name="jsonl", train={file}, validation={file}, verifiers={{{name}=1.0}}}}',
            'data.mask="document"',
            "model.balance_alpha=0.0",
            "rl.max_tokens=4",
        )
        (tmp_path / "run.toml").write_text(dump(config))
        monkeypatch.setattr(os, "environ", dict(os.environ))  # which `main` adds to
        return config

    return make


def test_a_run_whose_verifier_does_not_load_is_refused_before_it_begins(
    run_of: Callable[[str], Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(names.VERIFIERS, "gone", "dryvine.trainer.rl.verifiers.gone")
    config = run_of("gone")
    assert main([str(tmp_path / "run.toml")]) == ExitCode.REFUSED
    assert "verifier gone: No module named" in capsys.readouterr().err
    assert not config.run.folder.exists()


LOSES = """
import os
if os.path.exists(LOST): raise RuntimeError("its server is lost")
def verify(answer, problem):
    open(LOST, "w").close()
    os._exit(3)
"""


@pytest.fixture
def losing(run_of: Callable[[str], Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a run whose verifier "digits" dies of its first answer, and loads no more."""
    (tmp_path / "digits.py").write_text(f"LOST = {str(tmp_path / 'lost')!r}{LOSES}")
    monkeypatch.setitem(names.VERIFIERS, "digits", "digits")
    run_of("digits")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return [str(tmp_path / "run.toml")]


def test_a_verifier_that_no_longer_loads_ends_a_run_in_a_line(
    losing: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(losing) == ExitCode.FAULT
    assert "dryvine: verifier digits: its server is lost" in capsys.readouterr().err


def test_it_ends_a_run_of_several_ranks_in_a_line_too(
    losing: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0, which has the verifiers, tells the other one why."""

    def start(rank: int, launch: Launch, port: int) -> subprocess.Popen[bytes]:
        environment = os.environ | rank_environment(rank, launch.world, port) | {"OMP_NUM_THREADS": "1"}
        with (tmp_path / f"{rank}.txt").open("wb") as log:
            words = [sys.executable, str(SPAWNED / "rl_run.py"), *launch.words]
            return subprocess.Popen(words, env=environment, stderr=log, process_group=0)

    monkeypatch.setattr(spawn, "_start", start)
    assert spawn.spawn(Launch(2, (*losing, "parallel.pp=2"), deadline=100.0)) == ExitCode.FAULT
    zero, one = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert "dryvine: verifier digits: its server is lost" in zero
    assert "Traceback" not in zero
    assert "its server is lost" in one
