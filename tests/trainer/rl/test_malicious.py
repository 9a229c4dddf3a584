"""None of 200 malicious answers and programs scores, escapes, hangs or harms the pool.

`make prove ONLY=tests/trainer/rl/test_malicious.py` runs them all, `make test-long` every fourth.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dryvine.trainer.rl.verifiers.pool import Pool
from dryvine.trainer.rl.verifiers.verdict import Job
from tests.support.malicious import ANSWERS, CALLS, PROGRAMS, SECRET, Answer
from tests.support.sandbox import needs_sandbox, sandboxed, wait_until_none

VERIFIERS = ("code", "countdown", "format", "instructions", "integer", "language", "math", "reasoning_gym")
SLACK = 15.0  # seconds beside a verifier's own deadline, on a busy machine
Count = Callable[[int, int], int]


@dataclass
class Host:
    """What programs try to reach: a file, a listener on loopback, a socket of the abstract namespace."""

    file: Path
    port: int
    socket: str
    reached: list[str]

    def filled(self, source: str) -> str:
        source = source.replace("{file}", str(self.file)).replace("{port}", str(self.port))
        return source.replace("{socket}", self.socket).replace("{{", "{").replace("}}", "}")


def serve(listener: socket.socket, host: Host, name: str) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection:
            host.reached.append(name)
            connection.sendall(f"HTTP/1.0 200 OK\r\n\r\n{SECRET}\n".encode() if name == "port" else SECRET.encode())


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    file = tmp_path / "secret.txt"
    file.write_text(SECRET)
    file.chmod(0o666)
    monkeypatch.setenv("MALICIOUS_SECRET", SECRET)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as abstract:
        made = Host(file, listener.getsockname()[1], f"malicious-{secrets.token_hex(8)}", [])
        abstract.bind("\0" + made.socket)
        abstract.listen()
        for one, name in ((listener, "port"), (abstract, "socket")):
            threading.Thread(target=serve, args=(one, made, name), daemon=True).start()
        yield made
        for one in (listener, abstract):
            one.shutdown(socket.SHUT_RDWR)


def cases(host: Host) -> list[Job]:
    program = {"tests": [{"stdin": "go", "stdout": SECRET}], "seconds": 0.5, "memory_mb": 256}
    call = program | {"function": "f", "tests": [{"args": [1], "returns": SECRET}]}
    jobs = [Job("code", f"```\n{host.filled(source)}\n```", program) for source in PROGRAMS.values()]
    jobs += [Job("code", f"```\n{host.filled(source)}\n```", call) for source in CALLS.values()]
    return jobs + [Job(one.verifier, filled(one, host), one.problem) for one in ANSWERS]


def filled(answer: Answer, host: Host) -> str:
    return answer.text.replace("{file}", str(host.file))


GOOD = [
    Job("code", f"```\nprint('{SECRET}')\n```", {"tests": [{"stdin": "", "stdout": SECRET}]}),
    Job("countdown", "<answer>3*7+5</answer>", {"numbers": [3, 5, 7], "target": 26}),
    Job("math", r"\boxed{5}", {"answer": "5"}),
]


@needs_sandbox
@pytest.mark.long
def test_nothing_malicious_scores_escapes_or_hangs(host: Host, count: Count) -> None:
    pytest.importorskip("math_verify")
    pytest.importorskip("reasoning_gym")
    jobs, before = cases(host), set(sandboxed())
    assert len(jobs) >= 200
    unscored, slowest = 0, 0.0
    with Pool(VERIFIERS, 2) as pool:
        for number, job in enumerate(jobs[:: count(4, 1)]):
            began = time.monotonic()
            (verdict,) = pool.score([job])
            took = time.monotonic() - began
            where = f"{number}: {job.verifier} {job.answer[:200]!r}: {verdict}"
            assert verdict.score in (0.0, None), where
            assert SECRET not in verdict.why, where
            assert took < min(pool.seconds[job.verifier], 15.0) + SLACK, where
            unscored, slowest = unscored + (verdict.score is None), max(slowest, took)
        good = pool.score(GOOD)
    assert [verdict.score for verdict in good] == [1.0] * len(GOOD), good
    print(f"{len(jobs[:: count(4, 1)])} cases, {unscored} not scored, slowest {slowest:.1f} s")
    assert host.reached == []
    assert host.file.read_text() == SECRET
    assert sorted(path.name for path in host.file.parent.iterdir()) == [host.file.name]
    assert not Path("/malicious").exists()
    assert not Path("/tmp/malicious").exists()
    wait_until_none(set(sandboxed()) - before)


@pytest.mark.parametrize("name", ["read the file", "connect", "an abstract socket", "the environment", "a path up"])
def test_without_the_sandbox_they_would(host: Host, name: str, tmp_path: Path) -> None:
    """The programs do what they are meant to, so that their failing inside says something."""
    source = host.filled(PROGRAMS[name])
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", source],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert SECRET in done.stdout, done.stderr
    assert os.environ["MALICIOUS_SECRET"] == SECRET
