"""Released checkpoints as others leave them: what is taken, what is refused by name, and FP8 blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader

from dryvine.trainer.hand_off.encodings import SCALE, Encoding
from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.export_hf import INDEX, export_hf
from dryvine.trainer.hand_off.import_hf import Imported, import_hf
from dryvine.trainer.hand_off.run_files import open_run
from dryvine.trainer.model.shape import Shape
from tests.support.hand_off import quiet, run_of, small, tokenizer_of, weights_of

Tensors = dict[str, Tensor]
CONFIG, WEIGHTS = "config.json", "model.safetensors"
RAGGED = {"hidden": 192, "kv_lora": 96, "q_lora": 160, "expert_ffn": 136, "init_std": 0.05}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports to take apart: BF16 and FP8, with MTP."""
    home = tmp_path_factory.mktemp("released")
    made = {}
    for dtype, changes in (("bf16", {}), ("fp8-block", RAGGED)):
        run = run_of(small(mtp_depth=1, **changes), home / f"run {dtype}")
        made[dtype] = home / dtype
        export_hf(run, made[dtype], Encoding(dtype, ragged=True), tokenizer_of(run), quiet, 1 << 40)
    return made


def changed(folder: Path, out: Path, tensors: Callable[[Tensors], None] = lambda t: None, **config: object) -> Path:
    """A copy with other tensors or keys; a key of None goes."""
    out.mkdir()
    kept = load_file(folder / WEIGHTS)
    tensors(kept)
    save_file(kept, out / WEIGHTS)
    tree = json.loads((folder / CONFIG).read_text()) | config
    (out / CONFIG).write_text(json.dumps(tree))
    return out


def take(folder: Path, tmp_path: Path) -> Imported:
    return import_hf(folder, tmp_path / "imported", None, quiet)


def gone(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(name)] and None


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


NORM, GATE = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.gate.e_score_correction_bias"
Q = "model.layers.0.self_attn.q_a_proj.weight"


@pytest.mark.parametrize(
    ("dtype", "tensors", "words"),
    [
        ("bf16", gone("model.layers.2.mlp.experts.5.up"), "has no model.layers.2.mlp.experts.5.up_proj.weight"),
        ("bf16", gone(GATE), f"has no {GATE}"),
        ("bf16", put(NORM, lambda t: t[:1]), rf"{NORM}: has shape \[1\], and config.json asks for \[32\]"),
        ("bf16", put(Q, lambda t: t.t().contiguous()), rf"{Q}: has shape \[32, 20\]"),
        ("bf16", put(Q, lambda t: t.to(torch.int8)), f"{Q}: is torch.int8"),
        ("bf16", put(Q, lambda t: t * float("inf")), f"{Q} holds numbers that are not finite"),
        ("bf16", lambda t: t.update({"extra.weight": torch.ones(1)}), "extra.weight: nothing of a model"),
        ("bf16", lambda t: t.update({Q + SCALE: torch.ones(1, 1)}), "scales of a weight that is not in FP8"),
        ("bf16", lambda t: t.update({"model.layers.1.q_a_proj.bias": torch.ones(1)}), "q_a_proj.bias: nothing"),
        ("fp8-block", gone(Q + SCALE), f"{Q}: is in FP8 and has no {Q + SCALE}"),
        ("fp8-block", put(Q + SCALE, lambda t: t[:1]), rf"{Q + SCALE}: is torch.float32 \[1, 2\].*need \[2, 2\]"),
        ("fp8-block", put("lm_head.weight", lambda t: t.to(torch.float8_e4m3fn)), "lm_head.weight: is in FP8, which"),
        ("bf16", put("model.layers.3.embed_tokens.weight", lambda t: t + 1), "is not a copy of model.embed_tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_tensors_that_are_not_as_promised_are_refused_by_name(
    released: dict[str, Path], dtype: str, tensors: Callable[[Tensors], None], words: str, tmp_path: Path
) -> None:
    folder = changed(released[dtype], tmp_path / "changed", tensors)
    with pytest.raises(HandOffError, match=words):
        take(folder, tmp_path)
    assert not list(tmp_path.glob("imported/checkpoints/step*"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_hidden_layers": 2}, "has no model.layers.2.enorm.weight"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: Input should be less than or equal to 4096, not 1000000000"),
        ({"n_routed_experts": 10**9}, "n_routed_experts: Input should be less than or equal to 65536, not 1000000000"),
        ({"num_hidden_layers": 4000}, "num_hidden_layers: 4000, but the files hold"),
        ({"num_nextn_predict_layers": 0}, "model.layers.3.*nothing of a model of 3 layers and 0"),
        ({"model_type": "deepseek_v32"}, "model_type"),
        ({"scoring_func": "softmax"}, "scoring_func: deepseek_v3 has sigmoid"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"num_key_value_heads": 2}, "num_key_value_heads: 2, but every head"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps: 1e-05"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "original_max_position_embeddings"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor"),
        ({"num_experts_per_tok": 7}, "top_k=7 experts cannot be found"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, "weight_block_size"),
    ],
    ids=str,
)
def test_configs_that_we_do_not_compute_are_refused_by_key(
    released: dict[str, Path], config: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = changed(released["bf16"], tmp_path / "changed", **config)
    with pytest.raises(HandOffError, match=words):
        take(folder, tmp_path)


def test_fp8_without_a_quantization_config_is_refused(released: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(released["fp8-block"], tmp_path / "changed", quantization_config=None)
    with pytest.raises(HandOffError, match=r"config.json has no quantization_config"):
        take(folder, tmp_path)


def test_missing_mtp_is_initialised_and_said(released: dict[str, Path], tmp_path: Path) -> None:
    made = take(changed(released["bf16"], tmp_path / "changed", gone("model.layers.3.")), tmp_path)
    assert made.shape.mtp_depth == 1
    assert "mtp.0.layer.experts.gate_up" in made.initialised
    assert any("not in the files" in line for line in made.report(tmp_path))
    stored = open_run(str(tmp_path / "imported")).stored
    assert stored.read("mtp.0.norm_h.weight", 0, 32).tolist() == [1.0] * 32
    spread = stored.read("mtp.0.project.weight", 0, 2048)
    assert 0.15 < float(spread.std()) < 0.25


def test_half_of_mtp_is_refused(released: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(released["bf16"], tmp_path / "changed", gone("model.layers.3.eh_proj"))
    with pytest.raises(HandOffError, match=r"has no model.layers.3.eh_proj.weight"):
        take(folder, tmp_path)


def test_tables_that_are_computed_and_copies_that_are_gone_are_fine(released: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
        del tensors["model.layers.3.embed_tokens.weight"], tensors["model.layers.3.shared_head.head.weight"]

    made = take(changed(released["bf16"], tmp_path / "changed", change, new_key=1), tmp_path)
    assert (made.initialised, made.unknown_keys) == ((), ("new_key",))


def test_both_dialects_of_rope_are_read(released: dict[str, Path], tmp_path: Path) -> None:
    yarn = {"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5, "original_max_position_embeddings": 16}
    old = changed(released["bf16"], tmp_path / "old", rope_parameters=None, rope_scaling={"type": "yarn", **yarn})
    new = changed(
        released["bf16"], tmp_path / "new", rope_theta=None, rope_scaling=None,
        rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, **yarn},
    )  # fmt: skip
    shapes = [import_hf(folder, tmp_path / f"from {folder.name}", None, quiet).shape for folder in (old, new)]
    assert shapes[0] == shapes[1]
    assert shapes[0].yarn is not None
    assert (shapes[0].yarn.factor, shapes[0].yarn.mscale_all_dim) == (4.0, 0.5)


def test_pickles_are_not_opened(released: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(released["bf16"], tmp_path / "changed")
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(HandOffError, match=r"no \*.safetensors: pytorch_model.bin is a pickle"):
        take(folder, tmp_path)


@pytest.mark.parametrize("shape", [(192, 96), (576, 7168)], ids=str)
def test_blocks_that_do_not_divide_come_back_within_the_quantiser_bound(shape: tuple[int, int]) -> None:
    """By our dequantiser. E4M3 has three bits of mantissa: half a step is 1/16 of the number."""
    from dryvine.trainer.hand_off.names import Mapped

    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    place = Mapped("w.weight", "w.weight", 0, shape, linear=True)
    back = Encoding("fp8-block", ragged=True).read_back(place, values)
    bound = values.abs() / 16 + values.abs().max() / 448 / 512  # and half a subnormal step
    assert bool(((back - values).abs() <= bound).all())
    assert not Encoding("fp8-block").in_fp8(place)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_fp8_comes_back_as_torch_reads_it(released: dict[str, Path], tmp_path: Path) -> None:
    """An independent dequantiser, on matrices that blocks do not divide; it wants an index."""
    folder = changed(released["fp8-block"], tmp_path / "indexed", quantization_config=_fp8_config(released))
    tensors = load_file(folder / WEIGHTS)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, WEIGHTS)}))
    import torch.distributed.checkpoint as dcp

    into = {name: torch.empty(t.shape) for name, t in tensors.items() if t.dtype is torch.float8_e4m3fn}
    assert {(192, 136), (96 + 4, 192)} <= {tuple(t.shape) for t in into.values()}
    reader = QuantizedHuggingFaceStorageReader(str(folder), target_dtype=torch.float32)
    dcp.load(into, storage_reader=reader, no_dist=True)
    take(folder, tmp_path)
    stored = open_run(str(tmp_path / "imported")).stored
    ours = stored.read("layers.2.attention.kv_a.weight", 0, 100 * 192)
    assert torch.equal(ours, into["model.layers.2.self_attn.kv_a_proj_with_mqa.weight"].flatten())


def _fp8_config(released: dict[str, Path]) -> Any:
    return json.loads((released["fp8-block"] / CONFIG).read_text())["quantization_config"]


def test_a_round_trip_through_fp8_is_within_its_bound_and_then_exact(tmp_path: Path) -> None:
    shape = small(**RAGGED)
    state = weights_of(shape)
    run = run_of(shape, tmp_path / "run", state)
    encoding = Encoding("fp8-block", ragged=True)
    export_hf(run, tmp_path / "once", encoding, tokenizer_of(run), quiet, 1 << 40)
    import_hf(tmp_path / "once", tmp_path / "back", None, quiet)
    back = open_run(str(tmp_path / "back"))
    for name in ("layers.1.experts.down", "layers.0.attention.kv_b.weight"):
        values, read = state[name].flatten(), back.stored.read(name, 0, state[name].numel())
        assert float((read - values).abs().max()) <= float(values.abs().max()) / 16
    export_hf(back, tmp_path / "twice", encoding, tokenizer_of(back), quiet, 1 << 40)
    assert (tmp_path / "once" / WEIGHTS).read_bytes() == (tmp_path / "twice" / WEIGHTS).read_bytes()


def test_a_shape_is_written_that_a_config_can_extend(released: dict[str, Path], tmp_path: Path) -> None:
    import tomllib

    made = take(released["bf16"], tmp_path)
    tree = tomllib.loads((tmp_path / "imported" / "model.toml").read_text())
    assert Shape.model_validate(tree["model"]) == made.shape
