"""A run of any size played in one process, without torch."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from dryvine.launch.dry_run import RankPlace, dry_run
from dryvine.launch.plan.hardware import load_hardware
from dryvine.launch.plan.plan import make
from dryvine.trainer.config import Config, ConfigError
from dryvine.trainer.run_plan import make_plan

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 2 << 30


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))


def test_2048_ranks_of_671b_in_one_process_of_2_gb_and_60_seconds() -> None:
    """Seconds of the processor, since the machine of a test may be busy."""
    code = "import sys; sys.modules['torch'] = None; from dryvine.launch.cli import main; main()"
    words = ["train", "configs/deepseek_v3_671b.toml", "--dry-run", "--rank", "1357"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=280, preexec_fn=limited
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "23 batch sizes, 4,096 to 15,360 sequences; each built, checked and lowered" in said
    assert "rank 1357: pipeline rank 10 of 16, data rank 1 of 2, expert rank 13 of 64; GPU 5 of node 169" in said
    assert "experts 52 to 55 of every MoE layer; all-to-all over ranks 1344 to 1407 by hierarchical" in said
    assert "pipeline messages with rank 1229 and 1485" in said
    assert "stage 5: layers.20 to layers.23" in said


def test_places_are_those_of_the_mesh(tiny: Callable[..., Config]) -> None:
    config = tiny("parallel.pp=2", "parallel.dp=3", "parallel.ep=2", "batch.sequences=48")
    assert [RankPlace.of(rank, config)[1:] for rank in range(12)] == [
        (pp, dp, ep) for pp in range(2) for dp in range(3) for ep in range(2)
    ]
    assert RankPlace.of(3, config).at(1, config) == 9
    with pytest.raises(ConfigError, match="ranks 0 to 11"):
        RankPlace.of(12, config)


def test_a_ranks_node_is_that_of_the_config(tiny: Callable[..., Config]) -> None:
    config = tiny("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe", "comm.topology.nodes=[3, 1]")
    console = Console(file=StringIO(), width=160)
    dry_run(make_plan(config), load_hardware("cpu"), 3, console)
    assert "GPU 0 of node 1" in console.file.getvalue()  # type: ignore[attr-defined]


def test_pipeline_messages_cross_the_nodes_of_the_config(tiny: Callable[..., Config]) -> None:
    layout = ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe")
    h100 = load_hardware("h100")
    near, far = (
        make(make_plan(tiny(*layout, *nodes)), h100).prices.P2P for nodes in ((), ("comm.topology.nodes=[2, 2]",))
    )
    assert far > near


def test_every_slot_of_a_short_step_is_listed(tiny: Callable[..., Config]) -> None:
    config = tiny("parallel.pp=2", "parallel.schedule=1f1b", "batch.sequences=4")
    console = Console(file=StringIO(), width=160)
    dry_run(make_plan(config), load_hardware("cpu"), 1, console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(f"1F{m}" in said and f"1B{m}" in said for m in range(4))
    assert "..." not in said.split("slots of rank 1")[1]
