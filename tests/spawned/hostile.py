"""Runs hostile command lines, each in a child of this process with 2 GiB of address space, 20 s of processor time, and
a minute by the clock, as machines may be busy.

Reads {"name", "words"} lines from stdin and writes {"name", "code", "out", "err"} lines; code is -N where signal N
ended the child. Children are forked with torch imported, which takes each of them seconds otherwise.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
from typing import IO, NoReturn

import torch

from dryvine.launch.cli import main

SECONDS, BY_THE_CLOCK, BYTES = 20, 60, 2 << 30


def child(words: list[str], out: IO[bytes], err: IO[bytes]) -> NoReturn:
    """The command line, as this process from here on."""
    os.setpgid(0, 0)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    signal.alarm(BY_THE_CLOCK)
    sys.argv = ["dryvine", *words]
    code: int | str | None = 0
    try:
        main()
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def run(words: list[str]) -> dict[str, object]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            child(words, out, err)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        return {"code": code, "out": out.read().decode(errors="replace"), "err": err.read().decode(errors="replace")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        case = json.loads(line)
        print(json.dumps({"name": case["name"], **run(case["words"])}), flush=True)
