"""Where every tensor of a released DeepSeek checkpoint lies in our parameters.

Released files have a matrix for each projection and expert; ours stack gate over up, and all experts. So each of their
tensors is a contiguous run of elements of one of ours, and one list of such runs, used in both directions, is the whole
mapping: export and import cannot disagree, and neither needs more than a slice in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from dryvine.trainer.model.shape import Shape, blocks

BIAS = ".gate.bias"  # suffix of our gate biases, which are buffers, not parameters


class Mapped(NamedTuple):
    """One of their tensors: elements first..first+size of ours."""

    theirs: str
    ours: str
    first: int
    shape: tuple[int, ...]  # of theirs
    linear: bool = False  # a weight that released checkpoints quantise
    copy: bool = False  # a duplicate of another tensor: MTP's embedding and head

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def places(shape: Shape) -> Iterator[Mapped]:
    """All tensors, in forward order. Lazy, since an untrusted config.json may claim a billion layers."""
    table = (shape.vocab, shape.hidden)
    yield Mapped("model.embed_tokens.weight", "embed.weight", 0, table)
    for i in range(shape.layers):
        yield from _layer(shape, f"layers.{i}", f"model.layers.{i}", i >= shape.first_dense)
    yield Mapped("model.norm.weight", "norm.weight", 0, (shape.hidden,))
    yield Mapped("lm_head.weight", "head.weight", 0, table)
    for k in range(shape.mtp_depth):
        yield from _mtp(shape, f"mtp.{k}", f"model.layers.{shape.layers + k}")


def biases(shape: Shape) -> list[str]:
    """Our names of the gates' biases. V2 has none in its files: its gates choose by the scores alone."""
    named = {"moe": "{}.gate.bias", "mtp": "{}.layer.gate.bias"}
    return [named[block.kind].format(block.name) for block in blocks(shape) if block.kind in named]


def sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The whole shape of each of our parameters, without the biases."""
    found: dict[str, tuple[int, ...]] = {}
    ends: dict[str, int] = {}
    for place in places(shape):
        if not place.copy and not place.ours.endswith(BIAS):
            found.setdefault(place.ours, place.shape)
            ends[place.ours] = place.first + place.elements
    return {name: _whole(shape, name, first, ends[name]) for name, first in found.items()}


def _whole(shape: Shape, name: str, first: tuple[int, ...], end: int) -> tuple[int, ...]:
    """The whole shape of a parameter, from the places that fill it."""
    if len(first) == 1:
        return first
    rows = end // first[1]
    return (shape.routed, rows // shape.routed, first[1]) if ".experts." in name else (rows, first[1])


def _layer(s: Shape, ours: str, theirs: str, is_moe: bool) -> Iterator[Mapped]:
    yield Mapped(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight", 0, (s.hidden,))
    yield from _attention(s, f"{ours}.attention", f"{theirs}.self_attn")
    yield Mapped(f"{theirs}.post_attention_layernorm.weight", f"{ours}.ffn_norm.weight", 0, (s.hidden,))
    if not is_moe:
        yield from _ffn(f"{ours}.ffn", f"{theirs}.mlp", s.ffn, s.hidden)
        return
    yield Mapped(f"{theirs}.mlp.gate.weight", f"{ours}.gate.weight", 0, (s.routed, s.hidden))
    if s.score == "sigmoid":
        yield Mapped(f"{theirs}.mlp.gate.e_score_correction_bias", f"{ours}.gate.bias", 0, (s.routed,))
    if s.shared:
        yield from _ffn(f"{ours}.shared", f"{theirs}.mlp.shared_experts", s.shared * s.expert_ffn, s.hidden)
    for e in range(s.routed):
        for place in _ffn(f"{ours}.experts", f"{theirs}.mlp.experts.{e}", s.expert_ffn, s.hidden):
            stacked = place.ours.removesuffix(".weight")
            size = (2 if stacked.endswith("gate_up") else 1) * place.elements
            yield place._replace(ours=stacked, first=e * size + place.first)


def _attention(s: Shape, ours: str, theirs: str) -> Iterator[Mapped]:
    def matrix(name: str, other: str, outputs: int, inputs: int) -> Mapped:
        return Mapped(f"{theirs}.{other}.weight", f"{ours}.{name}.weight", 0, (outputs, inputs), linear=True)

    def norm(name: str, other: str, size: int) -> Mapped:
        return Mapped(f"{theirs}.{other}.weight", f"{ours}.{name}.weight", 0, (size,))

    if s.q_lora is None:
        yield matrix("q", "q_proj", s.heads * s.qk_dim, s.hidden)
    else:
        yield matrix("q_a", "q_a_proj", s.q_lora, s.hidden)
        yield norm("q_norm", "q_a_layernorm", s.q_lora)
        yield matrix("q_b", "q_b_proj", s.heads * s.qk_dim, s.q_lora)
    yield matrix("kv_a", "kv_a_proj_with_mqa", s.kv_lora + s.rope_dim, s.hidden)
    yield norm("kv_norm", "kv_a_layernorm", s.kv_lora)
    yield matrix("kv_b", "kv_b_proj", s.heads * (s.nope_dim + s.v_dim), s.kv_lora)
    yield matrix("o", "o_proj", s.hidden, s.heads * s.v_dim)


def _ffn(ours: str, theirs: str, width: int, hidden: int) -> Iterator[Mapped]:
    up = (width, hidden)
    yield Mapped(f"{theirs}.gate_proj.weight", f"{ours}.gate_up.weight", 0, up, linear=True)
    yield Mapped(f"{theirs}.up_proj.weight", f"{ours}.gate_up.weight", width * hidden, up, linear=True)
    yield Mapped(f"{theirs}.down_proj.weight", f"{ours}.down.weight", 0, (hidden, width), linear=True)


def _mtp(s: Shape, ours: str, theirs: str) -> Iterator[Mapped]:
    table = (s.vocab, s.hidden)
    yield Mapped(f"{theirs}.embed_tokens.weight", "embed.weight", 0, table, copy=True)
    yield Mapped(f"{theirs}.enorm.weight", f"{ours}.norm_e.weight", 0, (s.hidden,))
    yield Mapped(f"{theirs}.hnorm.weight", f"{ours}.norm_h.weight", 0, (s.hidden,))
    # The one Linear that released checkpoints do not quantise.
    yield Mapped(f"{theirs}.eh_proj.weight", f"{ours}.project.weight", 0, (s.hidden, 2 * s.hidden))
    yield from _layer(s, f"{ours}.layer", theirs, is_moe=True)
    yield Mapped(f"{theirs}.shared_head.norm.weight", f"{ours}.norm.weight", 0, (s.hidden,))
    yield Mapped(f"{theirs}.shared_head.head.weight", "head.weight", 0, table, copy=True)
