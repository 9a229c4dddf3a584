"""Same weights, same logits and loss as transformers, through a checkpoint on disk in the released layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from dryvine.trainer.hand_off.hf_config import config_json
from dryvine.trainer.model.shape import Shape, Yarn
from tests.support.hand_off import from_hf, to_hf, weights_of
from tests.support.model import filled, random_tokens, tiny, validate, whole

V2 = {"score": "softmax", "normalise": False, "route_scale": 1.0, "shared": 2}
V2_LITE = V2 | {"q_lora": None, "groups": 1, "group_limit": 1}
SHAPES = {
    "v3": {},
    "v3 without q_lora or groups": {"q_lora": None, "groups": 1, "group_limit": 1},
    "v3 with yarn": {"yarn": Yarn(factor=40, original=16), "rope_dim": 8},
    "v3 with yarn, mscales apart": {"yarn": Yarn(factor=4, original=16, mscale_all_dim=0.5), "rope_dim": 8},
    "v3 with values wider than queries": {"v_dim": 16},
    "v2": V2_LITE,
    "v2 with q_lora and groups": V2 | {"route_scale": 16.0},
    "v2 with yarn": V2_LITE | {"yarn": Yarn(factor=40, original=16, mscale=0.707, mscale_all_dim=0.707), "rope_dim": 8},
}  # fmt: skip


def theirs(shape: Shape, seed: int) -> Any:
    torch.manual_seed(seed)
    if shape.score == "sigmoid":
        model: Any = DeepseekV3ForCausalLM(DeepseekV3Config(**config_json(shape)))
    else:
        model = DeepseekV2ForCausalLM(DeepseekV2Config(**config_json(shape)))
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            if "e_score_correction_bias" in name:
                tensor.uniform_(-0.2, 0.2)
    return model.eval()


def on_disk(model: Any, folder: Path) -> dict[str, Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_loss_and_logits_equal_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    for seed in range(2):
        shape = tiny(init_std=0.2, **changes)
        other = theirs(shape, seed)
        released = on_disk(other, tmp_path)
        model = whole(shape)
        model.load(from_hf(released, shape))
        tokens = random_tokens(shape, 2, 24, seed)
        with torch.no_grad():
            logits = other(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        ours: list[Tensor] = []
        with model.root["head"].register_forward_hook(lambda *call, keep=ours: keep.append(call[2].clone())):
            torch.testing.assert_close(validate(model, tokens)["loss"], loss, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours[0], logits.flatten(0, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", [{}, V2_LITE], ids=["v3", "v2"])
def test_a_checkpoint_comes_back_as_it_was(changes: dict[str, Any], tmp_path: Path) -> None:
    shape = tiny(**changes)
    released = on_disk(theirs(shape, 0), tmp_path)
    back = to_hf(from_hf(released, shape), shape)
    assert back.keys() == released.keys()
    assert all(torch.equal(back[name], released[name]) for name in released)


def test_mtp_gets_copies_of_embedding_and_head(tmp_path: Path) -> None:
    """As released checkpoints have them; ours are one tensor each."""
    shape = tiny(mtp_depth=2)
    state = {name: weight.detach() for name, weight in filled(shape).named_parameters()} | filled(shape).buffers
    released = to_hf(state, shape)
    for number in (3, 4):
        assert torch.equal(released[f"model.layers.{number}.embed_tokens.weight"], state["embed.weight"])
        assert torch.equal(released[f"model.layers.{number}.shared_head.head.weight"], state["head.weight"])


def test_the_yarn_of_a_config_is_under_the_released_names() -> None:
    yarn = Yarn(factor=40, alpha=2, beta=24, original=16, mscale=0.5, mscale_all_dim=0.25)
    said = {
        "rope_type": "yarn", "factor": 40, "beta_fast": 24, "beta_slow": 2,
        "original_max_position_embeddings": 16, "mscale": 0.5, "mscale_all_dim": 0.25,
    }  # fmt: skip
    config = config_json(tiny(yarn=yarn, rope_theta=5e4))
    assert config["rope_parameters"] == said | {"rope_theta": 5e4}  # transformers 5
    assert (config["rope_scaling"], config["rope_theta"]) == (said | {"type": "yarn"}, 5e4)  # all others


def test_mtp_equals_transformers(tmp_path: Path) -> None:
    """Two depths: what they are fed, in which order, which norm lies between them, and whose head and embedding."""
    shape = tiny(init_std=0.2, mtp_depth=2, mtp_weight=0.3)
    other = theirs(shape, 0)
    extra = MtpModel(other, 2).eval()
    with torch.no_grad():
        for name, weight in extra.named_parameters():
            if name.startswith("layers"):
                weight.uniform_(0.5, 1.5) if "norm" in name else weight.normal_(0, 0.2)
    model = whole(shape)
    model.load(from_hf(on_disk(other, tmp_path) | released_mtp(extra, shape), shape))
    tokens = random_tokens(shape, 2, 20)
    length = 20
    losses = validate(model, tokens)
    with torch.no_grad():
        h = other.model(tokens[:, :length]).last_hidden_state
        for k in (1, 2):
            positions = torch.arange(k, length + k).unsqueeze(0)
            h = extra.forward_layer(k - 1, h, positions, None, input_ids=tokens[:, k : length + k])
            target = tokens[:, k + 1 : length + k + 1]
            loss = torch.nn.functional.cross_entropy(other.lm_head(h).flatten(0, 1), target.flatten())
            torch.testing.assert_close(losses[f"mtp.{k - 1}"], loss * 0.3 / 2, atol=1e-4, rtol=0)


def released_mtp(extra: Any, shape: Shape) -> dict[str, Tensor]:
    """Its parameters under the names of released checkpoints, a matrix per expert."""
    released = {}
    for name, weight in extra.named_parameters():
        if not name.startswith("layers"):
            continue
        _, k, rest = name.split(".", 2)
        rest = rest.replace("mtp_block.", "").replace("post_norm", "shared_head.norm")
        prefix = f"model.layers.{shape.layers + int(k)}"
        if "mlp.experts" not in rest:
            released[f"{prefix}.{rest}"] = weight.detach()
            continue
        parts = ("gate_proj", "up_proj") if rest.endswith("gate_up_proj") else ("down_proj",)
        for e, one in enumerate(weight.detach()):
            for part, piece in zip(parts, one.chunk(len(parts)), strict=True):
                released[f"{prefix}.mlp.experts.{e}.{part}.weight"] = piece
    for k in range(shape.mtp_depth):
        gate = extra.layers[k].mtp_block.mlp.gate
        released[f"model.layers.{shape.layers + k}.mlp.gate.e_score_correction_bias"] = gate.e_score_correction_bias
    return released


@pytest.mark.parametrize("name", ["norm.weight", "layers.1.gate.bias", "layers.2.experts.down"])
def test_a_tensor_of_another_shape_is_not_spread(name: str) -> None:
    shape = tiny()
    state = from_hf(to_hf(weights_of(shape), shape), shape)
    state[name] = state[name][:1]
    with pytest.raises(ValueError, match=name):
        whole(shape).load(state)
