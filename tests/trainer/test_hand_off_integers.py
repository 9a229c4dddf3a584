"""Exports with 8- and 4-bit weights: loaded weights equal the rounded ones, other tensors are unchanged, and errors in
files are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dryvine.trainer.generate.open import load, open_weights
from dryvine.trainer.hand_off import integers
from dryvine.trainer.hand_off.encodings import Encoding
from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.export_hf import export_hf
from dryvine.trainer.hand_off.names import places
from dryvine.trainer.model.decoder import Model
from tests.support.hand_off import quiet, run_of, small, tokenizer_of

Q = "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize(("bits", "step"), [(8, 1 / 127), (4, 1 / 15)])
@pytest.mark.parametrize("cols", [32, 96, 40, 7])
def test_the_error_is_at_most_half_a_quantisation_step_of_the_block(bits: int, step: float, cols: int) -> None:
    rows = torch.randn(5, cols, generator=torch.Generator().manual_seed(cols))
    rows[2] = 0
    made = integers.quantize(rows, bits)
    assert {end: (part.dtype, part.shape) for end, part in made.items()} == integers.announced(bits, 5, cols)
    off = (integers.dequantize(made, cols) - rows).abs()
    blocks = [rows[:, at : at + 32] for at in range(0, cols, 32)]
    span = torch.cat([_span(block, bits).expand_as(block) for block in blocks], 1)
    # FP16 scales; and at 4 bits a least-squares fit, which may clip the block's largest or smallest value.
    assert (off <= span * step * (0.51 if bits == 8 else 1.5) + 1e-6).all()
    assert off[2].max() == 0


def opened(folder: Path) -> Model:
    return load(open_weights(str(folder)), torch.float32, torch.device("cpu"), quiet)


def _span(block: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return block.abs().amax(1, keepdim=True)
    return block.amax(1, keepdim=True).clamp_min(0) - block.amin(1, keepdim=True).clamp_max(0)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_loaded_weights_equal_the_rounded_ones_and_files_have_the_documented_size(tmp_path: Path, dtype: str) -> None:
    run = run_of(small(mtp_depth=1), tmp_path / "run")
    encoding = Encoding(dtype)
    export_hf(run, tmp_path / "out", encoding, tokenizer_of(run), quiet, 1 << 30)
    loaded, plain = (dict(opened(tmp_path / name).named_parameters()) for name in ("out", "run"))
    rounded = 0
    for place in (place for place in places(run.shape) if place.ours in loaded and not place.copy):
        flat, whole = (w[place.ours].detach().flatten()[place.first :][: place.elements] for w in (loaded, plain))
        assert torch.equal(flat.view(place.shape), encoding.read_back(place, whole.view(place.shape)))
        assert place.linear == (encoding.bits(place) is not None)
        rounded += place.linear
    assert rounded > 20
    held = load_file(tmp_path / "out" / "model.safetensors")
    numbers = sum(place.elements for place in places(run.shape) if place.ours.startswith("layers.1.experts"))
    held_bytes = sum(part.nbytes for name, part in held.items() if ".layers.1.mlp.experts" in name)
    # `small` has rows of 24 and 32 values; those of 24 are stored as a whole block of 32.
    assert held_bytes / numbers <= (1.13 if dtype == "int8" else 0.84)


def test_the_config_names_a_quantisation_method_that_transformers_refuses(tmp_path: Path) -> None:
    run = run_of(small(), tmp_path / "run")
    export_hf(run, tmp_path / "out", Encoding("int4"), tokenizer_of(run), quiet, 1 << 30)
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said == {"quant_method": "dryvine-blocks", "bits": 4, "block": 32}


@pytest.mark.parametrize(
    ("end", "change", "why"),
    [
        (integers.SCALE, None, f"has no {Q}_block_scale"),
        (integers.LOW, lambda t: t[:1], f"{Q}_block_low: is torch.float16 .* need torch.float16"),
        ("", lambda t: t.to(torch.int8), f"{Q}: is torch.int8 .* and 4 bits need torch.uint8"),
        (integers.SCALE, lambda t: t * float("nan"), "numbers that are not finite"),
    ],
)
def test_errors_name_the_tensor(tmp_path: Path, end: str, change: object, why: str) -> None:
    run = run_of(small(), tmp_path / "run")
    export_hf(run, tmp_path / "out", Encoding("int4"), tokenizer_of(run), quiet, 1 << 30)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors = {name: change(t) if name == Q + end and callable(change) else t for name, t in tensors.items()}
    if change is None:
        del tensors[Q + end]
    save_file(tensors, file)
    with pytest.raises(HandOffError, match=why):
        opened(tmp_path / "out")
