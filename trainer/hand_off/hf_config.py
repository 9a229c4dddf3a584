"""config.json of a released DeepSeek checkpoint, written and read.

Written for both dialects: transformers 5 reads `rope_parameters`; older ones, vLLM and converters read `rope_theta` and
`rope_scaling`. It also has the keys that transformers' own class lacks (`scoring_func`, `topk_method`,
`moe_layer_freq`), without which vLLM silently takes softmax scores or drops the biases.

Read strictly: a key that changes the computation to something we do not implement is refused, and an unknown key is
reported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError

from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.integers import OURS
from dryvine.trainer.model.shape import Shape, Yarn

EPS = 1e-6  # of the norms of the latents, whatever rms_norm_eps says: fixed in the released code and in transformers
Size = Annotated[int, Field(ge=1, lt=1 << 31)]
Count = Annotated[int, Field(ge=0, lt=1 << 31)]

# config.json's names for the fields of Shape that it calls something else.
NAMES = {
    "vocab_size": "vocab",
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "moe_intermediate_size": "expert_ffn",
    "num_hidden_layers": "layers",
    "first_k_dense_replace": "first_dense",
    "num_attention_heads": "heads",
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
    "num_nextn_predict_layers": "mtp_depth",
}
_OURS = {ours: theirs for theirs, ours in NAMES.items()}


def config_json(shape: Shape) -> dict[str, object]:
    """The config for transformers' `DeepseekV3Config` (sigmoid scores) or `DeepseekV2Config` (softmax), and for
    vLLM."""
    shared: dict[str, object] = {theirs: getattr(shape, ours) for theirs, ours in NAMES.items()}
    return (
        _kind(shape)
        | shared
        | {"num_key_value_heads": shape.heads, "hidden_act": "silu", "moe_layer_freq": 1}
        | {"attention_bias": False, "tie_word_embeddings": False}
        | {"rope_theta": shape.rope_theta, "rope_scaling": _rope_scaling(shape.yarn)}
        | {"rope_parameters": {"rope_theta": shape.rope_theta, **_rope_parameters(shape.yarn)}}
    )


def _kind(shape: Shape) -> dict[str, object]:
    """The keys that only one of the two architectures has or that it names differently."""
    if shape.score == "sigmoid":
        kind, method = "V3", "noaux_tc"
    else:
        kind, method = "V2", "group_limited_greedy" if shape.groups > 1 else "greedy"
    return {
        "architectures": [f"Deepseek{kind}ForCausalLM"],
        "model_type": f"deepseek_{kind.lower()}",
        "scoring_func": shape.score,
        "topk_method": method,
    }


def _rope_parameters(yarn: Yarn | None) -> dict[str, object]:
    if yarn is None:
        return {"rope_type": "default"}
    return {
        "rope_type": "yarn",
        "factor": yarn.factor,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
        "beta_fast": yarn.beta,
        "beta_slow": yarn.alpha,
        "original_max_position_embeddings": yarn.original,
    }


def _rope_scaling(yarn: Yarn | None) -> dict[str, object] | None:
    return None if yarn is None else {**_rope_parameters(yarn), "type": "yarn"}


class _YarnJson(BaseModel, extra="ignore", allow_inf_nan=False):
    factor: Annotated[float, Field(gt=1, lt=1e6)]
    original_max_position_embeddings: Size
    mscale: float
    mscale_all_dim: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: None = None  # transformers' own temperature; released configs say it by mscale
    truncate: Literal[True] = True

    def yarn(self) -> Yarn:
        return Yarn(
            factor=self.factor,
            alpha=self.beta_slow,
            beta=self.beta_fast,
            original=self.original_max_position_embeddings,
            mscale=self.mscale,
            mscale_all_dim=self.mscale_all_dim,
        )


class _FP8Json(BaseModel, extra="ignore"):
    quant_method: Literal["fp8"]
    fmt: Literal["e4m3"] = "e4m3"
    weight_block_size: tuple[Literal[128], Literal[128]]


class _IntegersJson(BaseModel, extra="forbid"):
    """`integers.py`."""

    quant_method: Literal["dryvine-blocks"]
    bits: Literal[4, 8]
    block: Literal[32]


class ConfigJson(BaseModel, extra="allow", strict=True, allow_inf_nan=False):
    """The keys that change the computation, with the only values that we implement."""

    model_type: Literal["deepseek_v2", "deepseek_v3"]
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    moe_intermediate_size: Size
    num_hidden_layers: Size
    first_k_dense_replace: Count
    num_attention_heads: Size
    num_key_value_heads: Size | None = None
    q_lora_rank: Size | None
    kv_lora_rank: Size
    qk_nope_head_dim: Size
    qk_rope_head_dim: Size
    v_head_dim: Size
    n_routed_experts: Size
    n_shared_experts: Count | None
    num_experts_per_tok: Size
    n_group: Size | None = None
    topk_group: Size | None = None
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    max_position_embeddings: Size
    initializer_range: float = 0.02
    num_nextn_predict_layers: Count = 0
    scoring_func: Literal["sigmoid", "softmax"] | None = None
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] | None = None
    moe_layer_freq: Literal[1] = 1
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    tie_word_embeddings: Literal[False] = False
    rope_interleave: Literal[True] | None = None
    rope_theta: float | None = None
    rope_scaling: dict[str, object] | None = None
    rope_parameters: dict[str, object] | None = None
    quantization_config: dict[str, object] | None = None


# Known, and of no consequence for the weights or for what they compute.
_IDLE = {
    "architectures", "auto_map", "attention_dropout", "aux_loss_alpha", "bos_token_id", "eos_token_id", "pad_token_id",
    "dtype", "torch_dtype", "ep_size", "head_dim", "qk_head_dim", "num_mtp_layers", "output_router_logits",
    "pretraining_tp", "seq_aux", "transformers_version", "use_cache", "use_return_dict", "output_attentions",
    "output_hidden_states", "return_dict", "chunk_size_feed_forward", "id2label", "label2id", "is_encoder_decoder",
    "problem_type", "_name_or_path", "name_or_path",
}  # fmt: skip


class HfConfig(BaseModel, frozen=True):
    """What a config.json specifies."""

    shape: Shape
    fp8: bool  # weights may be in FP8 blocks of 128 x 128
    bits: int | None  # of Linears that are our integers
    unknown: tuple[str, ...]  # keys that nothing here reads


def read_config(path: Path) -> HfConfig:
    """Raises HandOffError naming the file and the key."""
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise HandOffError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise HandOffError(f"{path}: not JSON: {str(error).splitlines()[0][:200]}") from None
    if not isinstance(tree, dict):
        raise HandOffError(f"{path}: not a JSON object")
    try:
        return _understood(tree)
    except ValidationError as error:
        raise HandOffError(f"{path}: {_explain(error)}") from None
    except HandOffError as error:
        raise HandOffError(f"{path}: {error}") from None


def _understood(tree: dict[str, object]) -> HfConfig:
    config = ConfigJson.model_validate(tree)
    quantized, bits = config.quantization_config, None
    if quantized is not None and quantized.get("quant_method") == OURS:
        bits = _IntegersJson.model_validate(quantized).bits
    elif quantized is not None:
        _FP8Json.model_validate(quantized)
    for wrong, message in _conflicts(config):
        if wrong:
            raise HandOffError(message)
    unknown = tuple(sorted(tree.keys() - ConfigJson.model_fields.keys() - _IDLE))
    return HfConfig(shape=_shape(config), fp8=quantized is not None and bits is None, bits=bits, unknown=unknown)


def _conflicts(c: ConfigJson) -> Iterator[tuple[bool, str]]:
    v3 = c.model_type == "deepseek_v3"
    score, methods = ("sigmoid", ("noaux_tc",)) if v3 else ("softmax", ("greedy", "group_limited_greedy"))
    yield c.scoring_func not in (None, score), f"scoring_func: {c.model_type} has {score} here, not {c.scoring_func}"
    yield c.topk_method not in (None, *methods), f"topk_method: {c.model_type} has no {c.topk_method} here"
    for name, count in (("n_group", c.n_group), ("topk_group", c.topk_group)):
        # transformers would take 8 and 4, vLLM one group.
        yield _grouped(c) and count is None, f"{name}: is missing, and {c.model_type} chooses experts by groups"
    kv = c.num_key_value_heads
    yield kv not in (None, c.num_attention_heads), f"num_key_value_heads: {kv}, but every head has keys of its own"
    message = f"rms_norm_eps: {c.rms_norm_eps}, but the latents' norms have {EPS}, and ours have one for all"
    yield c.rms_norm_eps != EPS, message
    yield not v3 and c.norm_topk_prob, "norm_topk_prob: released V2 code does not normalise; it must be false"
    dialects = [rope for rope in (c.rope_parameters, c.rope_scaling) if rope is not None]
    said = {(_theta(c, rope), _yarn(rope)) for rope in dialects}
    yield len(said) > 1, "rope_scaling: says something else than rope_parameters"


def _shape(c: ConfigJson) -> Shape:
    rope = c.rope_parameters if c.rope_parameters is not None else (c.rope_scaling or {})
    fields = {ours: getattr(c, theirs) for theirs, ours in NAMES.items()}
    fields["shared"] = c.n_shared_experts or 0
    fields["groups"], fields["group_limit"] = (c.n_group or 1, c.topk_group or 1) if _grouped(c) else (1, 1)
    return Shape(
        **fields,
        score="sigmoid" if c.model_type == "deepseek_v3" else "softmax",
        rope_theta=_theta(c, rope),
        yarn=_yarn(rope),
    )


def _grouped(c: ConfigJson) -> bool:
    return c.model_type == "deepseek_v3" or c.topk_method == "group_limited_greedy"


def _theta(c: ConfigJson, rope: Mapping[str, object]) -> float:
    theta = rope.get("rope_theta", c.rope_theta)
    return float(theta) if isinstance(theta, int | float) else 10000.0


def _yarn(rope: Mapping[str, object]) -> Yarn | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise HandOffError(f"rope_scaling: type {kind!r}: only yarn is known")
    return _YarnJson.model_validate(rope).yarn()


def _explain(error: ValidationError) -> str:
    """The first validation error, under config.json's own key names."""
    first = error.errors()[0]
    key = ".".join(_OURS.get(str(part), str(part)) for part in first["loc"]) or error.title
    reason = first["ctx"]["error"] if first["type"] == "value_error" else f"{first['msg']}, not {first['input']!r}"
    return f"{key}: {reason}"[:400]
