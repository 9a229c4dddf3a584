"""The shape of a DeepSeek-V3-class model: all architecture hyperparameters, and parameter counts and costs from them.

Torch-free, so that a login node can plan, count and refuse a config without a GPU. Counts and costs are closed forms of
the same numbers from which the modules are built; a test compares them with the parameters of a model on the meta
device. (Counting those of a built model would need torch, and minutes for 671B.)
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, Field, PositiveInt, model_validator

# Limits that no trained model exceeds; planning a larger one would take hours.
Layers = Annotated[int, Field(ge=1, le=4096)]
Count = Annotated[int, Field(ge=1, le=1 << 16)]
Width = Annotated[int, Field(ge=1, le=1 << 24)]


LAYER_PHASES = ("dense", "attention", "experts")  # the phases that recompute = ["layer"] recomputes


class Yarn(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """YaRN (arXiv 2309.00071) on the rope dimensions: pairs that turn fewer than `alpha` times over `original`
    positions are slowed by `factor`, those that turn more than `beta` times are kept, and a ramp lies between."""

    factor: float = Field(gt=1)
    alpha: float = Field(default=1.0, gt=0)
    beta: float = Field(default=32.0, gt=0)
    original: PositiveInt = 4096  # the context length trained before the extension
    mscale: float = 1.0  # rotated parts are scaled by m(mscale) / m(mscale_all_dim), m(a) = 0.1 a ln(factor) + 1
    mscale_all_dim: float = 1.0  # the softmax is scaled by m(mscale_all_dim) squared


class Shape(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Architecture and its loss weights (arXiv 2412.19437, sections 2 and 4.2). Sizes are in elements."""

    layers: Layers
    first_dense: int = Field(ge=0, le=4096)  # leading layers with a dense FFN; the rest are mixtures of experts
    hidden: Width
    ffn: Width  # width of a dense FFN
    expert_ffn: Width  # width of one expert
    heads: Count
    q_lora: Width | None = None  # None: queries straight from the hidden state, as in V2-Lite
    kv_lora: Width
    nope_dim: Width
    rope_dim: Width
    v_dim: Width
    routed: Count
    shared: int = Field(ge=0, le=4096)
    top_k: Count
    groups: Count = 1
    group_limit: Count = 1  # the most groups from which a token's experts are chosen
    score: Literal["sigmoid", "softmax"]
    normalise: bool  # weights of the chosen experts sum to route_scale
    route_scale: float = Field(default=1.0, gt=0)
    vocab: Annotated[int, Field(ge=1, le=1 << 31)]
    max_position: Width
    rope_theta: float = Field(default=10000.0, gt=0)
    yarn: Yarn | None = None
    mtp_depth: int = Field(default=0, ge=0, le=64)
    mtp_weight: float = Field(default=0.3, ge=0)  # lambda of equation 25, shared evenly by the depths
    balance_alpha: float = Field(default=1e-4, ge=0)
    bias_gamma: float = Field(default=1e-3, ge=0)
    init_std: float = Field(default=0.006, gt=0)
    norm_eps: float = Field(default=1e-6, gt=0)
    # Outputs computed again in the backward; "layer": everything between a layer's input, its dispatch and its output;
    # "transposes": the transposed FP8 weights that input gradients read, kept by the rank for all microbatches.
    recompute: tuple[Literal["norm", "mla_up", "swiglu", "layer", "transposes"], ...] = ()

    @property
    def sparse_gate(self) -> bool:
        """Whether only the scores of the chosen experts have a gradient, and each depends on its own logit only."""
        return self.score == "sigmoid" and not self.balance_alpha

    @property
    def ranked_by(self) -> int:
        """The number of best biased scores by whose sum a group is ranked: two in V3 (sigmoid), one in V2."""
        return 2 if self.score == "sigmoid" else 1

    @property
    def qk_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    @model_validator(mode="after")
    def _consistent(self) -> Shape:
        for wrong, message in _refusals(self):
            if wrong:
                raise ValueError(message)
        return self


def _refusals(s: Shape) -> list[tuple[bool, str]]:
    """Error messages for impossible combinations, each with its fix."""
    in_group, rest = divmod(s.routed, s.groups)
    reach = s.group_limit * in_group
    return [
        (s.first_dense > s.layers, f"first_dense={s.first_dense} is more than layers={s.layers}: lower it"),
        (s.rope_dim % 2 == 1, f"rope_dim={s.rope_dim} is odd, and rope turns pairs: make it even"),
        (rest > 0, f"routed={s.routed} does not divide into groups={s.groups}: make routed a multiple of groups"),
        (s.group_limit > s.groups, f"group_limit={s.group_limit} is more than groups={s.groups}: lower it"),
        (
            s.top_k > reach,
            f"top_k={s.top_k} experts cannot be found in group_limit={s.group_limit} groups of {in_group}: "
            f"lower top_k to {reach} or raise group_limit",
        ),
        (
            s.score == "sigmoid" and s.groups > 1 and in_group < 2,
            f"groups={s.groups} of one expert each cannot be ranked by their two best: lower groups to {s.routed // 2}",
        ),
    ]


class Block(NamedTuple):
    name: str  # also the prefix of its parameters' names, except the head's
    kind: str  # a key of decoder.BLOCKS
    cost: float  # forward FLOPs per token


@lru_cache(maxsize=64)
def blocks(shape: Shape, seq_len: int | None = None) -> tuple[Block, ...]:
    """The model in forward order: embed, layers.0 ..., head, mtp.0 .... `seq_len` (default: max_position) determines
    the cost of causal attention, which covers half of it on average."""
    # Scores and values: 2 FLOPs a multiply-add, over seq_len / 2 positions on average.
    core = shape.heads * (shape.qk_dim + shape.v_dim) * (seq_len or shape.max_position)
    dense, moe = (2.0 * _layer_sizes(shape, is_moe)[1] + core for is_moe in (False, True))
    head = 2.0 * shape.vocab * shape.hidden
    layers = (
        Block(f"layers.{i}", "dense", dense) if i < shape.first_dense else Block(f"layers.{i}", "moe", moe)
        for i in range(shape.layers)
    )
    mtp = (Block(f"mtp.{k}", "mtp", moe + 4.0 * shape.hidden**2 + head) for k in range(shape.mtp_depth))
    return (Block("embed", "embed", 0.0), *layers, Block("head", "head", head), *mtp)


def units(shape: Shape, seq_len: int | None = None) -> tuple[tuple[Block, ...], ...]:
    """Groups of blocks that a partition may not split: each block alone, except that head and MTP must be in one stage,
    since they share the head's weight and the last hidden state."""
    every = blocks(shape, seq_len)
    head = 1 + shape.layers
    return (*((block,) for block in every[:head]), every[head:])


def count_parameters(shape: Shape, mtp: bool = False) -> tuple[int, int]:
    """(total, active per token). Active parameters exclude the input embedding, which is a lookup, and include the
    output head: DeepSeek's convention, by which V3 has 671.0B and 36.6B ("37B"), V2-Lite 15.7B and 2.45B ("2.4B").
    Main model only, or with `mtp` also the MTP modules, which share its embedding and head (V3: 11.6B more)."""
    dense, moe = _layer_sizes(shape, False), _layer_sizes(shape, True)
    embedding = shape.vocab * shape.hidden
    head = embedding + shape.hidden
    sparse = shape.layers - shape.first_dense
    total, active = (shape.first_dense * d + sparse * m + head for d, m in zip(dense, moe, strict=True))
    if mtp:
        join = 2 * shape.hidden**2 + 3 * shape.hidden
        total, active = (n + shape.mtp_depth * (m + join) for n, m in zip((total, active), moe, strict=True))
        active += shape.mtp_depth * embedding  # the head runs once more per depth
    return total + embedding, active


def _layer_sizes(shape: Shape, is_moe: bool) -> tuple[int, int]:
    """Parameters of a transformer layer: (total, active for one token)."""
    common = _attention_size(shape) + 2 * shape.hidden
    if not is_moe:
        size = common + 3 * shape.hidden * shape.ffn
        return size, size
    expert = 3 * shape.hidden * shape.expert_ffn
    common += shape.routed * shape.hidden + shape.shared * expert
    return common + shape.routed * expert, common + shape.top_k * expert


def _attention_size(s: Shape) -> int:
    q_out = s.heads * s.qk_dim
    q = s.hidden * q_out if s.q_lora is None else s.q_lora * (s.hidden + 1 + q_out)
    kv = s.hidden * (s.kv_lora + s.rope_dim) + s.kv_lora * (1 + s.heads * (s.nope_dim + s.v_dim))
    return q + kv + s.heads * s.v_dim * s.hidden
