"""Every parameter of every block: name, shape, whether experts are stacked on dim 0, and whether the FP8 recipe applies
to it. Without torch, so that memory and gradients of any layout can be computed on a login node.

The names are those of `Model.named_parameters`, and a test compares the two; building the modules on torch's meta
device would give the same result, but takes a minute for 671B and needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import NamedTuple

from dryvine.trainer.model.shape import Shape, blocks


class ParameterSize(NamedTuple):
    name: str
    shape: tuple[int, ...]  # of all experts, where they are stacked
    expert: bool = False
    linear: bool = False  # of a Linear or FFN of the recipe: in FP8 if that is on

    def elements(self, ep: int) -> int:
        """The number of elements on one of `ep` expert-parallel ranks."""
        return prod(self.shape) // ep if self.expert else prod(self.shape)


def parameters(shape: Shape, names: Iterable[str]) -> dict[str, ParameterSize]:
    """The parameters of these blocks (`names` as in `shape.blocks`); shared ones are included once."""
    kinds = {block.name: block.kind for block in blocks(shape)}
    return {size.name: size for name in names for size in _OF[kinds[name]](shape, name)}


def _embed(s: Shape, name: str) -> Iterator[ParameterSize]:
    yield ParameterSize("embed.weight", (s.vocab, s.hidden))


def _head(s: Shape, name: str) -> Iterator[ParameterSize]:
    yield ParameterSize("norm.weight", (s.hidden,))
    yield ParameterSize("head.weight", (s.vocab, s.hidden))


def _dense(s: Shape, name: str) -> Iterator[ParameterSize]:
    yield from _attention(s, name)
    yield from _ffn(s, f"{name}.ffn", s.ffn)


def _moe(s: Shape, name: str) -> Iterator[ParameterSize]:
    yield from _attention(s, name)
    yield ParameterSize(f"{name}.gate.weight", (s.routed, s.hidden))
    up, down = (s.routed, 2 * s.expert_ffn, s.hidden), (s.routed, s.hidden, s.expert_ffn)
    yield ParameterSize(f"{name}.experts.gate_up", up, expert=True, linear=True)
    yield ParameterSize(f"{name}.experts.down", down, expert=True, linear=True)
    if s.shared:
        yield from _ffn(s, f"{name}.shared", s.shared * s.expert_ffn)


def _mtp(s: Shape, name: str) -> Iterator[ParameterSize]:
    yield from (ParameterSize(f"{name}.{norm}.weight", (s.hidden,)) for norm in ("norm_h", "norm_e", "norm"))
    yield ParameterSize(f"{name}.project.weight", (s.hidden, 2 * s.hidden), linear=True)
    yield from _moe(s, f"{name}.layer")
    yield from _embed(s, name)
    yield ParameterSize("head.weight", (s.vocab, s.hidden))


def _attention(s: Shape, name: str) -> Iterator[ParameterSize]:
    yield from (ParameterSize(f"{name}.{norm}.weight", (s.hidden,)) for norm in ("attention_norm", "ffn_norm"))
    at, q_out = f"{name}.attention", s.heads * s.qk_dim
    if s.q_lora is None:
        yield ParameterSize(f"{at}.q.weight", (q_out, s.hidden), linear=True)
    else:
        yield ParameterSize(f"{at}.q_a.weight", (s.q_lora, s.hidden), linear=True)
        yield ParameterSize(f"{at}.q_norm.weight", (s.q_lora,))
        yield ParameterSize(f"{at}.q_b.weight", (q_out, s.q_lora), linear=True)
    yield ParameterSize(f"{at}.kv_a.weight", (s.kv_lora + s.rope_dim, s.hidden), linear=True)
    yield ParameterSize(f"{at}.kv_norm.weight", (s.kv_lora,))
    yield ParameterSize(f"{at}.kv_b.weight", (s.heads * (s.nope_dim + s.v_dim), s.kv_lora), linear=True)
    yield ParameterSize(f"{at}.o.weight", (s.hidden, s.heads * s.v_dim), linear=True)


def _ffn(s: Shape, name: str, width: int) -> Iterator[ParameterSize]:
    yield ParameterSize(f"{name}.gate_up.weight", (2 * width, s.hidden), linear=True)
    yield ParameterSize(f"{name}.down.weight", (s.hidden, width), linear=True)


_OF = {"embed": _embed, "dense": _dense, "moe": _moe, "head": _head, "mtp": _mtp}
