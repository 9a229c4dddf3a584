"""Any config on one rank: small enough, and with every path that one rank can have."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dryvine.launch.one_gpu import BYTES, shrunk, write_one_gpu
from dryvine.launch.plan.plan import budget
from dryvine.trainer.config import Config, load
from dryvine.trainer.model.shape import blocks, count_parameters
from dryvine.trainer.run_plan import load_plan, make_plan

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
LAPTOP, GPU = 1e9, 40e9


def kinds(config: Config) -> set[str]:
    return {block.kind for block in blocks(config.model)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("memory", [LAPTOP, GPU])
def test_every_config_of_ours_fits_and_keeps_its_paths(path: Path, memory: float) -> None:
    whole = load(path)
    small = shrunk(whole, memory)
    make_plan(small)
    assert small.parallel.world == 1
    assert BYTES * count_parameters(small.model, mtp=True)[0] <= memory
    assert kinds(small) == kinds(whole)
    for table, key in (
        ("model", "recompute"), ("model", "score"), ("model", "groups"), ("model", "group_limit"), ("model", "top_k"),
        ("model", "shared"), ("model", "balance_alpha"), ("run", "dtype"), ("run", "seed"), ("optim", "moments"),
        ("parallel", "overlap"), ("parallel", "microbatch_sequences"),
    ):  # fmt: skip
        assert getattr(getattr(small, table), key) == getattr(getattr(whole, table), key), key
    assert small.fp8 == whole.fp8
    assert (small.model.q_lora is None) == (whole.model.q_lora is None)
    assert (small.batch.ramp_from is None) == (whole.batch.ramp_from is None)
    assert [s.shape for s in small.optim.plan] == [s.shape for s in whole.optim.plan]


def test_a_large_gpu_keeps_more_than_a_laptop() -> None:
    whole = load(ROOT / "configs/deepseek_v3_671b.toml")
    assert count_parameters(shrunk(whole, GPU).model)[0] > 10 * count_parameters(shrunk(whole, LAPTOP).model)[0]


@pytest.mark.parametrize(
    ("asked", "taken"),
    [("dualpipe", "dualpipev"), ("zbv", "zbv"), ("zb1p", "zb1p"), ("interleaved", "interleaved"), ("gpipe", "gpipe")],
)
def test_a_schedule_stays_if_one_rank_can_have_it(tiny: Callable[..., Config], asked: str, taken: str) -> None:
    small = shrunk(tiny("parallel.pp=2", f"parallel.schedule={asked}"), LAPTOP)
    assert small.parallel.schedule == taken
    make_plan(small)


def test_a_dualpipe_keeps_its_pairs_and_its_weight_gradients(tiny: Callable[..., Config]) -> None:
    schedule = make_plan(shrunk(tiny("parallel.pp=2", "parallel.schedule=dualpipe"), LAPTOP)).schedule
    assert [slot for slot in schedule.ranks[0] if len(slot) == 2]
    assert {op.kind for op in schedule.ops(0)} == {"F", "B", "I", "W"}


def test_a_short_run_has_all_of_its_plan_of_learning_rates(tiny: Callable[..., Config]) -> None:
    given = tiny("run.steps=20", 'optim.plan=[{ shape = "linear", length = 5, to = 1.0 }]')
    assert shrunk(given, LAPTOP).optim.plan[0].length == 5


def test_what_happens_every_so_many_steps_happens_early(tiny: Callable[..., Config]) -> None:
    run = shrunk(tiny("run.steps=1000", "run.timeline_step=700", "run.integrity_every=500"), LAPTOP).run
    assert (run.timeline_step, run.integrity_every, run.buddy_every) == (10, 10, None)


def test_late_changes_come_within_the_small_run() -> None:
    whole = load(ROOT / "configs/deepseek_v3_671b.toml")
    small = shrunk(whole, LAPTOP)
    in_all = sum(tokens for _, tokens in budget(small))
    (mtp,), (bias,) = small.optim.mtp_weight_plan, small.optim.bias_gamma_plan
    assert 0.6 < mtp.after / in_all < 0.75
    assert 0.95 < bias.after / in_all < 0.98


def test_late_changes_that_would_coincide_stay_apart(tiny: Callable[..., Config]) -> None:
    given = tiny("run.steps=100000000", "optim.mtp_weight_plan=[{after=2,to=0.1},{after=1,to=0.2},{after=3,to=0.0}]")
    changes = shrunk(given, LAPTOP).optim.mtp_weight_plan
    assert [(change.after, change.to) for change in changes] == [(1, 0.2), (2, 0.1), (3, 0.0)]


def test_data_that_is_here_is_kept(tiny: Callable[..., Config]) -> None:
    here, absent = tiny(), tiny("data.source=nowhere")
    assert shrunk(here, LAPTOP).data == here.data
    assert shrunk(absent, LAPTOP).data.source == "stdlib"


def test_it_is_written_as_a_config_and_says_what_changed(
    tiny: Callable[..., Config], corpus: Path, tmp_path: Path
) -> None:
    words = (f'data.source="{corpus}"', f'run.out="{tmp_path}"', "parallel.ep=2", "run.steps=2")
    path, lines = write_one_gpu(ROOT / "tests/tiny.toml", words, LAPTOP)
    assert path == tmp_path / "tiny-one-gpu" / "one_gpu.toml"
    assert load_plan(path).config.parallel.ep == 1
    assert any(line.strip() == "parallel.ep = 1, was 2" for line in lines)


def test_the_command_trains(corpus: Path, tmp_path: Path) -> None:
    words = ["train", "tests/tiny.toml", "--one-gpu", "parallel.pp=2", "parallel.schedule=dualpipe", "run.steps=1"]
    command = [sys.executable, "-m", "dryvine.launch.cli", *words, f'data.source="{corpus}"', f'run.out="{tmp_path}"']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "parallel.pp = 1, was 2" in done.stdout
    assert (tmp_path / "tiny-one-gpu" / "metrics.jsonl").read_text().count("\n") == 1
