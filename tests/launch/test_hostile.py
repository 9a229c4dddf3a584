"""No command line and no config ends in a traceback, hangs, takes the machine's memory, or reaches a shell unquoted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.hostile_cases import Case, cases
from tests.support.launching import environment

ROOT = Path(__file__).parents[2]
FAULT, REFUSED, DIVERGED = 1, 2, 3


def answers(asked: list[Case], folder: Path) -> Iterator[tuple[Case, int, str, str]]:
    """Run them in children of one process, as many at once as there are cores. Yields each, as it ends, with exit code,
    stdout, stderr."""
    lines = "".join(json.dumps({"number": n, "words": case.words}) + "\n" for n, case in enumerate(asked))
    (folder / "asked").write_text(lines)
    env = {**environment(), "PYTHONPATH": str(ROOT)}
    with (
        (folder / "asked").open() as given,
        (folder / "server").open("w+") as said,
        subprocess.Popen(
            [sys.executable, "-m", "tests.spawned.hostile"],
            stdin=given, stdout=subprocess.PIPE, stderr=said, text=True, cwd=folder, env=env,
        ) as server,
    ):  # fmt: skip
        assert server.stdout
        for line in server.stdout:
            answer = json.loads(line)
            yield asked[answer["number"]], answer["code"], answer["out"], answer["err"]
    assert server.returncode == 0, (folder / "server").read_text()


def fault(folder: Path, code: int, out: str, err: str) -> str:
    """What is wrong with an answer; empty if it is a valid run or script, or one line of refusal."""
    if "Traceback" in err or "Traceback" in out:
        return "a traceback"
    if code < 0:
        return f"ended by signal {-code}: too long, or worse"
    if code in (FAULT, REFUSED) and (not err.lstrip().startswith("dryvine") or err.strip().count("\n")):
        return "a refusal that is not one line"
    if "\x1b" in err + out:
        return "control characters of the user's reach the terminal"
    if code not in (0, FAULT, REFUSED, DIVERGED):
        return f"exit code {code}"
    return script_fault(out, folder) if out.startswith("#!") else ""


def script_fault(script: str, folder: Path) -> str:
    """Runs the script with stand-ins for SLURM's commands."""
    tools = folder / "tools"
    if not tools.exists():
        tools.mkdir()
        for name in ("srun", "scancel", "scontrol", "apptainer"):
            (tools / name).write_text("#!/bin/sh\n")
            (tools / name).chmod(0o755)
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n0"}
    done = subprocess.run(["bash"], input=script, env=env, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"a script that fails: {done.stderr[:300]}"
    if list(folder.glob("pwned*")):
        return "a word that the shell ran"
    if (
        sum(line.startswith("#SBATCH") for line in script.splitlines()) > 20
        or "--wrap" in script.partition("\nset -u")[0]
    ):
        return "a directive of the user's"
    return ""


@pytest.mark.long
def test_hostile_configs_and_options(
    corpus: Path, tmp_path: Path, count: Callable[[int, int], int], capsys: pytest.CaptureFixture[str]
) -> None:
    everything = list(cases(corpus, tmp_path))
    assert len(everything) >= 300
    asked = everything[:: max(1, len(everything) // count(90, len(everything)))]
    faults, trained, done, began = [], 0, 0, time.monotonic()
    for done, (case, code, out, err) in enumerate(answers(asked, tmp_path), 1):
        trained += code == 0 and not out.startswith("#!")
        if found := fault(tmp_path, code, out, err):
            faults.append(f"{case.name}: {found}: {err[-300:]}")
        if done % 25 == 0:
            with capsys.disabled():
                print(f"\n{done} of {len(asked)} cases, {len(faults)} faults, {time.monotonic() - began:.0f} s", end="")
    assert done == len(asked)
    assert not faults, f"{len(faults)} of {len(asked)}:\n" + "\n".join(faults)
    print(f"{len(asked)} cases, {trained} of them valid runs, {time.monotonic() - began:.0f} s")
