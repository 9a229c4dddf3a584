"""GGUF files: 4-bit blocks, keys, the tokenizer, refusals. What llama.cpp makes of them: test_hand_off_llama.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from dryvine.trainer.hand_off import q4_k
from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.export_gguf import export_gguf, plan_gguf, reader_of
from dryvine.trainer.hand_off.gguf_header import check_gguf
from dryvine.trainer.hand_off.names import Mapped, places
from dryvine.trainer.hand_off.readers import GGUF
from dryvine.trainer.hand_off.run_files import OpenRun
from dryvine.trainer.model.shape import Yarn
from tests.support.hand_off import quiet, run_of, small, tokenizer_of, weights_of


def export(run: OpenRun, out: Path, quant: str = "f32") -> Path:
    export_gguf(run, out, quant, tokenizer_of(run), quiet)
    return out / GGUF


def test_q4_k_is_read_by_the_library_with_the_error_of_four_bits() -> None:
    x = np.random.default_rng(0).normal(0, 0.02, (64, 1024)).astype(np.float32)
    back = gguf.quants.dequantize(q4_k.quantize(x), gguf.GGMLQuantizationType.Q4_K)
    # Uniform steps of the best size for a normal distribution in 32s leave about 7%.
    assert np.sqrt(np.mean((back - x) ** 2) / np.mean(x**2)) < 0.08
    assert np.sqrt(np.mean((back - x) ** 2) / np.mean(x**2)) > 0.03  # it is four bits


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_q4_k_of_one_number_is_that_number(value: float) -> None:
    x = np.full((2, 256), value, np.float32)
    back = gguf.quants.dequantize(q4_k.quantize(x), gguf.GGMLQuantizationType.Q4_K)
    np.testing.assert_allclose(back, x, rtol=1e-3)


def test_a_file_holds_our_weights_under_their_names(tmp_path: Path) -> None:
    shape = small()
    state = weights_of(shape)
    read = gguf.GGUFReader(export(run_of(shape, tmp_path / "run", state), tmp_path / "out"))
    tensors = {tensor.name: tensor.data.copy() for tensor in read.tensors}
    up = state["layers.1.experts.gate_up"][:, shape.expert_ffn :]
    np.testing.assert_array_equal(tensors["blk.1.ffn_up_exps.weight"], up)
    np.testing.assert_array_equal(tensors["blk.2.exp_probs_b.bias"], state["layers.2.gate.bias"])
    by_head = state["layers.0.attention.kv_b.weight"].view(shape.heads, -1, shape.kv_lora)
    np.testing.assert_array_equal(tensors["blk.0.attn_k_b.weight"], by_head[:, : shape.nope_dim].transpose(1, 2))
    np.testing.assert_array_equal(tensors["blk.0.attn_v_b.weight"], by_head[:, shape.nope_dim :])
    np.testing.assert_array_equal(tensors["output.weight"], state["head.weight"])


def test_the_file_is_the_one_that_was_planned(tmp_path: Path) -> None:
    run = run_of(small(yarn=Yarn(factor=4, original=16), rope_dim=8), tmp_path / "run")
    for quant in ("f32", "bf16", "f16", "q8_0", "q4_k"):
        check_gguf(export(run, tmp_path / quant, quant), plan_gguf(run, quant, tokenizer_of(run)))
    with pytest.raises(HandOffError, match=r"model.gguf: general.file_type: is 7, and should be 32"):
        check_gguf(tmp_path / "q8_0" / GGUF, plan_gguf(run, "bf16", tokenizer_of(run)))


@pytest.mark.parametrize("quant", ["q8_0", "q4_k", "f16"])
def test_what_is_read_back_is_what_the_file_holds(quant: str, tmp_path: Path) -> None:
    shape = small(hidden=256, nope_dim=32)
    state = weights_of(shape)
    run = run_of(shape, tmp_path / "run", state)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(export(run, tmp_path / "out", quant)).tensors}
    whole = {place.theirs: place for place in places(shape)}
    rounded = reader_of(shape, quant)

    def ours(theirs: str) -> Any:
        place: Mapped = whole[theirs]
        values = state[place.ours].flatten()[place.first : place.first + place.elements].view(place.shape)
        return rounded(place, values)

    def file(name: str) -> Any:
        return torch.from_numpy(gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type).copy())

    assert torch.equal(ours("model.layers.1.mlp.experts.3.up_proj.weight"), file("blk.1.ffn_up_exps.weight")[3])
    assert torch.equal(ours("model.embed_tokens.weight"), file("token_embd.weight"))
    by_head = ours("model.layers.2.self_attn.kv_b_proj.weight").view(shape.heads, -1, shape.kv_lora)
    assert torch.equal(by_head[:, : shape.nope_dim].transpose(1, 2), file("blk.2.attn_k_b.weight"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 27}, "q_lora with 27 layers"),
        ({"score": "softmax", "normalise": False}, "groups with softmax"),
        ({"shared": 0}, "shared = 0"),
        ({"yarn": Yarn(factor=4, original=16, mscale_all_dim=0.5), "rope_dim": 8}, "yarn.mscale"),
        ({"first_dense": 3}, "no layer of experts"),
    ],
)
def test_what_llama_cpp_cannot_take_is_refused_by_name(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(HandOffError, match=f"llama.cpp cannot take this model: .*{words}"):
        export(run_of(small(**changes), tmp_path / "run"), tmp_path / "out")


def test_numbers_that_a_type_cannot_hold_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    shape = small()
    for value, quant, words in ((float("nan"), "q8_0", "not finite"), (1e5, "f16", "too large for FP16")):
        state = weights_of(shape)
        state["layers.2.experts.down"][5, 1, 2] = value
        run = run_of(shape, tmp_path / f"run{quant}", state)
        with pytest.raises(HandOffError, match=rf"layers.2.experts.down \(blk.2.ffn_down_exps.weight.*{words}"):
            export(run, tmp_path / "out", quant)
        assert not list(tmp_path.glob("out*"))


def test_biases_of_softmax_gates_are_kept(tmp_path: Path) -> None:
    shape = small(score="softmax", normalise=False, groups=1, group_limit=1)
    state = weights_of(shape)
    state["layers.1.gate.bias"][3] = 0.25
    run = run_of(shape, tmp_path / "run", state)
    read = gguf.GGUFReader(export(run, tmp_path / "out"))
    (bias,) = (tensor.data for tensor in read.tensors if "exp_probs_b" in tensor.name)
    assert bias.tolist() == state["layers.1.gate.bias"].tolist()
