"""The attention core over packed documents: causal within each document.

On a GPU in BF16 it is one kernel for all documents, torch's `varlen_attn` (flash attention). It requires queries, keys
and values of equal width, a multiple of 8; `pad_heads` pads with zeros, which change neither scores nor the values' own
columns. Elsewhere, and in FP32, which that kernel does not support, each document goes through the core for whole
sequences. An N x N mask would need one call, but N / length times the compute.

Legend: N tokens, A heads, D width of a query, V of a value.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from dryvine.comm.integers import round_up
from dryvine.trainer.model.documents import Documents

_STEP = 8


def pad_heads(q_NAD: Tensor, k_NAD: Tensor, v_NAV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values padded to the kernel's width where necessary."""
    width = round_up(max(q_NAD.shape[-1], v_NAV.shape[-1]), _STEP)
    q, k, v = (
        t if t.shape[-1] == width else functional.pad(t, (0, width - t.shape[-1])) for t in (q_NAD, k_NAD, v_NAV)
    )
    return q, k, v


def attend_documents(q_NAD: Tensor, k_NAD: Tensor, v_NAD: Tensor, documents: Documents, scale: float) -> Tensor:
    """Attention over heads padded by `pad_heads` -> [N, A, D]."""
    if not _on_flash(q_NAD):
        heads = zip(*(t.split(documents.lengths) for t in (q_NAD, k_NAD, v_NAD)), strict=True)
        return torch.cat([_alone(q, k, v, scale) for q, k, v in heads])
    # Imported here: the module loads GPU libraries that a CPU host need not have.
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = documents.bounds, documents.longest
    # Without `return_aux` it is the output alone.
    return cast(
        Tensor,
        varlen_attn(q_NAD, k_NAD, v_NAD, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0)),
    )


def _on_flash(q_NAD: Tensor) -> bool:
    return q_NAD.is_cuda and q_NAD.dtype != torch.float32


def _alone(q_LAD: Tensor, k_LAD: Tensor, v_LAD: Tensor, scale: float) -> Tensor:
    """Attention over one document of L tokens."""
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q_LAD, k_LAD, v_LAD))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out.squeeze(0).transpose(0, 1)
