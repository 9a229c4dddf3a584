"""Weights as 8- or 4-bit integers in blocks of 32 numbers of a row, for models that are smaller on a disk.

8 bits: q * scale, q in -127..127: 8.5 bits a number. 4 bits: q * scale - low with q in 0..15, two in a byte: 5 bits, as
both are FP16 and each block of 32 has its own; fitted as GGUF's Q4_K is, whose blocks of 256 many widths are no
multiple of. The files are ours alone: llama.cpp and vLLM are served by --format gguf and fp8-block.

Legend: R rows, C columns, B = C / 32 rounded up.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from dryvine.comm.integers import ceil_div
from dryvine.trainer.hand_off import q4_k

OURS = "dryvine-blocks"  # the quant_method of config.json
BLOCK = 32
SCALE, LOW = "_block_scale", "_block_low"  # what names of a weight's other tensors end in
BITS = {"int8": 8, "int4": 4}
Tensors = dict[str, Tensor]  # by what their names end in


def announced(bits: int, rows: int, cols: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes of what `quantize` returns."""
    blocks = ceil_div(cols, BLOCK)
    grid = (torch.float16, (rows, blocks))
    if bits == 8:
        return {"": (torch.int8, (rows, cols)), SCALE: grid}
    return {"": (torch.uint8, (rows, blocks * BLOCK // 2)), SCALE: grid, LOW: grid}


def quantize(rows_RC: Tensor, bits: int) -> Tensors:
    """FP32 rows as integers with their scales."""
    cols = rows_RC.shape[1]
    blocks_RBb = functional.pad(rows_RC, (0, -cols % BLOCK)).unflatten(1, (-1, BLOCK))
    if bits == 8:
        scale_RB = (blocks_RBb.abs().amax(-1) / 127).half()
        q_RBb = (blocks_RBb / _not_zero(scale_RB)).round_().clamp_(-127, 127).to(torch.int8)
        return {"": q_RBb.flatten(1)[:, :cols].contiguous(), SCALE: scale_RB}
    scale, low = (torch.from_numpy(part).half() for part in q4_k.fit(blocks_RBb.numpy()))
    q_RBb = ((blocks_RBb + low.float().unsqueeze(-1)) / _not_zero(scale)).round_().clamp_(0, 15).to(torch.uint8)
    first, second = q_RBb.unflatten(-1, (-1, 2)).unbind(-1)
    return {"": (first | second << 4).flatten(1), SCALE: scale, LOW: low}


def dequantize(parts: Mapping[str, Tensor], cols: int) -> Tensor:
    """The FP32 values [R, C] of quantised rows."""
    scale_RB1 = parts[SCALE].float().unsqueeze(-1)
    if LOW not in parts:
        q = functional.pad(parts[""], (0, -cols % BLOCK)).unflatten(1, (-1, BLOCK))
        return (q * scale_RB1).flatten(1)[:, :cols]
    pairs = torch.stack((parts[""] & 15, parts[""] >> 4), -1)
    q_RBb = pairs.flatten(1).unflatten(1, (-1, BLOCK))
    return (q_RBb * scale_RB1 - parts[LOW].float().unsqueeze(-1)).flatten(1)[:, :cols]


def _not_zero(scale_RB: Tensor) -> Tensor:
    """FP32 [R, B, 1]; of a block of zeros, 1."""
    return torch.where(scale_RB == 0, 1, scale_RB.float()).unsqueeze(-1)
