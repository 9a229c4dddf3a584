"""Whether a program passes hidden tests, each run in a sandbox of its own.

Record: `tests`, either of whole programs, {"stdin": ..., "stdout": ...}, or, with `function` beside, of calls,
{"args": [...], "returns": ...}; `seconds` of CPU a test (default 5) and `memory_mb` (default 512) if the problem says
so. The program is the answer's last fenced block. What a test expects never enters the sandbox: the child sees one
test's input, and its output is compared here, all lines and their number, so that neither reading the tests nor
printing the first expected line earns anything. All tests must pass.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dryvine.trainer.rl.verifiers import sandbox
from dryvine.trainer.rl.verifiers.sandbox import Allowed
from dryvine.trainer.rl.verifiers.verdict import Verdict

SECONDS = 120.0  # of the pool's clock
TOGETHER = 60.0  # for all tests; one that began before may end
LONGEST_CPU = 15.0  # a problem may ask for; with TOGETHER and WALL it fits into SECONDS
CALL = Path(__file__).with_name("call.py")
check = sandbox.check
_BLOCK = re.compile(r"^```[^\n`]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def verify(answer: str, problem: Mapping[str, object]) -> Verdict:
    """1 or 0. Raises ValueError where the problem's tests are none, and SandboxError."""
    tests, function, allowed = _tests(problem), problem.get("function"), _allowed(problem)
    blocks = _BLOCK.findall(answer)
    if not blocks:
        return Verdict(0.0, "no fenced block with a program")
    until = time.monotonic() + TOGETHER
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "program.py")
        program.write_text(blocks[-1], encoding="utf-8", errors="replace")
        for number, test in enumerate(tests, 1):
            if time.monotonic() > until:
                return Verdict(0.0, f"test {number} of {len(tests)}: all took more than {TOGETHER:g} s")
            wrong = _called(program, str(function), test, allowed) if function else _printed(program, test, allowed)
            if wrong:
                return Verdict(0.0, f"test {number} of {len(tests)}: {wrong}")
    return Verdict(1.0, f"{len(tests)} tests")


def _printed(program: Path, test: Mapping[str, object], allowed: Allowed) -> str:
    """What is wrong with the program's output for one stdin; "" if nothing is."""
    ran = sandbox.run([program], str(test["stdin"]).encode(), allowed)
    if ran.trouble:
        return ran.trouble
    if len(ran.out) >= allowed.output_bytes:
        return f"printed {allowed.output_bytes} bytes or more"
    return _different(_lines(ran.out.decode(errors="replace")), _lines(str(test["stdout"])))


def _called(program: Path, function: str, test: Mapping[str, object], allowed: Allowed) -> str:
    """What is wrong with what the program's function returns for one list of arguments; "" if nothing is."""
    ran = sandbox.run([CALL, program, function], json.dumps(test["args"]).encode(), allowed)
    if ran.trouble:
        return ran.trouble
    last = ran.out.decode(errors="replace").rstrip("\n").rpartition("\n")[2]
    try:
        returned = json.loads(last)
    except (ValueError, RecursionError):
        return f"returned nothing that is JSON: {last[:60]!r}"
    # As JSON, so that 1, 1.0 and true are three values.
    same = json.dumps(returned, sort_keys=True) == json.dumps(test["returns"], sort_keys=True)
    return "" if same else f"returned {last[:60]}"


def _lines(text: str) -> list[str]:
    """Lines without trailing blanks, and without empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _different(found: list[str], wanted: list[str]) -> str:
    if len(found) != len(wanted):
        return f"printed {len(found)} lines, not {len(wanted)}"
    wrong = next((n for n, (a, b) in enumerate(zip(found, wanted, strict=True), 1) if a != b), 0)
    return f"line {wrong} is {found[wrong - 1][:60]!r}" if wrong else ""


def _tests(problem: Mapping[str, object]) -> list[Mapping[str, object]]:
    tests = problem.get("tests")
    needed = {"args", "returns"} if problem.get("function") else {"stdin", "stdout"}
    if not isinstance(tests, list) or not tests or any(not needed <= set(test) for test in tests):
        raise ValueError(f"the problem's 'tests' must be a list of objects with {' and '.join(sorted(needed))}")
    return tests


def _allowed(problem: Mapping[str, object]) -> Allowed:
    allowed = Allowed()
    seconds, memory = problem.get("seconds", allowed.seconds), problem.get("memory_mb", allowed.memory_mb)
    if not isinstance(seconds, int | float) or not 0 < seconds <= LONGEST_CPU:
        raise ValueError(f"the problem's 'seconds' is {seconds!r}: more than 0 and at most {LONGEST_CPU:g}")
    if not isinstance(memory, int) or memory < 64:
        raise ValueError(f"the problem's 'memory_mb' is {memory!r}: 64 or more")
    return replace(allowed, seconds=seconds, memory_mb=memory)
