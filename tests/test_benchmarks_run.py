"""The one-GPU benchmarks run: toys of them on a CPU, in processes of their own, and what they tell adds up."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import faults, host
from benchmarks.fp8 import loss
from benchmarks.model import layer
from benchmarks.support import kernel_times
from benchmarks.support.census import Census
from benchmarks.support.moe_layer import make_bench, v3
from dryvine.comm.dispatch import routing
from dryvine.trainer.tensors import in_order
from tests.support.tape import TapeRecorder

ROOT = Path(__file__).parents[1]


def run(script: str, out: Path, *words: str) -> Any:
    command = [
        sys.executable,
        "-m",
        f"benchmarks.model.{script}",
        "--device=cpu",
        f"--json={out / 'found.json'}",
        *words,
    ]
    done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=ROOT, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "found.json").read_text())


def test_losses_are_read_of_a_run_that_writes_one_or_was_killed(tmp_path: Path) -> None:
    assert faults.losses(tmp_path) == []
    rows = '{"loss": 2.0}\n{"loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(rows + '{"lo')
    assert faults.losses(tmp_path) == [2.0, 1.0]
    assert loss.Run("bf16", 0, tmp_path).losses.tolist() == [2.0, 1.0]


@pytest.mark.long
def test_a_layer_is_measured_by_phase_and_kind(tmp_path: Path) -> None:
    found = run("layer", tmp_path, "--iterations=2", "--tokens=32", f"--trace={tmp_path / 'layer.json.gz'}")
    bf16, fp8 = found["layers"]
    assert list(bf16["phases_ms"]) == [
        "F attention", "F routing", "F dispatch", "F experts", "F combine",
        "B combine", "B experts", "B dispatch", "B routing", "B attention", "W experts", "W attention",
    ]  # fmt: skip
    assert all(milliseconds > 0 for milliseconds in (*bf16["phases_ms"].values(), bf16["total_ms"]))
    assert bf16["unclassified"] == []
    assert 0 < fp8["kept_bytes"] < bf16["kept_bytes"]
    for one in (bf16, fp8):
        assert {"GEMM", "attention core", "permutation"} <= set(one["kinds_by_phase_ms"]["F attention"])
        assert "GEMM" in one["kinds_by_phase_ms"]["B experts"]
    assert len(kernel_times.read(tmp_path / "layer-bf16.json.gz", ())) > 100


def test_flops_of_a_v3_layer_are_those_that_mfu_is_counted_by() -> None:
    assert layer.model_flops(v3(torch.device("cuda"), recompute=True), 4096) == pytest.approx(16.45e12, rel=1e-3)


def test_a_layer_as_a_graph_is_the_same_microbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, recorder = make_bench("bf16", torch.device("cpu"), 32, recompute=True, folder=tmp_path), TapeRecorder()
    monkeypatch.setattr(in_order, "_sorts", lambda total: True)
    plainly = routing.read

    def read(*tensors: Tensor) -> list[Tensor]:
        assert not recorder.live.recording
        return plainly(*tensors)

    monkeypatch.setattr(routing, "read", read)
    found = layer.as_graph(bench, recorder, 1, tmp_path / "graph.json.gz", {}, layer.PEAK / 1e3)
    assert found["gradients_off"] == 0
    assert found["mfu"] * found["total_ms"] == pytest.approx(1)
    assert sum(found["kinds_by_phase_ms"][layer.REPLAY].values()) > 0


@pytest.mark.long
def test_peers_train_the_same_model(tmp_path: Path) -> None:
    words = ("--size=toy", "--steps=1", "--contender=dryvine", "--contender=transformers grouped_mm")
    ours, theirs = run("peer", tmp_path, *words)["found"].values()
    assert ours["parameters"] == theirs["parameters"]
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], abs=0.05)


def trace(path: Path, events: list[dict[str, Any]]) -> Path:
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": [{"ph": "X", "args": {}, **event} for event in events]}, file)
    return path


def test_kernels_belong_to_where_they_were_launched(tmp_path: Path) -> None:
    """A kernel runs after the span that launched it has ended on the host, and another thread may have launched it."""

    def launched(correlation: int, name: str, at: float, start: float, took: float) -> list[dict[str, Any]]:
        args = {"correlation": correlation}
        return [
            {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "tid": 9, "ts": at, "dur": 1.0, "args": args},
            {"cat": "kernel", "name": name, "tid": 7, "ts": start, "dur": took, "args": args},
        ]

    events = [
        {"cat": "user_annotation", "name": "F attention", "tid": 1, "ts": 0.0, "dur": 10.0},
        {"cat": "user_annotation", "name": "B attention", "tid": 1, "ts": 20.0, "dur": 10.0},
        *launched(1, "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", 5.0, 15.0, 8.0),
        *launched(2, "rows_kernel", 25.0, 22.0, 4.0),
        *launched(3, "what_is_this", 50.0, 60.0, 2.0),
    ]
    gemm, cast, other = kernel_times.read(trace(tmp_path / "t.json.gz", events), ("F attention", "B attention"))
    assert (gemm.span, gemm.kind) == ("F attention", "GEMM")
    assert (cast.span, cast.kind) == ("B attention", "casts")
    assert (other.span, other.kind) == ("", kernel_times.UNKNOWN)
    assert kernel_times.busy([gemm, cast, other]) == pytest.approx(8 + 3 + 2)  # a microsecond of two at once


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_64x128x128_4x1x1", "attention core"),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<...>>", "GEMM"),
        ("void cutlass::Kernel2<cutlass_80_simt_sgemm_128x64_8x5_tn_align1>(...)", "GEMM in FP32"),
        ("product_kernel", "GEMM"),
        ("swiglu_backward_kernel", "casts"),
        ("rmsnorm_kernel", "norms"),
        ("void at::native::index_elementwise_kernel<128, 4, ...>", "permutation"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "elementwise"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "copies"),
        ("Memset (Device)", "copies"),
    ],
)
def test_kinds_follow_from_names(name: str, kind: str) -> None:
    assert kernel_times.kind_of(name) == kind


def test_no_kernel_of_ours_is_unclassified() -> None:
    sources = [path for folder in ("comm", "trainer") for path in (ROOT / folder).rglob("*.py")]
    names = [name for path in sources for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)]
    assert len(names) > 10
    assert [name for name in names if kernel_times.kind_of(name) == kernel_times.UNKNOWN] == []


def test_a_census_counts_what_is_kept_and_nothing_else() -> None:
    before = torch.ones(1000)
    with Census() as census:
        kept = [before * 2, before[:10], (before + 1).view(10, 100)[:1]]  # the last holds all of its storage
        (before * 3).sum()
    assert [size for size, _ in census.alive()] == [4000, 4000]
    del kept
    assert census.bytes == 0


@pytest.mark.long
def test_a_rank_that_is_stopped_is_named_and_ended_with_its_launcher(tmp_path: Path) -> None:
    found = faults.operation(faults.Run("cpu", 3.0, tmp_path), "reduction", "stop")
    assert found.named
    assert found.code == 1
    assert found.late < faults.GRACE


@pytest.mark.long
def test_verifiers_are_timed() -> None:
    words = [sys.executable, "-m", "benchmarks.verifiers", "--scale=0.01"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reasoning_gym" in done.stdout


@pytest.mark.parametrize(
    ("bits", "fault"),
    [
        ({"off": "a", "off again": "a", "on": "b"}, True),
        ({"off": "a", "off again": "a", "on": "a"}, False),
        ({"off": "a", "off again": "b", "on": "c"}, False),
        ({"off": "a", "on": "b"}, False),
        ({"on": "a"}, False),
    ],
)
def test_other_bits_are_the_graphs_fault_only_where_two_runs_without_agree(bits: dict[str, str], fault: bool) -> None:
    """At large sizes a library's kernel adds in any order."""
    assert host.graphs_change_bits(bits) == fault
