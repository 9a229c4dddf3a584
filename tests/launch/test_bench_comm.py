"""`dryvine bench comm` on two CPU ranks: a line per case, with bytes worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from dryvine.comm.host import available_memory
from dryvine.comm.local import run
from dryvine.comm.topology import by_sizes
from dryvine.launch.bench_comm import PARTS, Case, CommShape, comm, measure


def test_bytes_are_those_of_one_dispatch() -> None:
    """Each rank has 2 experts and every token chooses all 4, so half of its rows cross: 2 rows, 8 bytes of weight."""
    cases = [Case("flat", 6, "bf16"), Case("hierarchical", 6, "bf16"), Case("flat", 6, "fp8")]
    figures = run(measure, 2, by_sizes([1, 1]), CommShape(hidden=128, experts=4, top_k=4, rounds=1), cases)[0]
    assert [f.case for f in figures] == cases
    flat, two_hop, fp8 = figures
    assert (flat.intra, flat.inter, flat.logical) == (0, 6 * 2 * (256 + 8), 6 * 4 * 256)
    assert (two_hop.intra, two_hop.inter) == (0, 6 * (256 + 16))  # once, with all four weights
    assert (fp8.inter, fp8.logical) == (6 * 2 * (128 + 8 + 8), 6 * 4 * (128 + 4))
    assert all(set(f.seconds) == set(PARTS) and min(f.seconds.values()) > 0 for f in figures)


def test_the_command_prints_a_line_per_case(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "comm.svg"
    comm(nodes="1,1", tokens="4", dtypes="bf16", hidden=128, experts=4, top_k=2, rounds=1, out=out)
    printed = capsys.readouterr().out
    assert "hierarchical" in printed
    assert "limit" in printed
    assert "…" not in printed  # nothing is cut at 80 columns
    assert out.read_text().startswith("<?xml")


def test_what_would_not_fit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """4 ranks x 1M tokens x 8 rows x 14,336 bytes, ten times."""
    with pytest.raises(typer.Exit) as ended:
        comm(tokens="4,1048576")
    assert ended.value.exit_code == 2
    assert "4 ranks of 1048576 tokens take about 4810.4 GB" in capsys.readouterr().err


def test_memory_is_what_the_kernel_says() -> None:
    told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert available_memory() == pytest.approx(int(told["MemAvailable"].split()[0]) * 1024, rel=0.2)
    assert available_memory() < int(told["MemTotal"].split()[0]) * 1024
