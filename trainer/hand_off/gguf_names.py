"""The tensors of a GGUF file of architecture deepseek2, in terms of our parameters.

The names are those that the `gguf` library maps the released names to. Unlike in released files, experts are stacked,
and kv_b is split by head into keys (transposed) and values, since llama.cpp multiplies by them separately. MTP is left
out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import gguf

from dryvine.trainer.hand_off.errors import HandOffError
from dryvine.trainer.hand_off.names import BIAS, Mapped, places
from dryvine.trainer.model.shape import Shape

Type = gguf.GGMLQuantizationType
QUANTS = {"f32": Type.F32, "bf16": Type.BF16, "f16": Type.F16, "q8_0": Type.Q8_0, "q4_k": Type.Q4_K}


class GgufTensor(NamedTuple):
    """A tensor made of slices of our parameters, concatenated, each transposed or not."""

    name: str
    shape: tuple[int, ...]  # as numpy has it; the file lists it in reverse
    type: Type
    parts: tuple[Mapped, ...]
    transposed: bool = False


def gguf_tensors(shape: Shape, quant: str) -> list[GgufTensor]:
    """All tensors of the file, in forward order."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, shape.layers)
    return [_typed(tensor, quant) for tensor in _stacked(shape, names)]


def _stacked(shape: Shape, names: gguf.TensorNameMap) -> Iterator[GgufTensor]:
    experts: dict[str, list[Mapped]] = {}
    for place in places(shape.model_copy(update={"mtp_depth": 0})):
        one = re.sub(r"experts\.\d+\.", "experts.", place.theirs)
        name = names.get_name(one.replace("e_score_correction_bias", "e_score_correction.bias"), (".weight", ".bias"))
        if one.endswith("kv_b_proj.weight"):
            yield from _split(shape, place, names)
        elif name is None:
            raise HandOffError(f"the gguf library has no name for {one}")
        elif one == place.theirs:
            yield GgufTensor(name, place.shape, Type.F32, (place,))
        else:
            experts.setdefault(name, []).append(place)
            if len(experts[name]) == shape.routed:
                stack = tuple(experts.pop(name))
                yield GgufTensor(name, (shape.routed, *place.shape), Type.F32, stack)


def _split(s: Shape, place: Mapped, names: gguf.TensorNameMap) -> Iterator[GgufTensor]:
    """Split kv_b, which has for each head the rows of keys and then those of values."""
    keys, values = [], []
    for head in range(s.heads):
        first = head * (s.nope_dim + s.v_dim) * s.kv_lora
        keys.append(place._replace(first=first, shape=(s.nope_dim, s.kv_lora)))
        values.append(place._replace(first=first + s.nope_dim * s.kv_lora, shape=(s.v_dim, s.kv_lora)))
    for letter, parts, size in (("k", keys, (s.kv_lora, s.nope_dim)), ("v", values, (s.v_dim, s.kv_lora))):
        name = names.get_name(place.theirs.replace("kv_b_proj", f"{letter}_b_proj"), (".weight",))
        yield GgufTensor(str(name), (s.heads, *size), Type.F32, tuple(parts), transposed=letter == "k")


def _typed(tensor: GgufTensor, quant: str) -> GgufTensor:
    """The type of a tensor. Vectors, gates and biases stay FP32; rows that the requested block size does not divide
    get the next more precise type."""
    if len(tensor.shape) == 1 or tensor.parts[0].ours.endswith((BIAS, ".gate.weight")):
        return tensor
    finer = [QUANTS[quant], Type.Q8_0, Type.F16]
    if quant == "q4_k" and tensor.parts[0].ours in ("embed.weight", "head.weight"):
        finer = finer[1:]
    fits = (kind for kind in finer if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0)
    return tensor._replace(type=next(fits))
