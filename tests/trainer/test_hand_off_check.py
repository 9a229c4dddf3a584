"""`export --check`: which positions are held to the bound, and that whatever is left out of the files fails it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dryvine.trainer.hand_off.check import ReaderComparison, compare
from dryvine.trainer.hand_off.commands import ExportAs, check_files, export_run
from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.export_gguf import plan_gguf, write_gguf
from dryvine.trainer.hand_off.forward import ForwardResult
from dryvine.trainer.hand_off.gguf_keys import model_keys
from dryvine.trainer.hand_off.hf_config import config_json
from dryvine.trainer.hand_off.readers import GGUF
from dryvine.trainer.hand_off.ties import margins
from dryvine.trainer.model.shape import Yarn
from tests.support.hand_off import quiet, run_of, small, tokenizer_of

NO_BIAS = torch.zeros(8)


def logit(score: float) -> float:
    return math.log(score / (1 - score))


def test_the_margin_of_experts() -> None:
    shape = small(groups=1, group_limit=1)
    scores = [0.9, 0.8, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05]
    (margin,) = margins(torch.tensor([[logit(s) for s in scores]]), NO_BIAS, shape)
    assert float(margin) == pytest.approx((0.5 - 0.4) / 0.5, rel=1e-5)  # the third of three, and the fourth
    (margin,) = margins(torch.tensor([[logit(s) for s in scores]]), torch.tensor([0.0] * 3 + [0.1] + [0.0] * 4), shape)
    assert float(margin) == pytest.approx(0.0, abs=1e-6)


def test_the_margin_of_groups() -> None:
    """Two of four groups of two experts, and three experts of these; ranks 1.5, 1.1, 1.0 and 0.2."""
    scores = [0.9, 0.6, 0.8, 0.3, 0.5, 0.5, 0.1, 0.1]
    (margin,) = margins(torch.tensor([[logit(s) for s in scores]]), NO_BIAS, small())
    assert float(margin) == pytest.approx((1.1 - 1.0) / 1.1, rel=1e-5)
    all_taken = small(top_k=4)
    (margin,) = margins(torch.tensor([[logit(s) for s in scores]]), NO_BIAS, all_taken)
    assert float(margin) == pytest.approx((1.1 - 1.0) / 1.1, rel=1e-5)


class Off:
    """A reader whose log-probabilities are `by` off at one position of ten, of a limit of 0.05."""

    package, limit = "off", 0.05

    def __init__(self, by: float, near: float) -> None:
        self.by, self.near = by, near

    def tokens(self, text: str) -> list[int]:
        return list(range(10))

    def log_probs(self, tokens: list[int]) -> torch.Tensor:
        return torch.tensor([[-1.0, -0.5]] * 10) - self.by * (torch.arange(10) == 3).float().unsqueeze(1)


def verdict(by: float, near: float, margin: float, prompts: int = 1) -> ReaderComparison:
    """Our gates are sure by 1 at every position but by `margin` at the one that is off."""
    sure = torch.where(torch.arange(10) == 3, margin, 1.0)
    ours = ForwardResult(torch.tensor([[-1.0, -0.5]] * 10), sure)
    some = [("", list(range(10)))]
    return compare("", Off(by, near), lambda tokens: ours, some * prompts)


def test_a_position_is_held_where_our_gates_are_sure() -> None:
    assert verdict(0.04, near=0.01, margin=1.0).fine
    sure = verdict(0.06, near=0.01, margin=0.02)
    assert (sure.fine, sure.held) == (False, 10)
    tied = verdict(0.06, near=0.01, margin=0.005)
    assert (tied.held, tied.largest_held, round(tied.largest, 2)) == (3, 0.0, 0.06)  # up to the tie
    assert tied.fine
    assert not verdict(1.0, near=0.01, margin=0.005).fine  # 5% of positions may be off, and here it is 10%
    assert not verdict(0.06, near=0.0, margin=0.0).fine  # FP32 repeats even a tie
    assert not verdict(float("nan"), near=0.01, margin=0.005).fine


YARN = {"yarn": Yarn(factor=40, original=16), "rope_dim": 8}


def test_a_key_that_config_json_lacks_fails_the_check(tmp_path: Path) -> None:
    """Also those that our import and transformers can do without: vLLM takes softmax without scoring_func."""
    run, ways = run_of(small(**YARN), tmp_path / "run"), ExportAs("hf")
    export_run(run, tmp_path / "out", ways, quiet)
    path = tmp_path / "out" / "config.json"
    whole = json.loads(path.read_text())
    check_files(run, tmp_path / "out", ways)
    for key in config_json(run.shape):
        path.write_text(json.dumps({name: value for name, value in whole.items() if name != key}))
        with pytest.raises(HandOffError, match=rf"config.json: .*{key}|config.json: rope_scaling: says something else"):
            check_files(run, tmp_path / "out", ways)
    for scale in ("factor", "mscale", "mscale_all_dim", "beta_fast", "original_max_position_embeddings"):
        less = {name: value for name, value in whole["rope_scaling"].items() if name != scale}
        path.write_text(json.dumps(whole | {"rope_scaling": less}))
        with pytest.raises(HandOffError, match=r"config.json: .*(rope_scaling|mscale|factor|original)"):
            check_files(run, tmp_path / "out", ways)


@pytest.mark.parametrize(
    "gone", ["layers.1.mlp.gate.e_score_correction_bias", "layers.1.mlp.experts.3.up_proj.weight_scale_inv"]
)
def test_a_bias_or_a_scale_that_the_files_lack_fails_the_check(gone: str, tmp_path: Path) -> None:
    shape = small(hidden=128, expert_ffn=128)
    run, ways = run_of(shape, tmp_path / "run"), ExportAs("hf", dtype="fp8-block")
    export_run(run, tmp_path / "out", ways, quiet)
    check_files(run, tmp_path / "out", ways)
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    tensors = load_file(shard)
    del tensors[f"model.{gone}"]
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(HandOffError, match=gone.removesuffix("_scale_inv")):
        check_files(run, tmp_path / "out", ways)


def test_a_key_or_a_bias_that_gguf_lacks_fails_the_check(tmp_path: Path) -> None:
    run, ways = run_of(small(**YARN), tmp_path / "run"), ExportAs("gguf", quant="f32")
    (tmp_path / "out").mkdir()

    def check_without(name: str) -> None:
        file = plan_gguf(run, "f32", tokenizer_of(run))
        file.keys[:] = [key for key in file.keys if key.name != name]
        file.tensors[:] = [tensor for tensor in file.tensors if tensor.name != name]
        for _ in write_gguf(tmp_path / "out" / GGUF, file, run.stored):
            pass
        with pytest.raises(HandOffError, match=rf"model.gguf: {name}: is missing, and should be"):
            check_files(run, tmp_path / "out", ways)

    keys = [key.name for key in model_keys(run.shape)]
    assert {"deepseek2.expert_gating_func", "deepseek2.expert_group_count", "deepseek2.expert_weights_scale"} <= {*keys}
    for name in (*keys, "blk.1.exp_probs_b.bias"):
        check_without(name)
