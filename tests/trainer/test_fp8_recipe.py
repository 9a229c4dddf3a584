"""The `[fp8]` table: what a preset says, what changes it, and which engines it may name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dryvine.trainer.fp8.choose import CannotRun, check_engine
from dryvine.trainer.fp8.engines.names import ENGINES, make_engine
from dryvine.trainer.fp8.recipe import Recipe, preset

# arXiv 2412.19437, section 3.3: tiles, online scales, promotion every 128 of K, E5M6 after attention, FP8 dispatch.
DEEPSEEK_V3 = {
    "preset": "deepseek_v3",
    "linear": "fp8",
    "activation_tile": "1x128",
    "gradient_tile": "1x128",
    "weight_tile": "128x128",
    "scales": "fp32",
    "accumulator": "fp32",
    "promotion": 128,
    "gemm": "auto",
    "cache_after_attention": "e5m6",
    "dispatch": "fp8",
    "guard_every": 100,
}


def test_the_preset_is_the_papers() -> None:
    assert preset("deepseek_v3").model_dump() == DEEPSEEK_V3
    assert Recipe(linear="fp8").model_dump() == DEEPSEEK_V3 | {"preset": "bf16"}


def test_presets_and_overrides() -> None:
    assert Recipe().linear == "bf16"
    assert Recipe.model_validate({"preset": "deepseek_v3", "scales": "ue8m0"}) == preset("deepseek_v3", scales="ue8m0")
    assert preset("deepseek_v3").fp8
    assert not preset("fp32").fp8
    with pytest.raises(ValueError, match="Extra inputs"):
        Recipe.model_validate({"scale": "ue8m0"})
    with pytest.raises(ValueError, match="multiple of 32"):
        Recipe.model_validate({"preset": "deepseek_v3", "promotion": 100})


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_without_fp8_linears_nothing_is_sent_in_fp8(name: str) -> None:
    recipe = Recipe.model_validate({"preset": name})
    assert recipe.linear == name
    assert recipe.dispatch == "fp8"
    assert not recipe.fp8_dispatch


def test_an_unknown_engine_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"Input should be 'auto', 'emulate', .+ or 'transformer_engine'"):
        preset("deepseek_v3", gemm="cutlass")


def test_every_name_is_an_engine() -> None:
    for name in ENGINES:
        engine = make_engine(name)
        assert all(callable(getattr(engine, method)) for method in ("missing", "product", "wgrad")), name
        assert preset("deepseek_v3", gemm=name).gemm == name


def test_names_are_known_where_torch_is_missing() -> None:
    lines = (
        "import sys",
        "sys.modules['torch'] = None",
        "from dryvine.trainer.fp8.recipe import preset",
        "preset('deepseek_v3', gemm='triton')",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True, timeout=60)


def test_widths_that_no_gpu_kernel_takes_are_refused_on_a_gpu_alone() -> None:
    recipe, cuda = preset("deepseek_v3"), torch.device("cuda")
    check_engine(recipe, cuda, (256, 384))
    check_engine(recipe, torch.device("cpu"), (200,))
    check_engine(preset("bf16"), cuda, (200,))
    with pytest.raises(CannotRun, match="FFN width 200 is not a multiple of 128"):
        check_engine(recipe, cuda, (256, 200))
