"""llama.cpp on our GGUF files: every kind of model that it takes, and every key that it computes by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dryvine.trainer.hand_off.check import ReaderComparison, compare, prompts
from dryvine.trainer.hand_off.commands import ExportAs, check_export, export_run, rounded
from dryvine.trainer.hand_off.export_gguf import GgufFile, plan_gguf, write_gguf
from dryvine.trainer.hand_off.forward import Forward
from dryvine.trainer.hand_off.readers import GGUF, LlamaCpp
from dryvine.trainer.hand_off.run_files import OpenRun
from dryvine.trainer.model.shape import Yarn
from tests.support.hand_off import quiet, run_of, small, tokenizer_of

pytestmark = pytest.mark.long
pytest.importorskip("llama_cpp", reason="a build of minutes: make prove-llama")

V2 = {"score": "softmax", "normalise": False, "route_scale": 1.0, "groups": 1, "group_limit": 1}
YARN = {"yarn": Yarn(factor=40, original=16), "rope_dim": 8}
WIDE = {"hidden": 256, "ffn": 256, "expert_ffn": 256, "nope_dim": 32, "kv_lora": 256, "q_lora": 256, "init_std": 0.02}
SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "v3": ({}, "f32"),
    "v3, mtp, yarn, two shared": ({"mtp_depth": 1, "shared": 2, **YARN}, "f32"),
    "v3 without q_lora or groups": ({"q_lora": None, "groups": 1, "group_limit": 1}, "f32"),
    "v2, no q_lora": (V2 | {"q_lora": None}, "f32"),
    "v2, q_lora, yarn, normalised": (V2 | YARN | {"normalise": True, "route_scale": 16.0}, "f32"),
    "v3 in bf16": ({"init_std": 0.05}, "bf16"),
    "v3 in f16": (WIDE, "f16"),
    "v3 in q8_0": (WIDE, "q8_0"),
    "v3 in q4_k": (WIDE, "q4_k"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "quant"), SHAPES.values(), ids=SHAPES.keys())
def test_llama_cpp_computes_what_we_do(changes: dict[str, Any], quant: str, tmp_path: Path) -> None:
    run = run_of(small(**changes), tmp_path / "run")
    ways = ExportAs("gguf", quant=quant)
    export_run(run, tmp_path / "out", ways, quiet)
    console = Console(record=True, width=120)
    assert check_export(run, tmp_path / "out", ways, None, console), console.export_text()


def without(run: OpenRun, out: Path, change: Callable[[GgufFile], None]) -> ReaderComparison:
    """What llama.cpp makes of a file that lacks something."""
    file = plan_gguf(run, "f32", tokenizer_of(run))
    change(file)
    out.mkdir()
    for _ in write_gguf(out / GGUF, file, run.stored):
        pass
    forward = Forward(run, rounded(run, ExportAs("gguf", quant="f32")))
    some = prompts(tokenizer_of(run), None, run.shape.max_position)[:4]
    return compare("", LlamaCpp(out, "f32"), forward.compute, some)


@pytest.mark.parametrize(
    "key", ["expert_gating_func", "expert_group_count", "expert_weights_scale", "expert_weights_norm", "yarn_log_mul"]
)
def test_a_key_that_is_left_out_is_seen(key: str, tmp_path: Path) -> None:
    run = run_of(small(**YARN), tmp_path / "run")

    def change(file: GgufFile) -> None:
        kept = [one for one in file.keys if key not in one.name]
        assert len(kept) < len(file.keys)
        file.keys[:] = kept

    torch.manual_seed(0)
    assert not without(run, tmp_path / "out", change).fine


def test_biases_that_are_left_out_are_seen(tmp_path: Path) -> None:
    run = run_of(small(), tmp_path / "run")

    def change(file: GgufFile) -> None:
        file.tensors[:] = [tensor for tensor in file.tensors if "exp_probs_b" not in tensor.name]

    assert not without(run, tmp_path / "out", change).fine
