"""Runs hostile command lines, each in a child of this process with 2 GiB of address space, 20 s of processor time, and
two minutes by the clock, as machines may be busy. As many at once as there are cores.

Reads {"number", "words"} lines from stdin and writes {"number", "code", "out", "err"} lines as children end, in any
order; code is -N where signal N ended the child. Children are forked with torch imported, which takes each of them
seconds otherwise.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

from dryvine.launch.cli import main

SECONDS, BY_THE_CLOCK, BYTES = 20, 120, 2 << 30


def child(words: list[str], out: Path, err: Path) -> NoReturn:
    """The command line, as this process from here on."""
    os.setpgid(0, 0)
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
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


class Running(NamedTuple):
    """A child's case, and where it writes."""

    number: int
    out: Path
    err: Path

    def answer(self, status: int) -> str:
        out, err = (file.read_text(errors="replace") for file in (self.out, self.err))
        return json.dumps({"number": self.number, "code": os.waitstatus_to_exitcode(status), "out": out, "err": err})


def serve(folder: Path, at_once: int) -> None:
    children: dict[int, Running] = {}

    def answer() -> None:
        pid, status = os.wait()
        print(children.pop(pid).answer(status), flush=True)

    for line in sys.stdin:
        case = json.loads(line)
        if len(children) == at_once:
            answer()
        running = Running(case["number"], folder / f"{case['number']}.out", folder / f"{case['number']}.err")
        if pid := os.fork():
            children[pid] = running
        else:
            child(case["words"], running.out, running.err)
    while children:
        answer()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        serve(Path(folder), len(os.sched_getaffinity(0)))
