"""Names and layouts of released DeepSeek checkpoints, both ways, and the config.json that goes with them.

One table maps each of our tensors to theirs; reading and writing walk it in opposite directions, so they cannot
disagree. Theirs has a matrix for each projection and expert; ours stacks gate over up, and all experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dryvine.trainer.model.shape import Shape, blocks


class Source(NamedTuple):
    """Theirs of a group, concatenated along dim 0, are a tensor of ours; with `stacked`, one slice of it."""

    groups: tuple[tuple[str, ...], ...]
    stacked: bool = False


def sources(shape: Shape) -> dict[str, Source]:
    """Our global name -> theirs, for all parameters and gate biases."""
    table = dict(_plain({"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}))
    for block in blocks(shape):
        if block.kind in ("dense", "moe"):
            table.update(_layer(shape, block.name, f"model.{block.name}", block.kind == "moe"))
    for k in range(shape.mtp_depth):
        theirs = f"model.layers.{shape.layers + k}"
        own = {"norm_h": "hnorm", "norm_e": "enorm", "norm": "shared_head.norm", "project": "eh_proj"}
        table.update(_plain({f"mtp.{k}.{name}": f"{theirs}.{other}" for name, other in own.items()}))
        table.update(_layer(shape, f"mtp.{k}.layer", theirs, is_moe=True))
    return table


def from_hf(state: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Whole tensors by global name, as `Model.load` takes them. Raises ValueError naming a tensor that is missing."""
    # V2 has no biases: its gates choose by the scores alone.
    biases = {} if shape.score == "sigmoid" else {name: torch.zeros(shape.routed) for name in _biases(shape)}
    return biases | {name: _join(name, source, state) for name, source in sources(shape).items()}


def to_hf(state: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """The reverse. MTP's copies of embedding and head are written too, as released checkpoints have them."""
    theirs: dict[str, Tensor] = {}
    for name, source in sources(shape).items():
        pieces = state[name].unbind(0) if source.stacked else (state[name],)
        for piece, group in zip(pieces, source.groups, strict=True):
            theirs.update(zip(group, piece.chunk(len(group)), strict=True))
    for k in range(shape.mtp_depth):
        prefix = f"model.layers.{shape.layers + k}"
        theirs[f"{prefix}.embed_tokens.weight"] = state["embed.weight"]
        theirs[f"{prefix}.shared_head.head.weight"] = state["head.weight"]
    return theirs


# config.json's name of what a Shape holds under another.
CONFIG_NAMES = {
    "vocab_size": "vocab",
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "moe_intermediate_size": "expert_ffn",
    "num_hidden_layers": "layers",
    "first_k_dense_replace": "first_dense",
    "num_attention_heads": "heads",
    "num_key_value_heads": "heads",
    "q_lora_rank": "q_lora",
    "kv_lora_rank": "kv_lora",
    "qk_nope_head_dim": "nope_dim",
    "qk_rope_head_dim": "rope_dim",
    "v_head_dim": "v_dim",
    "n_routed_experts": "routed",
    "n_shared_experts": "shared",
    "num_experts_per_tok": "top_k",
    "n_group": "groups",
    "topk_group": "group_limit",
    "norm_topk_prob": "normalise",
    "routed_scaling_factor": "route_scale",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_position",
    "initializer_range": "init_std",
}


def config_json(shape: Shape) -> dict[str, object]:
    """For transformers' `DeepseekV3Config` (sigmoid scores) or `DeepseekV2Config` (softmax)."""
    shared = {theirs: getattr(shape, ours) for theirs, ours in CONFIG_NAMES.items()}
    return shared | _kind(shape) | {"rope_parameters": _rope_parameters(shape), "tie_word_embeddings": False}


def _kind(shape: Shape) -> dict[str, object]:
    """What only one of the two architectures has, or names its own way."""
    if shape.score == "sigmoid":
        return {
            "model_type": "deepseek_v3",
            "architectures": ["DeepseekV3ForCausalLM"],
            "num_nextn_predict_layers": shape.mtp_depth,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        }
    return {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "scoring_func": "softmax",
        "topk_method": "group_limited_greedy" if shape.groups > 1 else "greedy",
    }


def _rope_parameters(shape: Shape) -> dict[str, object]:
    if shape.yarn is None:
        return {"rope_theta": shape.rope_theta, "rope_type": "default"}
    return {
        "rope_theta": shape.rope_theta,
        "rope_type": "yarn",
        "factor": shape.yarn.factor,
        "mscale": shape.yarn.mscale,
        "mscale_all_dim": shape.yarn.mscale_all_dim,
        "beta_fast": shape.yarn.beta,
        "beta_slow": shape.yarn.alpha,
        "original_max_position_embeddings": shape.yarn.original,
    }


def _biases(shape: Shape) -> Iterator[str]:
    for block in blocks(shape):
        if block.kind in ("moe", "mtp"):
            yield f"{block.name}.gate.bias" if block.kind == "moe" else f"{block.name}.layer.gate.bias"


def _join(name: str, source: Source, state: Mapping[str, Tensor]) -> Tensor:
    for group in source.groups:
        for other in group:
            if other not in state:
                raise ValueError(f"the checkpoint has no {other} (our {name}): is it of the shape in [model]?")
    pieces = [torch.cat([state[other] for other in group]) for group in source.groups]
    return torch.stack(pieces) if source.stacked else pieces[0]


def _plain(names: Mapping[str, str]) -> Iterator[tuple[str, Source]]:
    return ((f"{ours}.weight", Source(((f"{theirs}.weight",),))) for ours, theirs in names.items())


def _layer(shape: Shape, ours: str, theirs: str, is_moe: bool) -> dict[str, Source]:
    names = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    latent = (
        {"q": "q_proj"} if shape.q_lora is None else {"q_a": "q_a_proj", "q_norm": "q_a_layernorm", "q_b": "q_b_proj"}
    )
    latent |= {"kv_a": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_b": "kv_b_proj", "o": "o_proj"}
    names |= {f"attention.{name}": f"self_attn.{other}" for name, other in latent.items()}
    table = dict(_plain({f"{ours}.{name}": f"{theirs}.{other}" for name, other in names.items()}))
    if not is_moe:
        return table | _ffn(f"{ours}.ffn", f"{theirs}.mlp")
    table[f"{ours}.gate.weight"] = Source(((f"{theirs}.mlp.gate.weight",),))
    if shape.score == "sigmoid":
        table[f"{ours}.gate.bias"] = Source(((f"{theirs}.mlp.gate.e_score_correction_bias",),))
    if shape.shared:
        table |= _ffn(f"{ours}.shared", f"{theirs}.mlp.shared_experts")
    experts = [f"{theirs}.mlp.experts.{e}" for e in range(shape.routed)]
    table[f"{ours}.experts.gate_up"] = Source(tuple(_gate_up(e) for e in experts), stacked=True)
    table[f"{ours}.experts.down"] = Source(tuple((f"{e}.down_proj.weight",) for e in experts), stacked=True)
    return table


def _ffn(ours: str, theirs: str) -> dict[str, Source]:
    return {
        f"{ours}.gate_up.weight": Source((_gate_up(theirs),)),
        f"{ours}.down.weight": Source(((f"{theirs}.down_proj.weight",),)),
    }


def _gate_up(theirs: str) -> tuple[str, str]:
    return f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight"
