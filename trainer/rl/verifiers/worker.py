"""One process of the pool: a job a line on stdin, its verdict a line on stdout. Arguments: modules and limits as JSON.

Lines are JSON and not pickles: whoever takes over this process through an answer must not reach the trainer by its
reply. What verifiers print goes nowhere, and where they or their children read, nothing comes: jobs and verdicts have
descriptors of their own, or a verifier that asks for input would take the next job, and every verdict behind it would
be another answer's. Limits hold for the worker and, since children inherit them, for all below it; the wall clock is
the pool's, outside.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import resource
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import TextIO

from dryvine.comm.extras import lacking
from dryvine.trainer.rl.verifiers.verdict import SECONDS, Verdict

WHY_LONGEST = 500  # characters of a verdict's reason


@dataclass(frozen=True)
class WorkerLimits:
    """Of one verifier process. Its wall clock is its verifier's SECONDS."""

    memory_mb: int = 4096  # of address space
    file_mb: int = 64  # of any file it writes
    files: int = 64  # open at a time
    answer_chars: int = 200_000  # longer answers are not read


class CannotLoad(Exception):
    """A verifier whose module cannot be used: which, and why."""


def main() -> None:
    files, limits = json.loads(sys.argv[1]), WorkerLimits(**json.loads(sys.argv[2]))
    jobs, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    _limit(limits)
    try:
        modules = {name: _loaded(name, file) for name, file in files.items()}
    except CannotLoad as error:
        _reply(replies, {"error": str(error)})
        return
    os.dup2(nowhere, 2)  # libraries log answers, which terminals may act on
    _reply(replies, {name: _seconds(module) for name, module in modules.items()})
    own = os.getpid()
    for line in jobs:
        job = json.loads(line)
        module = modules[job["verifier"]]
        _limit_cpu(_seconds(module))
        verdict = _verdict(module, job["answer"], job["problem"])
        if os.getpid() != own:
            os._exit(0)  # a child that the verifier forked, and that came back: its parent replies
        _reply(replies, asdict(verdict))


def _loaded(name: str, file: str) -> ModuleType:
    """Raises CannotLoad. What a user's file may raise is anything."""
    try:
        module = importlib.import_module(file)
        getattr(module, "check", lambda: None)()
        seconds = _seconds(module)
    except ImportError as error:
        raise CannotLoad(f"verifier {name}: {lacking(error)}") from None
    except RuntimeError as error:
        raise CannotLoad(f"verifier {name}: {error}") from None
    except (Exception, SystemExit) as error:
        raise CannotLoad(f"verifier {name}: {file} raises {type(error).__name__}: {error}") from None
    if not callable(getattr(module, "verify", None)):
        raise CannotLoad(f"verifier {name}: {file} has no function verify(answer, problem)")
    if not 0 < seconds < math.inf:
        raise CannotLoad(f"verifier {name}: {file} has SECONDS = {seconds:g}; name a number above 0")
    return module


def _verdict(module: ModuleType, answer: str, problem: Mapping[str, object]) -> Verdict:
    try:
        verdict = module.verify(answer, problem)
        score = verdict.score
        if isinstance(score, str | bytes | bytearray):  # float() would read them
            raise TypeError(f"the verifier's score was {score!r}, and not a number")
        return Verdict(None if score is None else float(score), str(verdict.why)[:WHY_LONGEST])
    except Exception as error:  # a verifier's fault is no answer's fault
        return Verdict(None, f"{type(error).__name__}: {error}"[:WHY_LONGEST])


def _seconds(module: ModuleType) -> float:
    return float(getattr(module, "SECONDS", SECONDS))


def _limit(limits: WorkerLimits) -> None:
    for what, most in (
        (resource.RLIMIT_AS, limits.memory_mb << 20),
        (resource.RLIMIT_FSIZE, limits.file_mb << 20),
        (resource.RLIMIT_NOFILE, limits.files),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def _limit_cpu(seconds: float) -> None:
    """Limit this process's CPU time from now on. The pool's wall clock ends a job earlier; this ends a worker whose
    pool is gone."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = int(used.ru_utime + used.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _reply(replies: TextIO, value: object) -> None:
    print(json.dumps(value), file=replies, flush=True)


if __name__ == "__main__":
    main()
