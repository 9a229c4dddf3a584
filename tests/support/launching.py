"""A small run as launchers start it: its words, and what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TINY = str(Path(__file__).parents[1] / "tiny.toml")
DUALPIPE = ("parallel.pp=2", "parallel.schedule=dualpipe")
BIN = Path(sys.executable).parent
MODULE = ("-m", "dryvine.trainer")


def words(corpus: Path, out: Path, *more: str) -> tuple[str, ...]:
    """TINY on two pipeline ranks for two steps, and its overrides."""
    return TINY, *DUALPIPE, f'data.source="{corpus}"', f'run.out="{out}"', "run.steps=2", *more


def environment(**more: str) -> dict[str, str]:
    """One thread a rank, as sums have the same bits only then; no launcher's names are inherited."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PMI_", "OMPI_"))}
    return {**clean, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}", **more}


def together(commands: Sequence[Sequence[str]], env: dict[str, str], deadline: float = 280) -> list[tuple[int, str]]:
    """Run commands at once. Returns the exit code and output of each."""
    started = [
        subprocess.Popen(each, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        for each in commands
    ]
    try:
        printed = [process.communicate(timeout=deadline)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, printed, strict=True)]


def losses(folder: Path) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["loss"], row["grad_norm"]) for row in rows]
