"""Exports as transformers opens them, and back: names, gating, both dialects of config.json, FP8 blocks, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dryvine.trainer.hand_off.check import PROMPTS, ReaderComparison, compare, prompts
from dryvine.trainer.hand_off.encodings import Encoding
from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.export_hf import INDEX, export_hf
from dryvine.trainer.hand_off.forward import Forward
from dryvine.trainer.hand_off.import_hf import import_hf
from dryvine.trainer.hand_off.readers import Transformers
from dryvine.trainer.hand_off.run_files import OpenRun, open_run
from dryvine.trainer.model.shape import Yarn
from tests.support.hand_off import quiet, run_of, small, tokenizer_of, weights_of

V2 = {"score": "softmax", "normalise": False, "route_scale": 1.0}
YARN = {"yarn": Yarn(factor=40, original=16), "rope_dim": 8}
UNGROUPED = {"groups": 1, "group_limit": 1}
SHAPES: dict[str, dict[str, Any]] = {
    "v3": {},
    "v3, mtp": {"mtp_depth": 1},
    "v3, mtp twice, yarn, two shared": {"mtp_depth": 2, "shared": 2, **YARN},
    "v3 without q_lora or groups": {"q_lora": None, **UNGROUPED},
    "v3 not normalised, no shared": {"normalise": False, "shared": 0},
    "v2": V2 | UNGROUPED | {"q_lora": None, "shared": 2},
    "v2, q_lora, groups, yarn": V2 | YARN | {"route_scale": 16.0},
    "v2, mtp, no shared": V2 | UNGROUPED | {"mtp_depth": 1, "shared": 0},
}


def export(run: OpenRun, out: Path, dtype: str = "fp32", ragged: bool = False, shard_bytes: int = 1 << 30) -> Path:
    export_hf(run, out, Encoding(dtype, ragged), tokenizer_of(run), quiet, shard_bytes)
    return out


def disagreement(run: OpenRun, folder: Path, encoding: Encoding, number: int = 4) -> ReaderComparison:
    """transformers on an export, against our forward."""
    some = prompts(tokenizer_of(run), None, run.shape.max_position)[:number]
    return compare("", Transformers(folder, ""), Forward(run, encoding.read_back).compute, some)


ZERO_SIZED = pytest.mark.filterwarnings("ignore:Initializing zero-element")  # transformers, without shared experts


@ZERO_SIZED
@pytest.mark.parametrize(("name", "dtype"), list(zip(SHAPES, ("fp32", "bf16") * len(SHAPES), strict=False)))
def test_transformers_computes_what_we_do(name: str, dtype: str, tmp_path: Path) -> None:
    run = run_of(small(**SHAPES[name]), tmp_path / "run")
    found = disagreement(run, export(run, tmp_path / "out", dtype), Encoding(dtype))
    assert found.fine, found


@pytest.mark.long
@ZERO_SIZED
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8-block"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_model_in_every_dtype_on_fifty_prompts(name: str, dtype: str, tmp_path: Path) -> None:
    run = run_of(small(**SHAPES[name]), tmp_path / "run")
    found = disagreement(run, export(run, tmp_path / "out", dtype), Encoding(dtype), PROMPTS)
    print(found)
    assert found.fine, found


def test_fp8_blocks_that_do_not_divide_are_kept_from_transformers(tmp_path: Path) -> None:
    """Which would read 192 rows as two blocks of 96."""
    shape = small(hidden=192, kv_lora=96, q_lora=160, expert_ffn=128, init_std=0.05)
    run = run_of(shape, tmp_path / "run")
    folder = export(run, tmp_path / "out", "fp8-block")
    kept = json.loads((folder / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert "model.layers.1.self_attn.q_a_proj" in kept
    assert "model.layers.1.self_attn.q_b_proj" in kept
    found = disagreement(run, folder, Encoding("fp8-block"))
    assert found.fine, found


# What only one program reads, and would replace by something else in silence: each must matter for the numbers.
@pytest.mark.parametrize(
    "other",
    [{"n_group": 1, "topk_group": 1}, {"routed_scaling_factor": 1.0}, {"norm_topk_prob": False}, {"topk_group": 4}],
    ids=str,
)
def test_a_gating_key_that_is_left_out_is_seen(other: dict[str, object], tmp_path: Path) -> None:
    run = run_of(small(), tmp_path / "run")
    folder = export(run, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert all(config[key] != value for key, value in other.items())
    (folder / "config.json").write_text(json.dumps(config | other))
    found = disagreement(run, folder, Encoding("fp32"), 2)
    assert (found.fine, found.largest > 0.05) == (False, True), found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("changes", [{"mtp_depth": 1}, V2 | UNGROUPED], ids=["v3", "v2"])
def test_a_round_trip_keeps_every_bit(changes: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    run = run_of(small(**changes), tmp_path / "run")
    first = export(run, tmp_path / "first", dtype, shard_bytes=20_000)
    assert (first / INDEX).exists()
    made = import_hf(first, tmp_path / "imported", None, quiet)
    assert made.initialised == made.unknown_keys == ()
    assert made.shape == run.shape
    second = export(open_run(str(tmp_path / "imported")), tmp_path / "second", dtype, shard_bytes=20_000)
    for path in sorted(first.iterdir()):
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_what_readers_cannot_take_is_refused_by_name(tmp_path: Path) -> None:
    for number, (changes, words) in enumerate(
        (
            ({"norm_eps": 1e-5}, "norm_eps = 1e-05"),
            (V2 | {"normalise": True}, "normalise = true with softmax"),
            (V2 | {"heads": 5, "hidden": 32}, "multiple of heads"),
        )
    ):
        run = run_of(small(**changes), tmp_path / f"run{number}")
        with pytest.raises(HandOffError, match=words):
            export(run, tmp_path / "out")
        assert not list(tmp_path.glob("out*"))


def test_biases_that_v2_cannot_hold_are_refused(tmp_path: Path) -> None:
    shape = small(**V2)
    state = weights_of(shape)
    state["layers.1.gate.bias"][3] = 0.001
    with pytest.raises(HandOffError, match=r"layers.1.gate.bias is not zero"):
        export(run_of(shape, tmp_path / "run", state), tmp_path / "out")


def test_a_number_that_is_not_finite_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    shape = small()
    state = weights_of(shape)
    state["layers.2.experts.down"][5, 1, 2] = float("nan")
    run = run_of(shape, tmp_path / "run", state)
    for dtype in ("bf16", "fp8-block"):
        with pytest.raises(HandOffError, match=r"layers.2.experts.down \(model.layers.2.mlp.experts.5.down_proj"):
            export(run, tmp_path / "out", dtype)
        assert not list(tmp_path.glob("out*"))


def test_a_folder_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(HandOffError, match="is there already"):
        export(run_of(small(), tmp_path / "run"), tmp_path / "out")
