"""Names and layouts of released DeepSeek checkpoints, both ways, and the config.json that goes with them.

One table says where each of our tensors lies in theirs; reading and writing walk it in two directions, so they cannot
disagree. Theirs has a matrix per projection and expert; ours stacks gate over up, and all experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dryvine.trainer.model.shape import Shape, blocks


class Source(NamedTuple):
    """A tensor of ours is the concatenation (dim 0) of theirs in each group, stacked over the groups if `stacked`."""

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


def config_json(shape: Shape) -> dict[str, Any]:
    """What `DeepseekV3Config` (sigmoid scores) or `DeepseekV2Config` (softmax) of transformers is made from."""
    s, v3 = shape, shape.score == "sigmoid"
    rope: dict[str, Any] = {"rope_theta": s.rope_theta, "rope_type": "default"}
    if s.yarn:
        rope |= s.yarn.model_dump(include={"factor", "mscale", "mscale_all_dim"}) | {
            "rope_type": "yarn", "beta_fast": s.yarn.beta, "beta_slow": s.yarn.alpha,
            "original_max_position_embeddings": s.yarn.original,
        }  # fmt: skip
    own = (
        {"num_nextn_predict_layers": s.mtp_depth, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
        if v3
        else {"scoring_func": "softmax", "topk_method": "group_limited_greedy" if s.groups > 1 else "greedy"}
    )
    return own | {
        "model_type": "deepseek_v3" if v3 else "deepseek_v2",
        "architectures": ["DeepseekV3ForCausalLM" if v3 else "DeepseekV2ForCausalLM"],
        "vocab_size": s.vocab, "hidden_size": s.hidden, "intermediate_size": s.ffn,
        "moe_intermediate_size": s.expert_ffn, "num_hidden_layers": s.layers, "first_k_dense_replace": s.first_dense,
        "num_attention_heads": s.heads, "num_key_value_heads": s.heads, "q_lora_rank": s.q_lora,
        "kv_lora_rank": s.kv_lora, "qk_nope_head_dim": s.nope_dim, "qk_rope_head_dim": s.rope_dim,
        "v_head_dim": s.v_dim, "n_routed_experts": s.routed, "n_shared_experts": s.shared,
        "num_experts_per_tok": s.top_k, "n_group": s.groups, "topk_group": s.group_limit,
        "norm_topk_prob": s.normalise, "routed_scaling_factor": s.route_scale, "rms_norm_eps": s.norm_eps,
        "max_position_embeddings": s.max_position, "initializer_range": s.init_std, "rope_parameters": rope,
        "tie_word_embeddings": False,
    }  # fmt: skip


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
