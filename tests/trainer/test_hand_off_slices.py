"""What an export holds in memory: counted at V3's shapes, measured on a model that is larger than the bound."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dryvine.comm.dispatch.single_rank import SingleRank
from dryvine.trainer.config import load
from dryvine.trainer.hand_off.names import places, sizes
from dryvine.trainer.hand_off.slices import slices
from dryvine.trainer.model.decoder import Model
from dryvine.trainer.model.shape import Shape, blocks
from dryvine.trainer.model.spec import Spec
from tests.support.hand_off import small

ROOT = Path(__file__).parents[2]
BOUND = 256 << 20


def on_meta(shape: Shape) -> dict[str, tuple[int, ...]]:
    spec = Spec(shape, torch.float32, "meta")
    model = Model(spec, {0: tuple(block.name for block in blocks(shape))}, SingleRank(shape.routed))
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


@pytest.mark.parametrize("config", ["deepseek_v3_671b", "deepseek_v2_lite_16b", "tiny_cpu"])
def test_places_cover_every_parameter_of_the_model_once(config: str) -> None:
    shape = load(ROOT / f"configs/{config}.toml").model
    assert sizes(shape) == on_meta(shape)
    ends: dict[str, int] = {}
    for place in sorted((p for p in places(shape) if not p.copy), key=lambda p: (p.ours, p.first)):
        assert place.first == ends.get(place.ours, 0), place
        ends[place.ours] = place.first + place.elements
    found = {name: end for name, end in ends.items() if not name.endswith(".gate.bias")}
    assert found == {name: math.prod(size) for name, size in sizes(shape).items()}


def test_slices_of_v3_are_under_the_bound_with_what_a_cast_needs() -> None:
    """FP32 twice (as read, and joined of pieces), filled up to blocks, its absolute values, scaled, and FP8 thrice."""
    shape = load(ROOT / "configs/deepseek_v3_671b.toml").model
    largest = covered = 0
    for place in places(shape):
        at = 0
        for piece in slices(place):
            assert piece.first == at
            at += piece.rows
            covered += piece.elements
            largest = max(largest, piece.elements)
        assert at == place.shape[0]
    assert covered == sum(place.elements for place in places(shape))
    assert largest * (5 * 4 + 3) <= BOUND


MEASURED = """
import sys, threading, time
from pathlib import Path
import torch
from dryvine.trainer.hand_off.commands import ExportAs, export_run
from dryvine.trainer.hand_off.run_files import open_run

def memory():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))

peaks, done = [0], threading.Event()
def watch():  # also while a cast runs, which lets other threads run
    while not done.is_set():
        peaks.append(memory())
        time.sleep(0.0005)

folder, out, format, dtype = sys.argv[1:]
torch.set_num_threads(1)
run = open_run(folder)
before = memory()
thread = threading.Thread(target=watch)
thread.start()
export_run(run, Path(out), ExportAs(format, dtype=dtype, quant="q8_0"), lambda stage, done, total: None)
done.set()
thread.join()
print(max(peaks) - before, len(peaks))
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured by Linux's /proc")
@pytest.mark.parametrize(("format", "dtype"), [("hf", "bf16"), ("hf", "fp8-block"), ("gguf", "-")])
def test_the_peak_of_an_export_is_the_bound_plus_a_constant(format: str, dtype: str, tmp_path: Path) -> None:
    """Of 810 MB of FP32 weights, the largest of them 600 MB."""
    from tests.support.hand_off import run_of

    shape = small(hidden=1024, vocab=32000, expert_ffn=768, routed=64, layers=2, ffn=1024, heads=8, q_lora=256)
    run_of(shape, tmp_path / "run")
    words = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        MEASURED,
        str(tmp_path / "run"),
        str(tmp_path / "out"),
        format,
        dtype,
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    peak, samples = map(int, done.stdout.split())
    assert samples > 100
    print(f"{format} {dtype}: peak {peak / (1 << 20):.0f} MiB")
    assert peak <= BOUND + (32 << 20)
