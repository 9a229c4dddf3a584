"""What could never run is refused in one line: sizes, files, memory; what a terminal would act on is spelled out."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dryvine.launch import spawn
from dryvine.launch.start import start
from dryvine.trainer import verify
from dryvine.trainer.config import Config, ConfigError, load
from dryvine.trainer.data import prepare
from dryvine.trainer.faults import out_of_memory
from dryvine.trainer.fits import check_fits, check_host, least_bytes, memory_of
from dryvine.trainer.model.shape import count_parameters
from dryvine.trainer.run_plan import make_plan
from dryvine.trainer.say import say

CPU = torch.device("cpu")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a = " + b"[" * 20000, "nested too deeply"),
        (b"\xff\xfe", "cannot be read as TOML"),
        (b"extends = 3\n", "extends = 3: write the path of a config"),
        (b"#" * (5 << 20), "longer than 4 MiB"),
        (b'extends = "."\n', "it is not a file"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(says)):
        load(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(ConfigError, match="it is not a file"):
            load(path)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.layers=1000000000", "model.layers: input should be less than or equal to 4096"),
        ("model.mtp_depth=1000000000", "model.mtp_depth"),
        ("batch.sequences=1000000000", "ops, and 5,000,000 can be planned"),
        ("parallel.chunks=1000000000", "ops, and 5,000,000 can be planned"),
    ],
)
def test_sizes_beyond_reason(tiny: Callable[..., Config], override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        make_plan(tiny(override))


def test_a_ramp_of_too_many_sizes(tiny: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="more than 1000 sizes"):
        tiny("batch.sequences=100000", "batch.ramp_from=1", "batch.ramp_increment=1", "batch.ramp_tokens=100")


def test_what_memory_a_rank_needs_at_least(tiny: Callable[..., Config]) -> None:
    alone, spread = tiny(), tiny("parallel.pp=2", "parallel.ep=2", "parallel.dp=2", "run.dtype=bf16")
    parameters = count_parameters(alone.model, mtp=True)[0]
    assert least_bytes(alone, CPU) == parameters * (4 + 4 + 4 + 8)
    assert least_bytes(spread, CPU) == parameters * ((2 + 4) / 4 + (4 + 8) / 8)


def test_a_model_larger_than_the_machine(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    check_fits(tiny(), CPU)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1 << 20, 1 << 20))
    assert memory_of(CPU) == 1 << 20
    with pytest.raises(ConfigError, match=r"at least 0\.0 GB a rank, and cpu has 0\.0 GB: raise parallel"):
        check_fits(tiny(), CPU)


def test_more_ranks_than_a_host_can_have_are_refused_before_one_is_started(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 671B parameters because of their size; of a tiny model because of what a process is."""
    check_host(tiny("parallel.pp=2"), "cpu")
    for config in (load(CONFIGS / "deepseek_v3_671b.toml"), tiny("parallel.dp=4096", "batch.sequences=4096")):
        with pytest.raises(ConfigError, match=r"^[24],\d+ ranks \(parallel.pp x dp x ep\) need at least [\d,.]+ GB"):
            check_host(config, "auto")
        with pytest.raises(ConfigError, match="need a GPU each, and this host has 0; start them"):
            check_host(config, "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_host(tiny("parallel.pp=2"), "auto")
    with pytest.raises(ConfigError, match=r"^4 ranks \(.*\) need a GPU each, and this host has 2; start them on"):
        check_host(tiny("parallel.pp=4"), "auto")
    check_host(tiny("parallel.pp=4"), "cpu")


def test_ranks_are_counted_before_data_are_built_or_any_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[object] = []
    monkeypatch.setattr(prepare, "prepare", lambda *given: begun.append(given))
    monkeypatch.setattr(spawn, "spawn", lambda *given: begun.append(given))
    with pytest.raises(ConfigError, match=r"^[\d,]+ ranks \(parallel.pp x dp x ep\) need"):
        start(make_plan(load(CONFIGS / "deepseek_v3_671b.toml")), [], 0)
    assert not begun


def test_verify_starts_no_ranks_that_the_host_cannot_hold() -> None:
    """Nor the one process that it compares them with."""
    with pytest.raises(ConfigError, match=r"^one rank needs at least [\d,]+\.\d GB on a CPU, .*; make \[model\] sm"):
        verify.run(load(CONFIGS / "deepseek_v3_671b.toml"), "cpu", Console())


def test_allocations_that_fail_are_told_from_other_errors() -> None:
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 60)
    assert out_of_memory(failed.value)
    assert not out_of_memory(RuntimeError("shapes"))


def test_what_is_said_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say("run.\x1b[31mred\nline é")
    assert capsys.readouterr().err == "dryvine: run.\\x1b[31mred\\nline é\n"
