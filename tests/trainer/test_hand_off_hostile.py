"""Files that somebody has tampered with, or a disk has: refused by name, in bounded memory and time, with no pickle."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dryvine.trainer.hand_off.commands import ExportAs, export_run
from tests.support.hand_off import quiet, run_of, small

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited by Linux's RLIMIT_AS")
@pytest.mark.parametrize(("kind", "reduced", "full"), [("hf", 18, 150), ("gguf", 10, 50)])
def test_mutated_files_are_refused_by_name(
    kind: str, reduced: int, full: int, count: Callable[[int, int], int], tmp_path: Path
) -> None:
    run = run_of(small(), tmp_path / "run")
    ways = ExportAs(kind, dtype="bf16", quant="f32", shard_bytes=90_000)
    export_run(run, tmp_path / "export", ways, quiet)
    turns = count(reduced, full)
    words = ["-m", "tests.spawned.hand_off_hostile", kind, str(tmp_path / "run"), str(tmp_path / "export"), str(turns)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == turns
    for row in rows:
        # A config.json whose max_position is another still has these weights: only what is taken must be the same.
        assert row["said"] == "the same weights" or row["file"].split("-")[0] in row["said"], row
        assert row["seconds"] < 20, row
    refused = sum(row["said"] != "the same weights" for row in rows)
    print(f"{kind}: {refused} of {turns} mutations refused, slowest {max(row['seconds'] for row in rows):.1f} s")
    assert refused >= turns * 0.7
